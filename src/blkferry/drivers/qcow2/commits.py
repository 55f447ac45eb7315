"""What one commit writes: copies of everything that is dirty at one instant (see `metadata`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.tables import TableCache
from blkferry.drivers.qcow2.words import big_endian

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.metadata import Metadata
    from blkferry.drivers.qcow2.refcounts import Refcounts


class Writes:
    """What one commit writes: copies taken at one instant, after which everything counts as clean."""

    def __init__(self, metadata: Metadata, with_refcounts: bool) -> None:
        self._metadata = metadata
        refcounts, slices = metadata.refcounts, metadata.slices
        self.fresh_blocks: list[tuple[int, bytes]] = []
        self.blocks: list[tuple[int, bytes]] = []
        self.table_entries: list[tuple[int, bytes]] = []
        self._cleaned: list[tuple[TableCache, int, int, int, bool]] = []
        self._entries: set[int] = set()
        if with_refcounts:
            self._take_refcounts(refcounts)
        self.tables: list[tuple[int, bytes]] = []
        for number, table in slices.take_dirty():
            low, high = table.low, table.high
            self.tables.append((table.host + 8 * low, big_endian(table.values[low:high])))  # type: ignore[arg-type]
            self._cleaned.append((slices, number, low, high, False))
            table.clean()
        self._l1, metadata.l1_dirty = metadata.l1_dirty, set()
        base = metadata.header.l1_table_offset
        self.l1_entries = [(base + 8 * index, metadata.l1[index].to_bytes(8, "big")) for index in sorted(self._l1)]

    def _take_refcounts(self, refcounts: Refcounts) -> None:
        for number, block in refcounts.blocks.take_dirty():
            low, high, fresh = block.low, block.high, block.fresh
            if fresh:
                self.fresh_blocks.append((block.host, refcounts.codec.dump(block.values)))
            else:
                # Whole bytes, and for the narrow widths that means whole groups of entries.
                group = max(8 >> refcounts.codec.order, 1)
                start, end = low - low % group, high + -high % group
                data = refcounts.codec.dump(block.values[start:end])
                self.blocks.append((block.host + (start << refcounts.codec.order >> 3), data))
            self._cleaned.append((refcounts.blocks, number, low, high, fresh))
            block.clean()
        self._entries, refcounts.dirty_entries = refcounts.dirty_entries, set()
        base = self._metadata.header.refcount_table_offset
        self.table_entries = [
            (base + 8 * index, refcounts.table[index].to_bytes(8, "big")) for index in sorted(self._entries)
        ]

    @property
    def any(self) -> bool:
        return bool(self.fresh_blocks or self.blocks or self.table_entries or self.tables or self.l1_entries)

    def undo(self) -> None:
        """Not all of it was written: all of it is dirty again."""
        for cache, number, low, high, fresh in self._cleaned:
            table = cache.get(number)
            if table is None:
                continue
            cache.touch(number, low, high)
            table.fresh = table.fresh or fresh
        self._metadata.refcounts.dirty_entries |= self._entries
        self._metadata.l1_dirty |= self._l1
