"""Which layer of a backing chain each byte of a node comes from.

A layer is a node that can have a backing file. Any other node stands for the one below it, so a raw node between a
file and an export adds nothing; below a format, files do not matter.
"""

from __future__ import annotations

from typing import NamedTuple

from blkferry.extent import Content, Effort
from blkferry.graph.access import BACKING, Miss
from blkferry.graph.node import Node

NO_LAYER = 0
TOP_LAYER = 1


class Depth(NamedTuple):
    """`length` bytes that come from one layer: 1 is the top one, 2 its backing file, and so on; 0 is none of them."""

    length: int
    layer: int


async def depths(node: Node, start: int, length: int) -> list[Depth]:
    """Where bytes come from, from `start`, covering at most `length` bytes and at least one. Raises OSError."""
    while isinstance(found := _resolve(node, start, length), Miss):
        await found.load()
    return found


def _resolve(node: Node, start: int, length: int) -> list[Depth] | Miss:
    extents = node.lookup(start, length, Effort.PLACE)
    if extents is None:
        return Miss(node, start, length)
    found: list[Depth] = []
    for extent in extents:
        below: list[Depth] | Miss
        if extent.content is Content.BELOW:
            below = _resolve_backing(node, extent.start, extent.length)
        elif extent.child is not None and not node.supports_backing:
            below = _resolve(node.children[extent.child].node, extent.offset, extent.length)
        else:
            found.append(Depth(extent.length, TOP_LAYER))
            continue
        if isinstance(below, Miss):
            return found or below
        found += below
        if sum(depth.length for depth in below) < extent.length:
            break  # what is below did not answer for all of it
    return found


def _resolve_backing(node: Node, start: int, length: int) -> list[Depth] | Miss:
    """What shows through from the backing child. The zeroes behind the end of that one count as its own."""
    edge = node.children.get(BACKING)
    if edge is None:
        return [Depth(length, NO_LAYER)]
    available = edge.node.length - start
    if available <= 0:
        return [Depth(length, TOP_LAYER + 1)]
    below = _resolve(edge.node, start, min(length, available))
    if isinstance(below, Miss):
        return below
    return [depth._replace(layer=depth.layer + 1) if depth.layer else depth for depth in below]
