"""Changing who uses whom while everything is in use: an overlay in the place of its base, another node in that of one.

A change is tried while the users of all nodes concerned stand still, and undone whole when anybody objects. Callers
hold `Graph.changing`; everything here runs on the daemon's main loop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.graph import permissions
from blkferry.graph.access import BACKING
from blkferry.graph.node import Node, depends_on
from blkferry.graph.permissions import ALL, NONE, Edge, cumulative, settle_children

if TYPE_CHECKING:
    from blkferry.graph.graph import Graph

log = logging.getLogger(__name__)


async def replace(graph: Graph, old: Node, new: Node, edges: Iterable[Edge] | None = None) -> None:
    """Let those who use `old` (by all edges, or by these) use `new` from now on; exports follow.

    By default the edges of nodes that `new` depends on stay. Raises Error, and nothing has changed then.
    """
    await _join(graph, old, new)
    moved = _movable(old, new) if edges is None else list(edges)
    _refuse_smaller(old, new, moved)
    nodes = graph.tree_of(old) | graph.tree_of(new)
    async with graph.drained(nodes), undone_on_failure(nodes):
        await _flush(old)
        await old.services.run(_take_over(old, new, moved))


async def append(graph: Graph, overlay: Node, base: Node) -> None:
    """Put `overlay` on `base`: it gets `base` as its backing child, and all users that `base` had.

    Raises Error, and nothing has changed then.
    """
    refuse_cycle(overlay, base, BACKING)
    await _join(graph, base, overlay)
    moved = _movable(base, overlay)
    _refuse_smaller(base, overlay, moved)
    nodes = graph.tree_of(base) | graph.tree_of(overlay)

    async def change() -> None:
        attach(overlay, base, BACKING)
        await _take_over(base, overlay, moved)
        await settle_children(overlay)
        overlay.child_retired(BACKING, 0, None)

    async with graph.drained(nodes), undone_on_failure(nodes):
        await _flush(base)
        await base.services.run(change())


async def _join(graph: Graph, old: Node, new: Node) -> None:
    """Nodes that are connected live on one loop."""
    if new.services is not old.services:
        await graph.move(new, old.services)


def _movable(old: Node, new: Node) -> list[Edge]:
    below = depends_on(new)
    return [edge for edge in old.parents if edge.user not in below]


def _refuse_smaller(old: Node, new: Node, moved: list[Edge]) -> None:
    if moved and new.length < old.length:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Node '{new.name}' is smaller than node '{old.name}', whose users it would get",
            hint=f"It has {new.length} bytes, and needs {old.length}.",
            node=new.name,
        )


async def _flush(old: Node) -> None:
    """What its users have been told is written: their next flush will go to another node."""
    if old.read_only:
        return
    try:
        await old.services.run(old.flush())
    except OSError as error:
        raise Error.from_oserror(f"Could not flush node '{old.name}'", error, node=old.name) from error


async def _take_over(old: Node, new: Node, moved: list[Edge]) -> None:
    for edge in moved:
        point(edge, new)
    for edge in moved:
        await permissions.change(edge, edge.used, edge.shared)
    await relax(old)
    for edge in moved:
        edge.user.child_retired(edge.role, 0, None)


# Edges, one by one: for use in a block of `undone_on_failure`, on the loop of the nodes ---------------------------


def refuse_cycle(user: Node, child: Node, role: str) -> None:
    """Raise Error if `user` would be below itself with `child` as its child."""
    if user in depends_on(child):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Making '{child.name}' a {role} child of '{user.name}' would create a cycle",
            node=user.name,
        )


def attach(user: Node, child: Node, role: str) -> Edge:
    """Make a node the child `role` of another one, without permissions yet."""
    edge = Edge(user, child, role)
    user.children[role] = edge
    child.parents.append(edge)
    return edge


async def detach(edge: Edge, user: Node) -> None:
    """End the use that `user` makes of a child."""
    await permissions.change(edge, NONE, ALL)
    edge.node.parents.remove(edge)
    del user.children[edge.role]


def point(edge: Edge, node: Node) -> None:
    """Let an edge lead to another node; its permissions are as yet unchecked there."""
    edge.node.parents.remove(edge)
    edge.node = node
    node.parents.append(edge)


async def relax(node: Node) -> None:
    """Let `node` need no more than its users do, after it has lost some."""
    await node.permissions_changed(*cumulative(node))
    await settle_children(node)


# Undoing -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def undone_on_failure(nodes: Iterable[Node]) -> AsyncIterator[None]:
    """If the block fails, these nodes have the edges, permissions and read-only-ness again that they had before it."""
    kept = [_Kept(node) for node in nodes]
    try:
        yield
    except BaseException:
        for each in kept:
            each.restore()
        for each in kept:
            await each.settle()
        raise


class _Kept:
    """How a node was."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._read_only = node.read_only
        self._children = dict(node.children)
        self._edges = [(edge, edge.used, edge.shared) for edge in node.parents]

    def restore(self) -> None:
        node = self._node
        node.read_only = self._read_only
        node.children.clear()
        node.children.update(self._children)
        node.parents[:] = [edge for edge, _, _ in self._edges]
        for edge, used, shared in self._edges:
            edge.node, edge.used, edge.shared = node, used, shared

    async def settle(self) -> None:
        node = self._node
        try:
            await node.services.run(node.permissions_changed(*cumulative(node)))
        except Error:
            # Another process may have taken a lock that we had let go of for a moment: its users will see errors.
            log.exception("node '%s' could not get back what its users need", node.name)
