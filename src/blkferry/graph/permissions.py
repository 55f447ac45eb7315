"""Who may do what with a node: every user says what it needs and what it lets others do at the same time.

A change is tried first and undone whole when somebody objects, so a refusal leaves everything as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from blkferry.errors import Error, ErrorKind
from blkferry.plane.locks import ALL, Permission

if TYPE_CHECKING:
    from blkferry.graph.node import Node

__all__ = ["ALL", "Edge", "Permission", "User", "change"]

NONE = Permission(0)


class User(Protocol):
    """Who may stand at the upper end of an edge: a node, or the root that an export holds."""

    def describe(self) -> str:
        """For messages: "node 'top'", "export 'e1'"."""

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        """What earlier lookups said of a range of the child `role` may no longer be used; `end` None is its end."""


class Edge:
    """One use of a node: by another node, as its child `role`, or by a root."""

    __slots__ = ("node", "role", "shared", "used", "user")

    def __init__(self, user: User, node: Node, role: str) -> None:
        self.user = user
        self.node = node
        self.role = role
        self.used = NONE
        self.shared = ALL

    def describe(self) -> str:
        return f"{self.user.describe()} (uses node '{self.node.name}' as '{self.role}' child)"


async def change(edge: Edge, used: Permission, shared: Permission) -> None:
    """Give `edge` new permissions, and whatever follows from that further down.

    Raises Error(DENIED) when another user does not share what is needed, or needs what would not be shared, and
    Error(BUSY) when another process holds the image.
    """
    undo: list[tuple[Edge, Permission, Permission]] = []
    try:
        await _apply(edge, used, shared, undo)
    except BaseException:
        for changed, old_used, old_shared in reversed(undo):
            changed.used, changed.shared = old_used, old_shared
        for changed, _, _ in undo:
            await changed.node.permissions_changed(*cumulative(changed.node))
        raise


async def settle_children(node: Node) -> None:
    """Give the children of `node` the permissions it needs now: for a node that has just got them. Raises Error."""
    total_used, total_shared = cumulative(node)
    for child in list(node.children.values()):
        wanted = node.child_permissions(child.role, total_used, total_shared)
        if wanted != (child.used, child.shared):
            await change(child, *wanted)


async def _apply(
    edge: Edge, used: Permission, shared: Permission, undo: list[tuple[Edge, Permission, Permission]]
) -> None:
    node = edge.node
    undo.append((edge, edge.used, edge.shared))
    edge.used, edge.shared = used, shared
    _check(node, edge)
    total_used, total_shared = cumulative(node)
    await node.permissions_changed(total_used, total_shared)
    for child in node.children.values():
        child_used, child_shared = node.child_permissions(child.role, total_used, total_shared)
        if (child_used, child_shared) != (child.used, child.shared):
            await _apply(child, child_used, child_shared, undo)


def cumulative(node: Node) -> tuple[Permission, Permission]:
    """What all users of a node together need, and what all of them share."""
    used, shared = NONE, ALL
    for parent in node.parents:
        used |= parent.used
        shared &= parent.shared
    return used, shared


def _check(node: Node, edge: Edge) -> None:
    for other in node.parents:
        if other is edge:
            continue
        for asking, holding in ((edge, other), (other, edge)):
            conflict = asking.used & ~holding.shared
            if conflict:
                raise Error(
                    ErrorKind.DENIED,
                    f"Permission conflict on node '{node.name}': permissions '{conflict.label}' are both required by "
                    f"{asking.describe()} and unshared by {holding.describe()}.",
                    node=node.name,
                )
    if edge.used & (Permission.WRITE | Permission.RESIZE) and node.read_only:
        raise Error(ErrorKind.DENIED, f"Block node is read-only: '{node.name}'", node=node.name)
