"""All nodes of a daemon: adding and removing them, finding them by name, and moving them between loops.

Everything here runs on the daemon's main loop; what touches a node that lives elsewhere is sent to that node's loop.
A failed `add` leaves nothing behind.
"""

from __future__ import annotations

import itertools
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blkferry.errors import Error, ErrorKind
from blkferry.graph import permissions, registry
from blkferry.graph.access import BACKING
from blkferry.graph.node import EventSink, Node, depends_on, ignore_event
from blkferry.graph.permissions import ALL, NONE, Edge
from blkferry.graph.root import Root
from blkferry.plane.drain import TaskLock
from blkferry.schema.block import (
    BlockdevCacheOptions,
    BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions,
    BlockdevOptions,
)

if TYPE_CHECKING:
    from blkferry.plane.services import Services

MAX_NODE_NAME = 31
MAX_DEPTH = 200
"""How deep nodes may nest: a chain of backing files, not a loop of them."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)


def well_formed(name: str) -> bool:
    """Whether `name` may name a node, an export or an object: a letter, then letters, digits, '-', '.' and '_'."""
    return _NAME.fullmatch(name) is not None


class Parent(Protocol):
    """The settings of a node that its inline children take over."""

    @property
    def read_only(self) -> bool: ...

    @property
    def cache(self) -> BlockdevCacheOptions: ...


class Settings(NamedTuple):
    """What the options that all drivers share amount to."""

    read_only: bool
    auto_read_only: bool
    cache: BlockdevCacheOptions
    unmaps: bool


def settle(options: BlockdevOptions, parent: Parent | None) -> Settings:
    """The settings of a node, which is the inline child of `parent` if there is one. Raises Error."""
    read_only = options.read_only or (parent is not None and parent.read_only)
    if options.force_share and not read_only:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "force-share=on can only be used with read-only images",
            hint="Add read-only=on.",
        )
    if not options.active:
        raise Error(ErrorKind.UNSUPPORTED, "Inactive nodes are not supported", hint="Leave active out.")
    unmaps = options.discard is BlockdevDiscardOptions.UNMAP
    if options.detect_zeroes is BlockdevDetectZeroesOptions.UNMAP and not unmaps:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            hint="Add discard=unmap, or use detect-zeroes=on.",
        )
    if parent is not None:
        unmaps = options.discard is not BlockdevDiscardOptions.IGNORE  # the parent decides
    cache = options.cache or (parent.cache if parent else BlockdevCacheOptions())
    return Settings(read_only, options.auto_read_only or parent is not None, cache, unmaps)


class Inherited(NamedTuple):
    """The settings that an inline child takes over."""

    read_only: bool
    cache: BlockdevCacheOptions


def inherited(parent: Parent, role: str) -> Inherited:
    """The settings that the inline child `role` of a node takes over: a backing file is only read."""
    return Inherited(parent.read_only or role == BACKING, parent.cache)


@dataclass
class Opening:
    """What a driver is given to open itself with."""

    graph: Graph
    options: BlockdevOptions
    read_only: bool
    auto_read_only: bool
    cache: BlockdevCacheOptions
    depth: int = 0

    async def child(self, node: Node, role: str, reference: str | BlockdevOptions) -> Node:
        """Find or open the node that `reference` means, and attach it to `node` as its child `role`."""
        if isinstance(reference, str):
            child = self.graph.find(reference, device=reference)
            if node in depends_on(child):
                raise Error(ErrorKind.INVALID_ARGUMENT, f"Node '{reference}' cannot be below itself", node=reference)
            if child.services is not node.services:
                await self.graph.move(child, node.services)
        else:
            child = await self.graph.open(reference, inherited(self, role), self.depth + 1)
        edge = Edge(node, child, role)
        node.children[role] = edge
        child.parents.append(edge)
        return child


class TreeUser(Protocol):
    """The user of a root, who can be stopped while the nodes move to another loop. Called on the main loop."""

    root: Root

    @property
    def pinned(self) -> bool:
        """Whether the tree must stay where it is."""

    async def pause(self) -> None:
        """Stop using the node; return when nothing is in flight."""

    async def resume(self) -> None:
        """Go on, on the loop where the node lives now."""


class ClientTls(Protocol):
    """Where drivers get the TLS of a client from."""

    def __call__(self, credentials_id: str, *, named: bool) -> ssl.SSLContext:
        """What the credentials of this id make; `named`: for a server of which a name is known. Raises Error."""


class Graph:
    """The nodes of one daemon; new nodes live on `services` until they are moved."""

    def __init__(self, services: Services, emit: EventSink = ignore_event) -> None:
        self.services = services
        self.emit = emit  # to be called from any thread
        self.nodes: dict[str, Node] = {}
        self.users: list[TreeUser] = []
        self._standing: list[TreeUser] = []  # those who stand still in `drained`
        self._numbers = itertools.count(1)
        self.secret: Callable[[str], bytes] = _no_secret  # what the secret of this id keeps; the daemon sets it
        self.client_tls: ClientTls = _no_credentials  # likewise
        self.shown: dict[int, str] = {}  # nodes that are files by FUSE now, by the st_dev of those
        self.changing = TaskLock()  # held while nodes, edges or permissions change; never while waiting for clients

    def find(self, name: str, device: str = "") -> Node:
        """The node called `name`; raises Error(NOT_FOUND), which says that there is no `device` either."""
        try:
            return self.nodes[name]
        except KeyError:
            raise Error(
                ErrorKind.NOT_FOUND,
                f"Cannot find device='{device}' nor node-name='{name}'",
                hint=_list_names(self.nodes),
                node=name,
            ) from None

    def registered(self, name: str) -> Node:
        """The same for commands that take nothing but a node's name, and say so in other words."""
        node = self.nodes.get(name)
        if node is None:
            raise Error(
                ErrorKind.NOT_FOUND,
                f"Failed to find node with node-name='{name}'",
                hint=_list_names(self.nodes),
                node=name,
            )
        return node

    async def add(self, options: BlockdevOptions) -> Node:
        """Open the node that `options` describe, with the inline children in them.

        Raises Error and leaves nothing behind when that fails.
        """
        if options.node_name is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "'node-name' must be specified for the root node")
        async with self.changing:
            return await self.open(options, None)

    async def open(self, options: BlockdevOptions, parent: Parent | None, depth: int = 0) -> Node:
        """Open one node, as an inline child that takes over the settings of `parent` if that is given."""
        name = self._claim_name(options.node_name)
        if depth > MAX_DEPTH:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Nodes are nested more than {MAX_DEPTH} deep")
        read_only, auto_read_only, cache, unmaps = settle(options, parent)
        opening = Opening(self, options, read_only, auto_read_only, cache, depth)
        node = registry.driver(options.driver)(name, options, self.services, read_only=opening.read_only)
        node.implicit = parent is not None
        node.unmaps = unmaps
        node.cache = cache
        node.emit = self.emit
        self.nodes[name] = node
        try:
            await node.open(opening)
            await permissions.settle_children(node)
        except BaseException:
            await self.close_node(node)
            raise
        return node

    def _claim_name(self, name: str | None) -> str:
        if name is None:
            return f"#block{next(self._numbers):03}"
        self.check_name(name)
        return name

    def check_name(self, name: str) -> None:
        """Raise Error unless a new node may have this name."""
        if len(name.encode()) > MAX_NODE_NAME:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Node name too long", hint=f"At most {MAX_NODE_NAME} bytes.")
        if not well_formed(name):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Invalid node-name: '{name}'",
                hint="A letter first, then letters, digits, '-', '.' and '_'.",
            )
        if name in self.nodes:
            raise Error(ErrorKind.EXISTS, f"Duplicate nodes with node-name='{name}'", node=name)

    async def remove(self, name: str) -> None:
        """Close a node that nothing uses, and the inline children it had."""
        async with self.changing:
            node = self.registered(name)
            refuse_backing(node)
            for parent in node.parents:
                if parent.role != "root":
                    raise Error(
                        ErrorKind.BUSY,
                        f"Node '{name}' is busy: node is used as {parent.role} of {parent.user.describe()}",
                        node=name,
                    )
            users = [parent.user.describe() for parent in node.parents]
            users += [
                f"{bitmap.user} (bitmap '{bitmap.name}')" for bitmap in node.dirty_bitmaps.values() if bitmap.user
            ]
            if users:
                hint = f"It is used by {', '.join(users)}."
                raise Error(ErrorKind.BUSY, f"Node {name} is in use", hint=hint, node=name)
            if node.implicit:
                raise Error(ErrorKind.BUSY, f"Node {name} is in use", hint="It belongs to another node.", node=name)
            await self.close_node(node)

    async def close_node(self, node: Node) -> None:
        """Close a node that nothing uses; the caller holds `changing`."""
        self.nodes.pop(node.name, None)
        try:
            await node.services.run(node.close())  # it may still write, so it needs its children as they are
        finally:
            await self._let_go(node, list(node.children.values()))

    async def _let_go(self, node: Node, edges: list[Edge]) -> None:
        """End the use that `node` makes of children, and close those that were only there for it."""
        for edge in edges:
            if edge.used or edge.shared != ALL:
                await node.services.run(permissions.change(edge, NONE, ALL))
            edge.node.parents.remove(edge)
            node.children.pop(edge.role, None)
        for child in [edge.node for edge in edges]:
            if child.implicit and not child.parents:
                await self.close_node(child)

    async def close(self) -> None:
        """Flush and close every node; nothing may use them any more. Users go before what they use."""
        for node in reversed(list(self.nodes.values())):
            if node.name in self.nodes and not node.parents:
                await self.close_node(node)
        for node in list(self.nodes.values()):  # what is left was held together by a loop of our own bugs
            await self.close_node(node)

    # Loops -----------------------------------------------------------------------------------------------------

    def tree_of(self, node: Node) -> set[Node]:
        """Every node that is connected with `node`, up or down: they live on one loop."""
        found: set[Node] = set()
        queue = [node]
        while queue:
            current = queue.pop()
            if current in found:
                continue
            found.add(current)
            queue.extend(edge.node for edge in current.children.values())
            queue.extend(edge.user for edge in current.parents if isinstance(edge.user, Node))
        return found

    def users_of(self, nodes: set[Node]) -> Iterator[TreeUser]:
        """The exports on any of these nodes."""
        return (user for user in self.users if user.root.node in nodes)

    async def move(self, node: Node, services: Services) -> None:
        """Let the tree of `node`, with all exports on it, live on another loop. Connections survive this."""
        if services is node.services:
            return
        tree = self.tree_of(node)
        async with self.drained(tree):
            for member in tree:
                member.move(services)

    async def cancel_in_flight(self) -> None:
        """Let fail what waits for something out there, on any node: the end has come and cannot wait, too."""
        for node in list(self.nodes.values()):
            await node.services.run(_cancelled(node))

    @asynccontextmanager
    async def drained(self, nodes: set[Node]) -> AsyncIterator[None]:
        """Nothing is in flight on any of these nodes, which are whole trees, and nothing begins.

        Within such a block there may be others: who stands still goes on at the end of the outermost.
        """
        paused: list[TreeUser] = []
        try:
            for user in [each for each in self.users_of(nodes) if each not in self._standing]:
                await user.pause()
                paused.append(user)
                self._standing.append(user)
            for member in nodes:
                await member.services.run(member.pause())
            yield
        finally:
            for user in paused:
                self._standing.remove(user)
                await user.resume()


def refuse_backing(node: Node) -> None:
    """Raise Error(BUSY) when `node` is the backing file of another one, which could not bear a change of it."""
    for parent in node.parents:
        if parent.role == BACKING and isinstance(parent.user, Node):
            raise Error(
                ErrorKind.BUSY,
                f"Node '{node.name}' is busy: node is used as backing hd of '{parent.user.name}'",
                node=node.name,
            )


def _no_secret(secret_id: str) -> bytes:
    raise Error(ErrorKind.NOT_FOUND, f"No secret with id '{secret_id}'", hint="There are no secrets here.")


def _no_credentials(credentials_id: str, *, named: bool) -> ssl.SSLContext:
    del named
    text = f"No TLS credentials with id '{credentials_id}'"
    raise Error(ErrorKind.NOT_FOUND, text, hint="There are no credentials here.")


def _list_names(nodes: dict[str, Node]) -> str:
    names = sorted(name for name in nodes if not name.startswith("#"))
    return f"Known nodes: {', '.join(names)}." if names else "There are no nodes; add one with blockdev-add."


async def _cancelled(node: Node) -> None:
    node.cancel_in_flight()
