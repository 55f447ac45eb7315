"""The meta contexts of an NBD export: which there are, and what BLOCK_STATUS says in each.

Ids are part of the contract: 0 and 1 for allocation and its depth, from 2 on the bitmaps in the order of the options.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING

from blkferry.exports.nbd.limits import MAX_STATUS_LOOKS
from blkferry.extent import MAX_EXTENTS
from blkferry.graph.layers import depths
from blkferry.wire.nbd.constants import (
    CONTEXT_ALLOCATION_DEPTH,
    CONTEXT_BASE_ALLOCATION,
    CONTEXT_DIRTY_BITMAP,
    DirtyFlag,
    StatusFlag,
)
from blkferry.wire.nbd.transmission import merge_extents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blkferry.extent import Status
    from blkferry.graph.bitmaps import DirtyBitmap
    from blkferry.graph.root import Root

_GRANULES_AT_ONCE = 8 << 20
"""What of a bitmap is looked at in one go: 1 MiB of it, which takes about as long as an answer with many extents."""

StatusExtent = tuple[int, int]
"""Length in bytes, and what the context says of so many."""


class Contexts:
    """The contexts of one export. `offered` are their (id, name) pairs, in the order replies have them."""

    def __init__(self, root: Root, bitmaps: Sequence[DirtyBitmap], *, allocation_depth: bool) -> None:
        self._root = root
        self._bitmaps = bitmaps
        self.offered: tuple[tuple[int, str], ...] = ((CONTEXT_BASE_ALLOCATION, "base:allocation"),)
        if allocation_depth:
            self.offered += ((CONTEXT_ALLOCATION_DEPTH, "qemu:allocation-depth"),)
        self.offered += tuple(
            (number, f"qemu:dirty-bitmap:{bitmap.name}") for number, bitmap in enumerate(bitmaps, CONTEXT_DIRTY_BITMAP)
        )

    async def extents(self, context: int, start: int, length: int, limit: int) -> list[StatusExtent]:
        """What a context says from `start`: of at least one byte and `length` at most, in `limit` extents at most.

        Raises OSError. However much there is to say, it takes the loop a few milliseconds, in several pieces.
        """
        found: list[StatusExtent] = []
        at, end = start, start + length
        for _ in range(MAX_STATUS_LOOKS):
            if found:
                await asyncio.sleep(0)
            piece = await self._look(context, at, end - at)
            found += piece
            at += sum(extent_length for extent_length, _ in piece)
            if at >= end or len(found) >= limit:
                break
        return merge_extents(found, length=length, limit=limit)

    async def _look(self, context: int, start: int, length: int) -> list[StatusExtent]:
        """As much of that as is at hand, with a bounded number of extents."""
        if context == CONTEXT_BASE_ALLOCATION:
            return [(each.length, _status_flags(each)) for each in await self._root.status(start, length)]
        if context == CONTEXT_ALLOCATION_DEPTH:
            return [(each.length, each.layer) for each in await depths(self._root.node, start, length)]
        return _dirtiness(self._bitmaps[context - CONTEXT_DIRTY_BITMAP], start, length)


def _status_flags(stretch: Status) -> int:
    flags = 0
    if stretch.zero:
        flags |= StatusFlag.ZERO
    if not stretch.allocated:
        flags |= StatusFlag.HOLE
    return flags


def _dirtiness(bitmap: DirtyBitmap, start: int, length: int) -> list[StatusExtent]:
    """What a bitmap says of a range of the export, which may be longer than the node that the bitmap is of."""
    if start >= bitmap.size:
        return [(length, 0)]
    end = min(start + length, bitmap.size, start + (_GRANULES_AT_ONCE << bitmap.granularity_bits))
    runs = islice(bitmap.runs(start, end), MAX_EXTENTS)
    return [(run_length, DirtyFlag.DIRTY if is_dirty else 0) for run_length, is_dirty in runs]
