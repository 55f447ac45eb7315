"""The metadata of one open image, and the order in which it reaches the disk.

Theory of operation. Every change happens in memory first: L1 entries, slices of L2 tables, refcounts. The file holds an
older state that is whole by itself. A commit takes a copy of everything that is dirty at one instant and writes it so
that a crash between any two steps leaves nothing worse than clusters that are counted but not used:

1. refcount blocks that are not on disk yet, then a flush;
2. entries of the refcount table and refcounts, which only ever grow here, then a flush; this one also covers the data
   that was written before the commit began, and whole new L2 tables;
3. L2 and L1 entries, which point only at what steps 1 and 2 made durable, then a flush;
4. only now are the clusters that nothing points at any more counted down (see `reclaiming`), and their lower counts
   are part of the next commit.

So a cluster is never reused while the disk, or a reader, may still take it for what it was. Step 1 is needed once every
few GiB. With lazy refcounts steps 1 and 2 wait for the image to be closed, and the dirty bit says so meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
from array import array
from collections.abc import MutableSequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blkferry.drivers.qcow2.commits import Writes
from blkferry.drivers.qcow2.entries import COPIED, OFFSET, Geometry
from blkferry.drivers.qcow2.header import Header, Incompatible
from blkferry.drivers.qcow2.reclaiming import Reclaiming
from blkferry.drivers.qcow2.refcounts import MAX_TABLE_BYTES, MISSING, Refcounts
from blkferry.drivers.qcow2.tables import Table, TableCache
from blkferry.drivers.qcow2.words import CorruptError, big_endian, from_big_endian
from blkferry.graph import access

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.hostfile import HostFile
    from blkferry.plane.services import Services

log = logging.getLogger(__name__)

MAX_HOST_OFFSET = 1 << 56

_FIXED_FIELDS = struct.Struct(">QIIQQIIQ")
_FIXED_FIELDS_AT = 24
"""From `size` to `snapshots_offset`; in version 3 the three words of features follow."""


class Metadata:
    """What is known of an image. Plain calls work on memory only; nothing here knows guest data.

    `on_corrupt` is called when a structure turns out to be wrong in a way that makes writing unsafe.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        geometry: Geometry,
        l1: array[int],
        refcounts: Refcounts,
        slices: TableCache,
        services: Services,
    ) -> None:
        self.file = file
        self.data_file: HostFile | None = None
        self.header = header
        self.geometry = geometry
        self.l1 = l1
        self.refcounts = refcounts
        self.slices = slices
        self.services = services
        self.writable = False
        self.lazy = False
        self.unclean = False
        """Something went wrong half-way: the dirty bit stays, for whoever opens the image next to repair it."""
        self.l1_dirty: set[int] = set()
        self.reclaiming = Reclaiming(file, refcounts, services, self.commit)
        self._loading: dict[int, asyncio.Future[None]] = {}
        self.known: dict[int, str] = {}
        """Host clusters that hold metadata, by index: no guest data may ever be written there."""
        self.guards_snapshots = False
        """Whether the L2 tables of snapshots are among them (overlap-check=all)."""
        self._new_locks()

    def _new_locks(self) -> None:
        self._committing = asyncio.Lock()
        self._header_changing = asyncio.Lock()
        self.structure = asyncio.Lock()
        """Held while tables are added, moved or shared out; taken before `_committing`."""

    def move(self, services: Services) -> None:
        """Live on another loop; `pause` has been awaited on the old one."""
        self.services = services
        self._new_locks()
        self.reclaiming.move(services)

    def know(self, offset: int, length: int, name: str) -> None:
        """Note that a range of the file holds metadata."""
        first = offset >> self.geometry.cluster_bits
        for cluster in range(first, first + self.geometry.clusters(length)):
            self.known[cluster] = name

    def know_inactive_tables(self, l1: MutableSequence[int]) -> None:
        """These are L2 tables of a snapshot, where they are not active ones as well."""
        for entry in l1:
            if entry & OFFSET:
                self.known.setdefault((entry & OFFSET) >> self.geometry.cluster_bits, "inactive L2 table")

    def know_tables(self, old: MutableSequence[int], new: MutableSequence[int]) -> None:
        """The active L2 tables are those that `new` names now, no longer those of `old`."""
        for entry in old:
            self.known.pop((entry & OFFSET) >> self.geometry.cluster_bits, None)
        for entry in new:
            if entry & OFFSET:
                self.know(entry & OFFSET, 1, "active L2 table")

    # L2 slices -------------------------------------------------------------------------------------------------

    def slice_host(self, number: int) -> int:
        """Where a slice is in the file; 0 when there is no L2 table for it. Raises OSError for an impossible place."""
        l1_index = number >> self.geometry.slices_per_table_bits
        table = self.l1[l1_index] & OFFSET
        if not table:
            return 0
        if table & (self.geometry.cluster_size - 1) or table >= self.file.length:
            raise CorruptError(f"L2 table {l1_index} cannot be at {table:#x}", table)
        within = number & ((1 << self.geometry.slices_per_table_bits) - 1)
        return table + within * self.geometry.slice_bytes

    async def load_slice(self, number: int) -> None:
        """Bring a slice into the cache. Raises OSError."""
        if (running := self._loading.get(number)) is not None:
            await asyncio.shield(running)
            return
        host = self.slice_host(number)
        if not host or self.slices.get(number) is not None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[number] = done
        try:
            data = await self.file.get(host, self.geometry.slice_bytes)
            if self.slices.get(number) is None and self.slice_host(number) == host:
                self.slices.add(number, Table(host, from_big_endian(data)))
        finally:
            del self._loading[number]
            done.set_result(None)

    def owns_table(self, l1_index: int) -> bool:
        """Whether the L2 table is there and nobody shares it: its entries may be changed."""
        entry = self.l1[l1_index]
        return bool(entry & COPIED and entry & OFFSET)

    def new_table_now(self, l1_index: int, number: int) -> bool:
        """Add an empty L2 table, with slice `number` of it in the cache; False when it cannot be done at once."""
        taken = self.refcounts.take(1)
        if taken is MISSING:
            return False
        offset = taken[0] << self.geometry.cluster_bits
        try:
            empty = self._empty_now(offset)
        except BaseException:
            self.refcounts.give_back(*taken)
            raise
        if not empty:
            self.refcounts.give_back(*taken)
            return False
        self._link_table(l1_index, offset)
        within = number & ((1 << self.geometry.slices_per_table_bits) - 1)
        values = array("Q", bytes(self.geometry.slice_bytes))
        self.slices.add(number, Table(offset + within * self.geometry.slice_bytes, values))
        return True

    def _empty_now(self, offset: int) -> bool:
        """Have a free cluster read as zeroes."""
        size = self.geometry.cluster_size
        self.check_free(offset, size)
        if offset >= self.file.needed:
            return self.file.extend_now(offset + size)
        return access.write_now(self.file.node, offset, memoryview(bytes(size)))

    def _link_table(self, l1_index: int, offset: int) -> None:
        self.l1[l1_index] = offset | COPIED
        self.l1_dirty.add(l1_index)
        self.know(offset, 1, "active L2 table")

    async def own_table(self, l1_index: int) -> None:
        """Make sure that there is an L2 table which nobody shares. Raises OSError."""
        async with self.structure:
            if self.owns_table(l1_index):
                return
            geometry = self.geometry
            old = self.l1[l1_index] & OFFSET
            first_slice = l1_index << geometry.slices_per_table_bits
            offset = (await self.take_locked(1))[0] << geometry.cluster_bits
            try:
                self.check_free(offset, geometry.cluster_size)
                content = bytearray(geometry.cluster_size)
                if old:
                    self.slice_host(first_slice)  # refuses an impossible place
                    content = await self.file.get(old, geometry.cluster_size)
                    for within in range(1 << geometry.slices_per_table_bits):
                        table = self.slices.get(first_slice + within)
                        if table is not None and table.dirty:
                            at = within * geometry.slice_bytes
                            content[at : at + geometry.slice_bytes] = big_endian(table.values)  # type: ignore[arg-type]
                await self.file.put(offset, content)
            except BaseException:
                await self.refcounts.adjust(offset >> geometry.cluster_bits, 1, -1)
                raise
            for within in range(1 << geometry.slices_per_table_bits):
                table = self.slices.get(first_slice + within)
                if table is not None:
                    table.host = offset + within * geometry.slice_bytes
            self._link_table(l1_index, offset)
            if old:
                self.known.pop(old >> geometry.cluster_bits, None)
                if self.guards_snapshots:  # a snapshot has it still
                    self.know(old, 1, "inactive L2 table")
                self.drop(old >> geometry.cluster_bits, 1, discard=False)

    def l1_changed(self, l1_index: int) -> None:
        self.l1_dirty.add(l1_index)

    # Space -----------------------------------------------------------------------------------------------------

    async def take(self, wanted: int) -> tuple[int, int]:
        """Take up to `wanted` adjacent free clusters: the first one and how many. Raises OSError."""
        async with self.structure:
            return await self.take_locked(wanted)

    async def take_locked(self, wanted: int) -> tuple[int, int]:
        """`take` for those who hold `structure`."""
        while (taken := self.refcounts.take(wanted)) is MISSING:
            await self._make_room()
        if taken[0] + taken[1] > MAX_HOST_OFFSET >> self.geometry.cluster_bits:
            self.refcounts.give_back(*taken)
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return taken

    async def take_exactly(self, wanted: int) -> int:
        """Take `wanted` adjacent free clusters; the first one. For those who hold `structure`. Raises OSError."""
        start = self.refcounts.hint
        parts: list[tuple[int, int]] = []
        try:
            while True:
                first, count = await self.take_locked(wanted - sum(part[1] for part in parts))
                if parts and first != parts[-1][0] + parts[-1][1]:
                    for part in parts:
                        await self.refcounts.adjust(*part, -1)
                    self.refcounts.hint = first + count
                    parts.clear()
                    if count < wanted:
                        parts.append((first, count))
                        continue
                parts.append((first, count))
                if sum(part[1] for part in parts) >= wanted:
                    return parts[0][0]
        finally:
            self.refcounts.hint = min(self.refcounts.hint, start)

    async def place_table(self, data: bytes) -> int:
        """Put a table into adjacent clusters of its own; where that is. Raises OSError.

        An empty one takes none, and is said to be in the second cluster: it must not be in the header's.
        """
        size = self.geometry.cluster_size
        if not data:
            return size
        async with self.structure:
            first = await self.take_exactly(self.geometry.clusters(len(data)))
        offset = first << self.geometry.cluster_bits
        self.check_free(offset, len(data))
        await self.file.put(offset, data + bytes(-len(data) % size))
        return offset

    async def make_room(self) -> None:
        """Do what a plain `take` was missing. Raises OSError."""
        async with self.structure:
            await self._make_room()

    async def _make_room(self) -> None:
        refcounts = self.refcounts
        number = refcounts.hint // refcounts.per_block
        if refcounts.blocks.get(number) is not None:
            return
        if refcounts.block_offset(number):
            await refcounts.load(number)
        elif number < len(refcounts.table):
            offset = number * refcounts.per_block << self.geometry.cluster_bits
            self.check_free(offset, self.geometry.cluster_size)
            await self.file.extend(offset + self.geometry.cluster_size)
            refcounts.add_block(number, offset)
            self.know(offset, 1, "refcount block")
        else:
            await self._grow_refcount_table(number)

    async def _grow_refcount_table(self, number: int) -> None:
        """Move the refcount table to a larger place, in the first clusters that no block describes yet."""
        bits, per_block = self.geometry.cluster_bits, self.refcounts.per_block
        old_offset, old_clusters = self.header.refcount_table_offset, self.header.refcount_table_clusters
        first = number * per_block
        clusters = self.geometry.clusters(max(len(self.refcounts.table) * 12, (number + 2) * 8))
        blocks = -(-clusters // (per_block - 1))
        while (number + blocks) * 8 > clusters << bits or clusters + blocks > blocks * per_block:
            clusters += 1
            blocks = -(-(clusters + blocks) // per_block)
        if clusters << bits > MAX_TABLE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.check_free(first << bits, (clusters + blocks) << bits)
        await self.commit()
        table = array("Q", self.refcounts.table)
        table.frombytes(bytes((clusters << bits) - 8 * len(table)))
        used = clusters + blocks
        for index in range(blocks):
            counts = self.refcounts.codec.new(per_block)
            for entry in range(min(per_block, used - index * per_block)):
                counts[entry] = 1
            offset = (first + clusters + index) << bits
            await self.file.put(offset, self.refcounts.codec.dump(counts))
            table[number + index] = offset
        await self.file.put(first << bits, big_endian(table))
        await self.file.node.flush()
        await self.change_header(refcount_table_offset=first << bits, refcount_table_clusters=clusters)
        self.refcounts.table = table
        self.know(first << bits, clusters << bits, "refcount table")
        self.know((first + clusters) << bits, blocks << bits, "refcount block")
        for cluster in range(old_offset >> bits, (old_offset >> bits) + old_clusters):
            self.known.pop(cluster, None)
        self.drop(old_offset >> bits, old_clusters, discard=False)

    def check_free(self, offset: int, length: int) -> None:
        """Refuse to use clusters that are said to be free and cannot be. Raises CorruptError."""
        first = offset >> self.geometry.cluster_bits
        for cluster in range(first, first + self.geometry.clusters(length)):
            name = "header" if not cluster else self.known.get(cluster)
            if name is not None:
                at = cluster << self.geometry.cluster_bits
                raise CorruptError(f"Preventing invalid allocation at offset {at:#x}: it is the {name}", at)

    def drop(self, first: int, count: int, *, discard: bool) -> None:
        """Nothing in memory refers to these clusters any more: count them down when the disk agrees."""
        self.reclaiming.drop(first, count, discard=discard)

    # Writing it all down ---------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether the file does not yet say what memory says."""
        refcounts = self.refcounts
        return bool(
            self.l1_dirty
            or self.slices.any_dirty()
            or refcounts.blocks.any_dirty()
            or refcounts.dirty_entries
            or self.reclaiming.any_dropped
        )

    @property
    def volatile(self) -> bool:
        """Whether the file does not yet say where all of the data is."""
        return bool(self.l1_dirty or self.slices.any_dirty() or self._committing.locked())

    @property
    def crowded(self) -> bool:
        """Whether a commit has to come before more changes."""
        return self.slices.crowded or self.refcounts.blocks.crowded

    async def commit(self, *, closing: bool = False) -> None:
        """Make durable what has happened so far, data and metadata (see above). Raises OSError.

        `closing` writes lazy refcounts too.
        """
        async with self._committing:
            await self._commit(closing)

    async def _commit(self, closing: bool) -> None:
        refcounts = self.refcounts
        with_refcounts = closing or not self.lazy or refcounts.blocks.crowded
        if not with_refcounts and (refcounts.blocks.any_dirty() or refcounts.dirty_entries):
            await self.set_dirty(dirty=True)
        writes = Writes(self, with_refcounts)
        dropped = self.reclaiming.take_dropped()
        if not writes.any:
            await self._flush_files()
        else:
            try:
                if writes.fresh_blocks:
                    await self._write(writes.fresh_blocks)
                    await self.file.node.flush()
                await self._write(writes.blocks)
                await self._write(writes.table_entries)
                await self._flush_files()
                if writes.tables or writes.l1_entries:
                    await self._write(writes.tables)
                    await self._write(writes.l1_entries)
                    await self.file.node.flush()
            except BaseException:
                writes.undo()
                self.reclaiming.put_back(dropped)
                raise
            finally:
                self.slices.written()
                refcounts.blocks.written()
        self.reclaiming.count_down(dropped)

    async def _flush_files(self) -> None:
        if self.data_file is not None:
            await self.data_file.node.flush()
        await self.file.node.flush()

    async def _write(self, pieces: list[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            await self.file.put(offset, data)

    async def set_dirty(self, *, dirty: bool) -> None:
        """Set or clear the dirty bit, durably. It is set before refcounts become wrong on disk. Raises OSError."""
        async with self._header_changing:
            await self._set_incompatible(Incompatible.DIRTY, on=dirty)

    async def set_corrupt(self) -> None:
        """Set the corrupt bit, durably. Raises OSError."""
        async with self._header_changing:
            await self._set_incompatible(Incompatible.CORRUPT, on=True)

    async def _set_incompatible(self, bit: Incompatible, *, on: bool) -> None:
        incompatible = self.header.incompatible & ~bit | (bit if on else Incompatible(0))
        if incompatible != self.header.incompatible:
            await self._write_fixed_fields(replace(self.header, incompatible=incompatible))

    async def change_header(self, **fields: Any) -> None:
        """Change fixed fields of the header, durably. Raises OSError.

        They lie in one sector, which a disk writes whole or not at all. Extensions and names stay where they are.
        """
        async with self._header_changing:
            await self._write_fixed_fields(replace(self.header, **fields))

    async def _write_fixed_fields(self, header: Header) -> None:
        features = (header.incompatible, header.compatible, header.autoclear) if header.version >= 3 else ()
        packed = _FIXED_FIELDS.pack(
            header.size,
            header.crypt_method,
            header.l1_size,
            header.l1_table_offset,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            header.nb_snapshots,
            header.snapshots_offset,
        )
        await self.file.put(_FIXED_FIELDS_AT, packed + b"".join(each.to_bytes(8, "big") for each in features))
        await self.file.node.flush()
        self.header = header

    async def rewrite_header(self, **fields: Any) -> None:
        """Change anything in the header, and write all of it, durably. Raises OSError, or Error if it does not fit."""
        async with self._header_changing:
            header = replace(self.header, **fields)
            data = header.build()
            await self.file.put(0, data + bytes(self.geometry.cluster_size - len(data)))
            await self.file.node.flush()
            self.header = header

    async def finish(self) -> None:
        """Write everything and count down what was dropped, as if the image were closed. Raises OSError."""
        await self.reclaiming.pause()
        while True:
            await self.commit(closing=True)
            await self.reclaiming.pause()
            if not self.dirty:
                break
        if not self.unclean:
            await self.set_dirty(dirty=False)
