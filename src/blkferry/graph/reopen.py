"""blockdev-reopen: other options for nodes that are in use, for all of them or for none.

What the schema tells is checked here: which options a driver can change, which children may become others, and what
inline children take over. Drivers prepare what can fail, and then take over what they prepared. Everything runs on the
daemon's main loop, the drivers' part on the loops of their nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from blkferry.errors import Error, ErrorKind
from blkferry.graph import permissions
from blkferry.graph.access import BACKING
from blkferry.graph.changes import attach, detach, point, refuse_cycle, relax, undone_on_failure
from blkferry.graph.graph import Parent, inherited, settle
from blkferry.graph.node import depends_on
from blkferry.graph.permissions import Permission, settle_children
from blkferry.schema.model import Alternate, Member, members
from blkferry.schema.qapi import Null

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blkferry.graph.graph import Graph
    from blkferry.graph.node import Node
    from blkferry.schema.block import BlockdevCacheOptions, BlockdevOptions

COMMON = frozenset({"discard", "cache", "active", "read-only", "auto-read-only", "detect-zeroes"})
"""What every node can change. That active stays on is checked elsewhere."""

REPLACEABLE = frozenset({"file", BACKING})
"""The roles in which another node may take the place of a child."""

_REFERENCES = frozenset({"BlockdevRef", "BlockdevRefOrNull"})


@dataclass(eq=False)
class Reopening:
    """What one node shall become.

    `children` has the roles that get another child, or none. A driver sets `length` when it will have another one, and
    keeps in `prepared` what it likes.
    """

    graph: Graph
    node: Node
    options: BlockdevOptions
    read_only: bool
    auto_read_only: bool
    cache: BlockdevCacheOptions
    unmaps: bool
    children: dict[str, Node | None] = field(default_factory=dict)
    length: int | None = None
    prepared: Any = None

    def child(self, role: str) -> Node | None:
        """The child that the node will have."""
        if role in self.children:
            return self.children[role]
        edge = self.node.children.get(role)
        return edge.node if edge is not None else None


async def reopen(graph: Graph, wanted: list[BlockdevOptions]) -> None:
    """Give the nodes that these options name these options. The caller holds `changing`.

    Raises Error, and nothing has changed then.
    """
    nodes = {}
    for options in wanted:
        if options.node_name is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "node-name not specified")
        nodes[graph.registered(options.node_name)] = options
    await _reopen(graph, nodes)


async def set_read_only(graph: Graph, node: Node, *, read_only: bool) -> None:
    """Reopen one node with nothing else changed. The caller holds `changing`. Raises Error."""
    await _reopen(graph, {node: msgspec.structs.replace(node.options, read_only=read_only)}, keep_backing=True)


async def _reopen(graph: Graph, wanted: dict[Node, BlockdevOptions], *, keep_backing: bool = False) -> None:
    plan = _Plan(graph, wanted, keep_backing=keep_backing)
    steps = plan.steps()
    joining = [(step, child) for step in steps for child in step.children.values() if child is not None]
    for step, child in joining:
        if child.services is not step.node.services:
            await graph.move(child, step.node.services)
    trees = [graph.tree_of(node) for node in (*plan.found, *(child for _, child in joining))]
    concerned = set().union(*trees)
    before = {step.node: [edge.node for edge in step.node.children.values()] for step in steps}
    async with graph.drained(concerned):
        tried: list[Reopening] = []
        try:
            async with undone_on_failure(concerned):
                for step in steps:
                    tried.append(step)
                    await step.node.services.run(step.node.reopen_prepare(step))
                    _check_length(step)
                for step in steps:
                    step.node.read_only = step.read_only
                for step in steps:
                    await step.node.services.run(_rewire(step))
                for step in steps:
                    _refuse_writers(step)
        except BaseException:
            for step in reversed(tried):
                await step.node.services.run(step.node.reopen_abort(step))
            raise
        for step in reversed(steps):
            await step.node.services.run(_commit(step))
        for node in [child for step in steps for child in before[step.node]]:
            if node.implicit and not node.parents:
                await graph.close_node(node)


class _Plan:
    """Which nodes change, and to what, as far as can be told without asking drivers."""

    def __init__(self, graph: Graph, wanted: dict[Node, BlockdevOptions], *, keep_backing: bool) -> None:
        self._graph = graph
        self._wanted = wanted
        self._keep_backing = keep_backing
        self.found: dict[Node, Reopening] = {}
        for node, options in wanted.items():
            self._add(node, options, None)

    def steps(self) -> list[Reopening]:
        """Users before what they use."""
        return sorted(self.found.values(), key=lambda step: len(depends_on(step.node)), reverse=True)

    def _add(self, node: Node, options: BlockdevOptions, parent: Parent | None) -> None:
        _check_options(node, options)
        step = self.found[node] = Reopening(self._graph, node, options, *settle(options, parent))
        for member in _references(options):
            self._child(step, member, getattr(options, member.field))
        for edge in node.children.values():
            child = edge.node
            named = child in self._wanted or child in self.found
            if child.implicit and not named and edge.role not in step.children:
                self._add(child, child.options, inherited(step, edge.role))

    def _child(self, step: Reopening, member: Member, wanted: object) -> None:
        node, role = step.node, member.name
        current = step.child(role)
        if wanted is None:
            if role == BACKING and current is not None and not self._keep_backing:
                raise Error(
                    ErrorKind.INVALID_ARGUMENT,
                    f"backing is missing for '{node.name}'",
                    hint=f"Give the name of a node, '{current.name}' if it shall stay, or null.",
                    node=node.name,
                )
            return
        if self._keep_backing:
            return
        if isinstance(wanted, str):
            new = self._graph.find(wanted)
        elif isinstance(wanted, Null):
            new = None
        else:
            self._inline_child(step, role, current, wanted)
            return
        if new is current:
            return
        if role not in REPLACEABLE:
            raise _unchangeable(node, role)
        if new is not None:
            refuse_cycle(node, new, role)
        step.children[role] = new

    def _inline_child(self, step: Reopening, role: str, current: Node | None, wanted: Any) -> None:
        """Options for a child that is the node's own, and must stay that."""
        if current is None or not current.implicit or wanted.node_name not in (None, current.options.node_name):
            raise _unchangeable(step.node, f"{role}.driver", "Name a node that has been added.")
        if current not in self._wanted:
            self._add(current, wanted, inherited(step, role))


def _references(options: BlockdevOptions) -> Iterator[Member]:
    for member in members(type(options)):
        if isinstance(member.type, Alternate) and member.type.name in _REFERENCES:
            yield member


def _check_options(node: Node, options: BlockdevOptions) -> None:
    if options.driver != node.driver:
        raise _unchangeable(node, "driver")
    for member in members(type(options)):
        if member.name in COMMON or member.name == "node-name" or member in _references(options):
            continue
        old, new = getattr(node.options, member.field), getattr(options, member.field)
        if old == new or member.name in node.reopenable:
            continue
        if member.optional and new == member.default:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Option '{member.name}' cannot be reset to its default value",
                hint="Give it as it was when the node was added.",
                node=node.name,
            )
        raise _unchangeable(node, member.name)


def _unchangeable(node: Node, name: str, hint: str = "") -> Error:
    return Error(
        ErrorKind.INVALID_ARGUMENT,
        f"Cannot change the option '{name}'",
        hint=hint or f"Remove node '{node.name}' and add it anew.",
        node=node.name,
    )


def _check_length(step: Reopening) -> None:
    """A new size needs the consent of all users, as block_resize does."""
    node = step.node
    if step.length is None or step.length == node.length:
        return
    for edge in node.parents:
        if not edge.shared & Permission.RESIZE:
            raise Error(
                ErrorKind.DENIED,
                f"Permission conflict on node '{node.name}': permissions 'resize' are both required by blockdev-reopen "
                f"and unshared by {edge.describe()}.",
                node=node.name,
            )


def _refuse_writers(step: Reopening) -> None:
    node = step.node
    writers = [edge for edge in node.parents if edge.used & (Permission.WRITE | Permission.RESIZE)]
    if node.read_only and writers:
        raise Error(
            ErrorKind.DENIED,
            f"Read-only block node '{node.name}' cannot support read-write users",
            hint=f"It is written by {', '.join(edge.user.describe() for edge in writers)}.",
            node=node.name,
        )


async def _rewire(step: Reopening) -> None:
    node = step.node
    for role, new in step.children.items():
        edge = node.children.get(role)
        if edge is None:
            assert new is not None
            attach(node, new, role)
        elif new is None:
            await detach(edge, node)
        else:
            old = edge.node
            point(edge, new)
            await permissions.change(edge, edge.used, edge.shared)
            await relax(old)
    await settle_children(node)


async def _commit(step: Reopening) -> None:
    node = step.node
    node.options = step.options
    node.cache = step.cache
    node.unmaps = step.unmaps
    await node.reopen_commit(step)
    node.retire()
