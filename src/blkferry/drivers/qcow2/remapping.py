"""Zeroes and discards: only L2 entries change, and what they pointed at is given up.

The rules are QEMU's, so that the same requests leave the same map: zeroes keep the space of a cluster unless the
request allows a hole; a discarded cluster reads as zeroes, not as what a backing file has there.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET, ZERO
from blkferry.extent import Content, Effort
from blkferry.graph import access
from blkferry.units import align_down, align_up

_ZERO_CHUNK = 1 << 20

if TYPE_CHECKING:
    from collections.abc import MutableSequence

    from blkferry.drivers.qcow2.node import Qcow2


class Remapping:
    """Zeroes and discards of one image."""

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self.metadata = node.metadata
        self.geometry = node.metadata.geometry

    async def zero(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Make a range read as zeroes. Raises OSError, with ENOTSUP where only writing them would do (and `fast`)."""
        node = self.node
        node.check_writable()
        if node.header.version < 3 and node.has_backing:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        end = start + length
        size = self.geometry.cluster_size
        async with node.ranges.hold(align_down(start, size), align_up(end, size)):
            node.mark_dirty_bitmaps(start, end)
            first, last = await self._units_to_zero(start, end)
            if fast and (first > start or last < end):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            if node.raw_data is not None and node.data_file is not None:
                await node.data_file.extend(end)
                await access.write_zeroes(node.raw_data, start, length, unmap=unmap)
            if first >= last:
                await self._write_zeroes(start, end)
                return
            await self._write_zeroes(start, first)
            at = first
            while at < last:
                async with node.changing():
                    at = await self._zero_some(at, last, unmap=unmap)
            await self._write_zeroes(last, end)

    async def _units_to_zero(self, start: int, end: int) -> tuple[int, int]:
        """Clusters (subclusters) that can be zeroed as a whole: those at the edges where the rest is zero anyway."""
        node, unit = self.node, self.geometry.unit
        first, last = align_down(start, unit), align_up(end, unit)
        if first < start and not await self.is_zero(first, start):
            first += unit
        if last > end and not await self.is_zero(end, min(last, node.length)):
            last -= unit
        return first, last

    async def is_zero(self, start: int, end: int) -> bool:
        """Whether a range reads as zeroes and nothing is stored for it."""
        while start < end:
            for run in await access.load_runs(self.node, start, end - start, Effort.ALLOCATION):
                stored = run.depth == 0 and run.node is not self.node  # a hole in the file, but a cluster of ours
                if run.content is not Content.ZERO or stored:
                    return False
                start += run.length
        return True

    async def _write_zeroes(self, start: int, end: int) -> None:
        while start < end:
            length = min(end - start, _ZERO_CHUNK)
            async with self.node.changing():
                await self.node.writing.write_held(start, memoryview(bytes(length)))
            start += length

    async def _zero_some(self, at: int, end: int, *, unmap: bool) -> int:
        """Zero clusters of one slice, or a part of one with subclusters; where to go on."""
        node, geometry = self.node, self.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        number, values = await node.writing.load_table(at)
        cluster = at >> bits
        if geometry.extended and (at & (size - 1) or end - at < size):
            return await self._zero_subclusters(at, min(end, (cluster + 1) << bits))
        stop = min(end >> bits, (cluster | geometry.slice_mask) + 1)
        for each in range(cluster, stop):
            index = (each & geometry.slice_mask) * geometry.words
            old = values[index]
            host = old & OFFSET
            gone = bool(old & COMPRESSED) or (unmap and bool(host) and not node.discard_no_unref)
            kept = 0 if gone else old
            if geometry.extended:
                self._set(number, values, index, kept, ALL_ZERO)
            elif geometry.has_zero_flag:
                self._set(number, values, index, kept | ZERO, None)
            else:  # version 2, and nothing below
                gone = bool(old & (COMPRESSED | OFFSET))
                self._set(number, values, index, 0, None)
            if gone:
                node.drop_entry(old)
        node.changed(cluster << bits, stop << bits)
        return stop << bits

    def _set(self, number: int, values: MutableSequence[int], index: int, entry: int, bitmap: int | None) -> None:
        values[index] = entry
        if bitmap is None:
            self.metadata.slices.touch(number, index, index + 1)
        else:
            values[index + 1] = bitmap
            self.metadata.slices.touch(number, index, index + 2)

    async def _zero_subclusters(self, at: int, end: int) -> int:
        """Zero a part of a cluster that has subclusters; a compressed one has none and is written."""
        node, geometry = self.node, self.geometry
        bits = geometry.cluster_bits
        number, values = await node.writing.load_table(at)
        index = ((at >> bits) & geometry.slice_mask) * 2
        entry, bitmap = values[index], values[index + 1]
        base = align_down(at, geometry.cluster_size)
        if entry & COMPRESSED:
            await node.writing.write_held(at, memoryview(bytes(end - at)))
            return end
        first = (at - base) >> geometry.unit_bits
        last = (end - base) >> geometry.unit_bits
        mask = (1 << last) - (1 << first)
        self._set(number, values, index, entry, (bitmap & ~mask) | mask << 32)
        node.changed(at, end)
        return end

    async def discard(self, start: int, length: int) -> None:
        """Give clusters back. Raises OSError."""
        node, geometry = self.node, self.geometry
        node.check_writable()
        if node.header.version < 3 and node.has_backing:
            return  # whatever shows through below would come back
        size = geometry.cluster_size
        end = start + length
        first = align_up(start, size)
        last = end if end == node.length else align_down(end, size)
        if first >= last:
            return
        last = align_up(last, size)
        async with node.ranges.hold(first, last):
            node.mark_dirty_bitmaps(first, min(last, node.length))
            at = first
            while at < last:
                async with node.changing():
                    at = await self._discard_some(at, last)
            if node.data_file is not None and node.pass_discard_request:
                there = min(last, node.length, node.data_file.length) - first
                if there > 0:
                    await access.discard(node.data_file.node, first, there)

    async def _discard_some(self, at: int, end: int) -> int:
        node, geometry, metadata = self.node, self.geometry, self.metadata
        bits = geometry.cluster_bits
        l1_index = geometry.l1_index(at)
        if not metadata.l1[l1_index] & OFFSET and not node.has_backing:  # nothing is there
            return min(end, (l1_index + 1) << (bits + geometry.table_bits))
        number, values = await node.writing.load_table(at)
        cluster = at >> bits
        stop = min(end >> bits, (cluster | geometry.slice_mask) + 1)
        for each in range(cluster, stop):
            index = (each & geometry.slice_mask) * geometry.words
            old = values[index]
            stored = old & (OFFSET | COMPRESSED) or old & COPIED
            if geometry.extended:
                if stored or node.has_backing:
                    self._set(number, values, index, 0, ALL_ZERO)
            elif stored or (node.has_backing and not old & ZERO):
                keeps = node.discard_no_unref and stored and not old & COMPRESSED
                entry = old | ZERO if keeps else ZERO
                self._set(number, values, index, entry if geometry.has_zero_flag else 0, None)
                if keeps:
                    continue
            if old & (OFFSET | COMPRESSED):
                node.drop_entry(old, discard=node.pass_discard_request)
        node.changed(cluster << bits, stop << bits)
        return stop << bits

    async def forget(self, start: int, end: int) -> None:
        """Unallocate whole clusters (the disk is being cut off there). Raises OSError. Nobody may use them any more."""
        node, geometry, metadata = self.node, self.geometry, self.metadata
        bits = geometry.cluster_bits
        at = start
        while at < end:
            l1_index = geometry.l1_index(at)
            if not metadata.l1[l1_index] & OFFSET:
                at = (l1_index + 1) << (bits + geometry.table_bits)
                continue
            number, values = await node.writing.load_table(at)
            cluster = at >> bits
            stop = min(end >> bits, (cluster | geometry.slice_mask) + 1)
            for each in range(cluster, stop):
                index = (each & geometry.slice_mask) * geometry.words
                old = values[index]
                if old or (geometry.extended and values[index + 1]):
                    self._set(number, values, index, 0, 0 if geometry.extended else None)
                    if old & (OFFSET | COMPRESSED):
                        node.drop_entry(old, discard=node.pass_discard_other)
            at = stop << bits
