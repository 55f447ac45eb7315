"""The dirty bitmaps that an export offers: how its options name them, and which may be offered.

While they are, nobody may remove or change them, but writes are recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import find_bitmap, find_bitmap_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blkferry.graph.bitmaps import DirtyBitmap
    from blkferry.graph.graph import Graph
    from blkferry.graph.node import Node
    from blkferry.schema.bitmap import BlockDirtyBitmapOrStr


def acquire_bitmaps(
    graph: Graph, node: Node, wanted: Sequence[BlockDirtyBitmapOrStr], user: str, *, writable: bool
) -> list[DirtyBitmap]:
    """Take the bitmaps for an export of `node` into use for `user`. Raises Error, and none is in use then."""
    acquired: list[DirtyBitmap] = []
    try:
        for name in wanted:
            if isinstance(name, str):
                bitmap = _in_chain(node, name, writable=writable)
            else:
                bitmap = _of_node(graph, name.node, name.name)
            bitmap.acquire(user)
            acquired.append(bitmap)
    except Error:
        release_bitmaps(acquired)
        raise
    return acquired


def release_bitmaps(bitmaps: Sequence[DirtyBitmap]) -> None:
    """End that use."""
    for bitmap in bitmaps:
        bitmap.release()


def _in_chain(node: Node, name: str, *, writable: bool) -> DirtyBitmap:
    """The bitmap of this name that is nearest to the export, in its node or the backing files."""
    found = find_bitmap_below(node, name)
    if found is None:
        known = ", ".join(node.dirty_bitmaps)
        raise Error(
            ErrorKind.NOT_FOUND,
            f"Bitmap '{name}' is not found",
            hint=f"Node '{node.name}' itself has: {known}." if known else f"Node '{node.name}' itself has no bitmaps.",
            node=node.name,
        )
    owner, bitmap = found
    if bitmap.enabled and not owner.read_only and not writable:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Enabled bitmap '{name}' incompatible with readonly export",
            hint=f"It would change under its reader: disable it, or name it as one of node '{owner.name}'.",
            node=owner.name,
        )
    return bitmap


def _of_node(graph: Graph, node_name: str, name: str) -> DirtyBitmap:
    node = graph.nodes.get(node_name)
    if node is None:
        raise Error(ErrorKind.NOT_FOUND, f"Node '{node_name}' not found", node=node_name)
    return find_bitmap(node, name)
