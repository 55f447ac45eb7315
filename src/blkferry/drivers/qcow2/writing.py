"""Writes that need clusters: space first, then the bytes, and the L2 entry last.

A write is cut into segments: adjacent guest clusters that are treated alike and get adjacent host clusters. Where a
segment covers a cluster (or subcluster) only in part, what the guest sees in the rest of it goes along. `write_now`
does what needs no waiting in one go; `write` does everything, and holds the clusters it works on meanwhile, so that two
writes to the same new cluster go one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET, ZERO, CompressedPlace
from blkferry.drivers.qcow2.refcounts import MISSING
from blkferry.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import MutableSequence

    from blkferry.drivers.qcow2.node import Qcow2

MAX_SEGMENT = 2 << 20
"""A segment that has to wait is written from one piece of memory, at most so long (or one cluster)."""


class Segment(NamedTuple):
    """`clusters` guest clusters from `cluster`. `host` is where their bytes go, None where space has to be taken.

    `keeps`: entries stay as they are, for all of the range is allocated there already.
    """

    cluster: int
    clusters: int
    host: int | None
    keeps: bool


class Writing:
    """The writes of one image."""

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self.metadata = node.metadata
        self.geometry = node.metadata.geometry

    # At once ---------------------------------------------------------------------------------------------------

    def write_now(self, start: int, view: memoryview) -> bool:
        """Write within the turn; False when that is impossible, with perhaps a part of it done."""
        node, geometry = self.node, self.geometry
        end = start + len(view)
        if not node.writes_at_once or self.metadata.crowded:
            return False
        mask = geometry.cluster_size - 1
        if node.ranges.busy(start & ~mask, (end + mask) & ~mask):
            return False
        at = start
        while at < end:
            done = self._segment_now(at, end, view[at - start :])
            if not done:
                return False
            at += done
        return True

    def _segment_now(self, at: int, end: int, view: memoryview) -> int:
        """Write the first segment; how many bytes that was, 0 when it cannot be done now."""
        metadata, geometry, node = self.metadata, self.geometry, self.node
        number = at >> geometry.slice_shift
        l1_index = geometry.l1_index(at)
        if not metadata.owns_table(l1_index) and (
            metadata.l1[l1_index] & OFFSET or not metadata.new_table_now(l1_index, number)
        ):
            return 0
        table = metadata.slices.get(number)
        if table is None:
            return 0
        values = table.values
        bits = geometry.cluster_bits
        index = (at >> bits) & geometry.slice_mask
        if not values[index] and not node.mapper.fixed and (done := self._new_cluster(number, values, index, at, view)):
            return done
        segment = self._segment(values, at, end)
        low, high = segment.cluster << bits, min((segment.cluster + segment.clusters) << bits, end)
        if segment.keeps:
            assert segment.host is not None
            if not node.put_guest_now(segment.host + at - low, view[: high - at]):
                return 0
            node.file_may_have_grown()
            return high - at
        head, tail = at - low, -high & (geometry.cluster_size - 1)
        if (head and not self._reads_zero(values, low, at)) or (
            tail and not self._reads_zero(values, high, high + tail)
        ):
            return 0
        if segment.host is not None:
            if not node.put_guest_now(segment.host, _padded(head, view[: high - low - head], tail)):
                return 0
            self._link(number, values, segment, segment.host)
            return high - at
        taken = metadata.refcounts.take(segment.clusters)
        if taken is MISSING:
            return 0
        first, count = taken
        if count < segment.clusters:
            segment = segment._replace(clusters=count)
            high, tail = (segment.cluster + count) << bits, 0
        host = first << bits
        done = False
        try:
            metadata.check_free(host, count << bits)
            data = view[: high - at]
            if host >= metadata.file.needed:
                # New space reads as zeroes: only the bytes themselves have to be written.
                done = metadata.file.extend_now(host + (count << bits)) and node.put_guest_now(host + head, data)
            else:
                done = node.put_guest_now(host, _padded(head, data, tail))
        finally:
            if not done:
                metadata.refcounts.give_back(first, count)
        if not done:
            return 0
        self._link(number, values, segment, host)
        return high - at

    def _new_cluster(self, number: int, values: MutableSequence[int], index: int, at: int, view: memoryview) -> int:
        """Write what lies in one cluster that has nothing yet, in the commonest case; how many bytes that was, or 0.

        It does what the general way does, for one cluster that goes where the file has never been used.
        """
        node, metadata, geometry = self.node, self.metadata, self.geometry
        size = geometry.cluster_size
        head = at & (size - 1)
        length = min(len(view), size - head)
        if length != size and node.backing_length() > at - head:
            return 0
        refcounts, file = metadata.refcounts, metadata.file
        first = refcounts.take_one()
        host = first << geometry.cluster_bits
        place = file.place()
        if first in metadata.known or host < file.needed or place is None or not file.extend_now(host + size):
            if first:
                refcounts.give_back(first, 1)
            return 0
        storage, shift = place
        try:
            storage.write_now(view[:length], host + head + shift)
        except OSError:
            refcounts.give_back(first, 1)
            raise
        values[index] = host | COPIED
        metadata.slices.touch(number, index, index + 1)
        node.changed(at - head, at - head + size)
        return length

    def _segment(self, values: MutableSequence[int], at: int, end: int) -> Segment:
        """The first segment of a range; of standard entries only."""
        geometry, mapper = self.geometry, self.node.mapper
        bits, size = geometry.cluster_bits, geometry.cluster_size
        cluster = at >> bits
        index = cluster & geometry.slice_mask
        most = min((end - 1) >> bits, cluster | geometry.slice_mask) - cluster + 1
        entry = values[index]
        host = self._own_host(entry, cluster)
        count = 1
        if host is None:
            while count < most and self._own_host(values[index + count], cluster + count) is None:
                count += 1
            return Segment(cluster, count, cluster << bits if mapper.fixed else None, keeps=False)
        keeps = not (entry & ZERO and geometry.has_zero_flag)
        while count < most and values[index + count] == entry + count * size:
            if self._own_host(values[index + count], cluster + count) is None:
                break
            count += 1
        return Segment(cluster, count, host, keeps)

    def _own_host(self, entry: int, cluster: int) -> int | None:
        """The place of a cluster's bytes if it has one that nobody shares; raises CorruptError if that cannot be."""
        if not entry & COPIED or entry & COMPRESSED:
            return None
        host = entry & OFFSET
        if not host and not self.node.mapper.fixed:
            return None
        self.node.check_guest_place(host, cluster)
        return host

    def _reads_zero(self, values: MutableSequence[int], start: int, end: int) -> bool:
        """Whether a part of one cluster reads as zeroes, as far as that can be told from its entry."""
        entry = values[(start >> self.geometry.cluster_bits) & self.geometry.slice_mask]
        if entry & ZERO and self.geometry.has_zero_flag and not entry & COMPRESSED:
            return True
        if entry & (OFFSET | COMPRESSED | COPIED):
            return False
        return self.node.backing_length() <= start or start >= end

    def _link(self, number: int, values: MutableSequence[int], segment: Segment, host: int) -> None:
        """Let standard entries point at the bytes that are in place now, and drop what they pointed at before."""
        geometry, metadata = self.geometry, self.metadata
        size = geometry.cluster_size
        index = segment.cluster & geometry.slice_mask
        for place in range(index, index + segment.clusters):
            old = values[place]
            values[place] = host | COPIED
            if old & (OFFSET | COMPRESSED) and old & OFFSET != host:
                self.node.drop_entry(old)
            host += size
        metadata.slices.touch(number, index, index + segment.clusters)
        start = segment.cluster << geometry.cluster_bits
        self.node.changed(start, start + (segment.clusters << geometry.cluster_bits))

    # However long it takes -------------------------------------------------------------------------------------

    async def write(self, start: int, view: memoryview) -> None:
        """Write whatever it takes. Raises OSError."""
        node = self.node
        node.check_writable()
        end = start + len(view)
        size = self.geometry.cluster_size
        async with node.ranges.hold(align_down(start, size), align_up(end, size)):
            node.mark_dirty_bitmaps(start, end)
            at = start
            while at < end:
                async with node.changing():
                    at += await self._some(at, end, view[at - start :])

    async def write_held(self, start: int, view: memoryview) -> None:
        """`write` for those who hold the clusters and count as changing already. Raises OSError."""
        at, end = start, start + len(view)
        while at < end:
            at += await self._some(at, end, view[at - start :])

    async def load_table(self, at: int) -> tuple[int, MutableSequence[int]]:
        """The slice that describes an offset, in an L2 table of our own; its number and its values. Raises OSError."""
        metadata = self.metadata
        number = at >> self.geometry.slice_shift
        l1_index = self.geometry.l1_index(at)
        while True:
            if metadata.crowded:
                await metadata.commit()
            elif not metadata.owns_table(l1_index):
                await metadata.own_table(l1_index)
            elif (table := metadata.slices.get(number)) is None:
                await metadata.load_slice(number)
            else:
                table.used = True
                return number, table.values

    async def _some(self, at: int, end: int, view: memoryview) -> int:
        """Write the first segment; how many bytes that was."""
        node, geometry, metadata = self.node, self.geometry, self.metadata
        number, values = await self.load_table(at)
        if geometry.extended:
            return await self._some_subclusters(at, end, view)
        if node.writes_at_once and (done := self._segment_now(at, end, view)):
            return done
        bits, size = geometry.cluster_bits, geometry.cluster_size
        end = min(end, align_down(at, size) + max(MAX_SEGMENT, size))
        segment = self._segment(values, at, end)
        if segment.keeps:
            assert segment.host is not None
            stop = min(end, (segment.cluster + segment.clusters) << bits)
            await node.put_guest(at, segment.host + at - (segment.cluster << bits), view[: stop - at])
            node.file_may_have_grown()
            return stop - at
        host, count = segment.host, segment.clusters
        if host is None:
            first, count = await metadata.take(count)
            host = first << bits
        segment = segment._replace(clusters=count)
        low, high = segment.cluster << bits, (segment.cluster + count) << bits
        stop = min(end, high)
        try:
            if segment.host is None:
                metadata.check_free(host, count << bits)
                await metadata.file.extend(host + (count << bits))
            await self._fill(host, low, at, view[: stop - at], min(high, align_up(stop, size)))
            number, values = await self.load_table(at)
        except BaseException:
            if segment.host is None:
                await metadata.refcounts.adjust(host >> bits, count, -1)
            raise
        self._link(number, values, segment, host)
        return stop - at

    async def _fill(self, host: int, low: int, at: int, view: memoryview, high: int) -> None:
        """Put the guest range from `low` to `high` at `host`: `view` from `at` on, the rest as the guest sees it."""
        node = self.node
        stop = at + len(view)
        if at > low or high > stop:
            whole = memoryview(bytearray(high - low))
            if at > low:
                await node.read_guest(low, whole[: at - low])
            whole[at - low : stop - low] = view
            if high > stop:
                await node.read_guest(stop, whole[stop - low :])
            view = whole
        await node.put_guest(low, host, view)

    # Subclusters -----------------------------------------------------------------------------------------------

    async def _some_subclusters(self, at: int, end: int, view: memoryview) -> int:
        """Write what lies in the first cluster, where subclusters are allocated on their own."""
        node, geometry, metadata = self.node, self.geometry, self.metadata
        bits, size, unit = geometry.cluster_bits, geometry.cluster_size, geometry.unit
        cluster = at >> bits
        base = cluster << bits
        end = min(end, base + size)
        number, values = await self.load_table(at)
        index = (cluster & geometry.slice_mask) * 2
        entry, bitmap = values[index], values[index + 1]
        allocated = 0 if entry & COMPRESSED else bitmap & ALL_ALLOCATED
        low, high = align_down(at, unit), align_up(end, unit)
        host = self._own_host(entry, cluster)
        taken = host is None and not node.mapper.fixed
        if taken:
            if entry & COMPRESSED:
                low, high = base, base + size
            elif allocated:  # what was copied on write goes along, and with it what lies between
                low = min(low, base + ((allocated & -allocated).bit_length() - 1) * unit)
                high = max(high, base + allocated.bit_length() * unit)
            host = (await metadata.take(1))[0] << bits
        elif host is None:
            host = base
        elif _bits(at, end, base, geometry.unit_bits) & ~allocated == 0:
            await node.put_guest(at, host + at - base, view[: end - at])
            node.file_may_have_grown()
            return end - at
        else:  # only the subclusters at the edges that are not there yet are filled up
            low = at if allocated >> ((at - base) >> geometry.unit_bits) & 1 else low
            high = end if allocated >> ((end - 1 - base) >> geometry.unit_bits) & 1 else high
        try:
            if taken:
                metadata.check_free(host, size)
                await metadata.file.extend(host + size)
            await self._fill(host + low - base, low, at, view[: end - at], high)
            number, values = await self.load_table(at)
        except BaseException:
            if taken:
                await metadata.refcounts.adjust(host >> bits, 1, -1)
            raise
        written = _bits(low, high, base, geometry.unit_bits)
        kept = bitmap if not entry & COMPRESSED else 0
        values[index] = host | COPIED
        values[index + 1] = (kept | written) & ~(written << 32)
        if entry & (OFFSET | COMPRESSED) and entry & OFFSET != host:
            node.drop_entry(entry)
        metadata.slices.touch(number, index, index + 2)
        node.changed(base, base + size)
        return end - at

    # Compressed ------------------------------------------------------------------------------------------------

    async def write_compressed(self, start: int, data: bytes) -> None:
        """Store the compressed bytes of the whole cluster at `start`. Raises OSError."""
        node, geometry, metadata = self.node, self.geometry, self.metadata
        node.check_writable()
        size = geometry.cluster_size
        async with node.ranges.hold(start, start + size), node.changing():
            node.mark_dirty_bitmaps(start, start + size)
            offset = await node.compressed_space.take(len(data))
            try:
                await metadata.file.put(offset, data)
                number, values = await self.load_table(start)
            except BaseException:
                await node.compressed_space.give_back(offset, len(data))
                raise
            index = ((start >> geometry.cluster_bits) & geometry.slice_mask) * geometry.words
            old = values[index]
            values[index] = geometry.compressed_entry(CompressedPlace(offset, len(data)))
            if geometry.extended:
                values[index + 1] = 0
            if old & (OFFSET | COMPRESSED):
                node.drop_entry(old)
            metadata.slices.touch(number, index, index + geometry.words)
            node.changed(start, start + size)


def _bits(start: int, end: int, base: int, unit_bits: int) -> int:
    """The allocation bits of the subclusters that a range of the cluster at `base` touches."""
    first = (start - base) >> unit_bits
    last = (end - 1 - base) >> unit_bits
    return (1 << (last + 1)) - (1 << first)


def _padded(head: int, view: memoryview, tail: int) -> memoryview:
    if not head and not tail:
        return view
    return memoryview(b"".join((bytes(head), view, bytes(tail))))
