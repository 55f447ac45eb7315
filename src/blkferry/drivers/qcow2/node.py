"""`qcow2`: QEMU's image format, all of it (docs/interop/qcow2.rst in QEMU's sources).

This is the node: what the graph calls, and who does it. `opening` makes it from an image, `mapping` answers lookups
from L2 slices, `writing` and `remapping` change them, `metadata` brings all that to the disk in an order that a crash
survives.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from blkferry.drivers.qcow2 import (
    corruption,
    describing,
    making,
    opening,
    reopening,
    resizing,
    settings,
    snapshots,
)
from blkferry.drivers.qcow2.bitmaps import StoredBitmaps
from blkferry.drivers.qcow2.compressed_space import CompressedSpace
from blkferry.drivers.qcow2.entries import COMPRESSED, OFFSET
from blkferry.drivers.qcow2.header import Header
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.metadata import Metadata
from blkferry.drivers.qcow2.opaque import Opaque
from blkferry.drivers.qcow2.options import BlockdevCreateOptionsQcow2, BlockdevOptionsQcow2
from blkferry.drivers.qcow2.remapping import Remapping
from blkferry.drivers.qcow2.words import CorruptError
from blkferry.drivers.qcow2.writing import Writing
from blkferry.errors import Error
from blkferry.extent import Content, Effort, Extent
from blkferry.graph import access
from blkferry.graph.access import BACKING
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Permission
from blkferry.plane.drain import InFlight, RangeLock
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import ImageInfo, SnapshotInfo

if TYPE_CHECKING:
    from blkferry.crypt.aes import SectorCipher
    from blkferry.crypt.luks_layout import Header as LuksHeader
    from blkferry.drivers.qcow2.mapping import Mapper
    from blkferry.drivers.qcow2.snapshot_table import Snapshot
    from blkferry.graph.reopen import Reopening
    from blkferry.plane.services import Services
    from blkferry.plane.storage import Storage

log = logging.getLogger(__name__)


_WRITE = Permission.WRITE | Permission.RESIZE


class Qcow2(Node):
    """One qcow2 image."""

    driver: ClassVar[str] = "qcow2"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsQcow2
    create_options: ClassVar[type[BlockdevCreateOptions] | None] = BlockdevCreateOptionsQcow2
    reopenable: ClassVar[frozenset[str]] = reopening.REOPENABLE
    supports_backing: ClassVar[bool] = True
    writes_now: ClassVar[bool] = True
    supports_snapshots: ClassVar[bool] = True
    options: BlockdevOptionsQcow2
    metadata: Metadata
    mapper: Mapper

    def __init__(self, name: str, options: BlockdevOptions, services: Services, *, read_only: bool) -> None:
        super().__init__(name, options, services, read_only=read_only)
        self.data_file: HostFile | None = None
        self.cipher: SectorCipher | None = None
        self.luks: LuksHeader | None = None
        self.snapshots: list[Snapshot] = []
        self.bitmaps = StoredBitmaps()
        self.corrupt = False
        self.discard_no_unref = False
        self.pass_discard_request = self.pass_discard_snapshot = self.pass_discard_other = False
        self.ranges = RangeLock()
        self.compressed_space = CompressedSpace(self)
        self._changes = InFlight()
        self._frozen = False
        self._freezing = asyncio.Lock()
        self.reshaping = asyncio.Lock()
        """Held by whoever takes, applies or deletes snapshots or changes the size: one such thing at a time."""
        self._thawed: list[asyncio.Future[None]] = []
        self.opaque = Opaque(self)
        self._clean_timer: asyncio.TimerHandle | None = None
        self._opened = False
        self._marking: asyncio.Task[None] | None = None

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self, opening_: Opening) -> None:
        await opening.open_image(self, opening_)
        self.begun()
        self._opened = True
        self._clean_caches_later()

    def begun(self) -> None:
        """`metadata` and `mapper` are new: let everything use them."""
        self._slices = self.metadata.slices
        self._shift = self.metadata.geometry.slice_shift
        self.writing = Writing(self)
        self.remapping = Remapping(self)
        self.compressed_space = CompressedSpace(self)
        self.metadata.reclaiming.on_corrupt = self.found_corruption
        self.update_mapper()

    @property
    def header(self) -> Header:
        """What the header on disk says."""
        return self.metadata.header

    def header_changed(self) -> None:
        """The size of the disk may be another one."""
        self.length = self.header.size // 512 * 512

    @property
    def file(self) -> HostFile:
        return self.metadata.file

    @property
    def reuses_places(self) -> bool:
        return self.metadata.writable

    @property
    def has_backing(self) -> bool:
        return BACKING in self.children

    @property
    def raw_data(self) -> Node | None:
        """The external data file where it is to be a raw image of its own."""
        return opening.raw_data(self)

    def backing_length(self) -> int:
        """Up to where something may show through."""
        edge = self.children.get(BACKING)
        return edge.node.length if edge is not None else 0

    @property
    def writes_at_once(self) -> bool:
        """Whether `write_now` may do anything: buffered, plain writes to an image that is in order."""
        return self._at_once and not self._frozen

    def update_mapper(self) -> None:
        """Work out anew what lookups and writes may promise: called when anything changes that it depends on."""
        mapper = self.mapper
        guest_file = self.data_file or self.file
        mapper.file_length = guest_file.length
        writable = not self.read_only and not self.corrupt and self.options.snapshot is None
        mapper.in_place = writable and not self._frozen
        self._at_once = (
            writable
            and self.cipher is None
            and not self.metadata.geometry.extended
            and guest_file.place() is not None
            and self.file.place() is not None
        )

    async def pause(self) -> None:
        if self._marking is not None:
            await asyncio.wait([self._marking])
        if self._opened:
            await self.metadata.reclaiming.interrupt()
            self._stop_cleaning()

    def _stop_cleaning(self) -> None:
        if self._clean_timer is not None:
            self._clean_timer.cancel()
            self._clean_timer = None

    def move(self, services: Services) -> None:
        super().move(services)
        if self._opened:
            self.metadata.move(services)
            self._freezing = asyncio.Lock()
            self.reshaping = asyncio.Lock()
            services.loop.call_soon_threadsafe(self._clean_caches_later)

    def _clean_caches_later(self) -> None:
        """Give up cached tables that nobody used for `cache-clean-interval` seconds."""
        interval = self.options.cache_clean_interval
        if interval is None:
            interval = settings.CLEAN_INTERVAL_SECONDS
        if interval and self._clean_timer is None:
            self._clean_timer = self.services.loop.call_later(interval, self._clean_caches)

    def _clean_caches(self) -> None:
        self._clean_timer = None
        self._slices.drop_idle()
        self.metadata.refcounts.blocks.drop_idle()
        self.opaque.forget()
        self._clean_caches_later()

    async def close(self) -> None:
        if not self._opened:
            return
        if self._marking is not None:
            await asyncio.wait([self._marking])
        self._stop_cleaning()
        if self.metadata.writable and not self.corrupt:
            try:
                with self.marking_corruption():
                    await self.settle()
            except (OSError, Error) as error:
                log.error("%s: could not write everything on closing: %s", self.filename(), error)  # noqa: TRY400
        await self.metadata.reclaiming.end()
        if self._marking is not None:
            await asyncio.wait([self._marking])
        self._opened = False

    async def settle(self) -> None:
        if not self.metadata.writable or self.corrupt:
            return
        await self.bitmaps.store(self)
        await self.metadata.finish()
        await self.metadata.reclaiming.rested()
        self.header_changed()
        file = self.file
        if file.grown and file.needed < file.length:
            await file.node.resize(file.needed)

    # Where bytes are -------------------------------------------------------------------------------------------

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        number = start >> self._shift
        table = self._slices.get(number)
        if table is None:
            return self._lookup_without_table(number, start, length)
        table.used = True
        end = min(start + length, (number + 1) << self._shift)
        if effort is Effort.ALLOCATION:
            self.mapper.settled = not self._is_sparse_on_host()
        return self.mapper.extents(table.values, start, end)

    def _lookup_without_table(self, number: int, start: int, length: int) -> list[Extent] | None:
        metadata = self.metadata
        try:
            if metadata.slice_host(number):
                return None
        except CorruptError:
            return [Extent(start, min(length, ((number + 1) << self._shift) - start), Content.OPAQUE, start)]
        geometry = metadata.geometry
        l1_index = geometry.l1_index(start)
        l1, entries = metadata.l1, geometry.l1_entries(start + length)
        while l1_index < entries and not l1[l1_index] & OFFSET:
            l1_index += 1
        end = min(l1_index << (geometry.cluster_bits + geometry.table_bits), start + length)
        return [Extent(start, end - start, Content.BELOW, start, allocated=False)]

    async def load(self, start: int, length: int) -> None:
        del length
        await self.metadata.load_slice(start >> self._shift)

    def _is_sparse_on_host(self) -> bool:
        """Whether clusters that are allocated here may be holes in the file (preallocated metadata)."""
        taken = (self.data_file or self.file).node.allocated_size()
        length = (self.data_file or self.file).length
        return taken is not None and length - taken > max(length // 10, 10 << self.metadata.geometry.cluster_bits)

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        if role == BACKING:
            self.retire(start, end)
            return
        if self._opened and end is None:
            for file in (self.file, self.data_file):
                if file is not None:
                    file.forget_place()
            self.update_mapper()
            self.retire()

    # Reading what has no place ---------------------------------------------------------------------------------

    async def read(self, start: int, view: memoryview) -> None:
        await self.opaque.read(start, view)

    async def read_guest(self, start: int, view: memoryview) -> None:
        """What the guest sees in a range; behind the end of the disk there are zeroes."""
        inside = max(min(len(view), self.length - start), 0)
        if inside:
            await access.read(self, start, view[:inside])
        view[inside:] = bytes(len(view) - inside)

    # Changing --------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise OSError where nothing may be written any more."""
        if self.corrupt:
            raise OSError(errno.EIO, f"image '{self.filename()}' is marked corrupt and takes no writes")
        if not self.metadata.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def write(self, start: int, view: memoryview) -> None:
        with self.marking_corruption():
            await self.writing.write(start, view)

    def write_now(self, start: int, view: memoryview) -> bool:
        try:
            return self.writing.write_now(start, view)
        except CorruptError:
            return False  # `write` finds it again, and says so

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        with self.marking_corruption():
            await self.remapping.zero(start, length, unmap=unmap and self.unmaps, fast=fast)

    async def discard(self, start: int, length: int) -> None:
        if self.unmaps:
            with self.marking_corruption():
                await self.remapping.discard(start, length)

    async def prefetch(self, start: int, length: int) -> None:
        end = start + length
        while start < end:
            for run in await access.load_runs(self, start, end - start):
                if run.storage is not None and not run.storage.direct:
                    storage, offset, size = run.storage, run.offset, run.length
                    await self.services.in_thread(os.posix_fadvise, storage.fd, offset, size, os.POSIX_FADV_WILLNEED)
                start += run.length

    async def flush(self) -> None:
        if not self.metadata.writable or self.corrupt:
            await super().flush()
            return
        with self.marking_corruption():
            await self.metadata.commit()

    async def resize(self, length: int) -> None:
        await resizing.resize(self, length)

    def put_guest_now(self, host: int, view: memoryview) -> bool:
        """Write guest data at a place, at once; False where that cannot be."""
        guest_file = self.data_file or self.file
        place = guest_file.place()
        if place is None:
            return False
        if host + len(view) > guest_file.needed and not guest_file.extend_now(host + len(view)):
            return False
        storage, shift = place
        storage.write_now(view, host + shift)
        return True

    async def put_guest(self, at: int, host: int, view: memoryview) -> None:
        """Write guest data of offset `at` at a place, encrypted where it has to be. Raises OSError."""
        guest_file = self.data_file or self.file
        if self.cipher is not None:
            host, view = await self.opaque.encrypt(at, host, view)
        await guest_file.put(host, view)

    def check_guest_place(self, host: int, cluster: int, *, reading: bool = False) -> None:
        """Refuse a place for guest data that cannot be one. Raises CorruptError."""
        geometry = self.metadata.geometry
        at = cluster << geometry.cluster_bits
        if self.mapper.fixed:
            if host != at:
                raise CorruptError(f"guest offset {at:#x} is mapped to {host:#x} of the data file", host)
            return
        if host & (geometry.cluster_size - 1):
            raise CorruptError(f"Cluster allocation offset {host:#x} unaligned (guest offset {at:#x})", host)
        name = self.metadata.known.get(host >> geometry.cluster_bits)
        if name is not None and not reading:
            raise CorruptError(f"Preventing invalid write on metadata (overlaps with {name}) at {host:#x}", host)

    def drop_entry(self, entry: int, *, discard: bool | None = None) -> None:
        """An L2 entry no longer points where `entry` did."""
        if discard is None:
            discard = self.pass_discard_other
        geometry, metadata = self.metadata.geometry, self.metadata
        if entry & COMPRESSED:
            first, count = geometry.compressed_clusters(entry)
            self.compressed_space.avoid(first, count)
            metadata.drop(first, count, discard=discard)
        elif self.data_file is None and entry & OFFSET:
            metadata.drop((entry & OFFSET) >> geometry.cluster_bits, 1, discard=discard)

    def changed(self, start: int, end: int) -> None:
        """The mapping of a guest range is another one now."""
        self.mapper.file_length = (self.data_file or self.file).length
        self.opaque.forget(start, end)
        self.retire(start, end)

    def file_may_have_grown(self) -> None:
        """A cluster that was there before was written: if it lay behind the end of the file, it no longer does."""
        length = (self.data_file or self.file).length
        if length != self.mapper.file_length:
            self.mapper.file_length = length
            self.retire()

    def check_bitmap_storable(self, name: str, granularity_bits: int) -> None:
        self.bitmaps.check_new(self, name, granularity_bits)

    async def remove_stored_bitmap(self, name: str) -> None:
        await self.bitmaps.remove(self, name)

    # Who waits for whom ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Count as somebody who changes the mapping; waits while nobody may."""
        while self._frozen:
            thawed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._thawed.append(thawed)
            await thawed
        self._changes.begin()
        try:
            yield
        finally:
            self._changes.end()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Let nobody write, in place or otherwise, while what is there is shared out, cut off or looked at whole."""
        async with self._freezing:
            self._frozen = True
            try:
                self.update_mapper()
                self.retire()  # no short cuts any more: writes come to `changing` and wait there
                await self._changes.idle()
                for file in (self.file, self.data_file):
                    if file is not None:
                        await file.settle_writers()
                yield
            finally:
                self._frozen = False
                self.update_mapper()
                self.opaque.forget()
                self.retire()
                thawed, self._thawed = self._thawed, []
                for each in thawed:
                    if not each.done():
                        each.set_result(None)

    # When something is wrong -----------------------------------------------------------------------------------

    def marking_corruption(self) -> corruption.Marking:
        """Within this, an impossible structure takes the image offline for writing."""
        return corruption.Marking(self)

    def found_corruption(self, error: CorruptError) -> None:
        """Mark the image, take no more writes, and tell everybody. What is sound can still be read."""
        if self.corrupt:
            return
        corruption.report(self, error)
        if self.metadata.writable:
            self.corrupt = True
            self.update_mapper()
            self.retire()
            self._marking = self.services.loop.create_task(corruption.mark(self))

    # Images and snapshots --------------------------------------------------------------------------------------

    @classmethod
    async def create(cls, graph: Graph, options: BlockdevCreateOptions) -> None:
        assert isinstance(options, BlockdevCreateOptionsQcow2)
        await making.create(graph, options)

    async def snapshot_create(self, name: str) -> None:
        await snapshots.create(self, name)

    async def snapshot_delete(self, snapshot_id: str | None, name: str | None) -> SnapshotInfo:
        return snapshots.info(await snapshots.delete(self, snapshot_id, name))

    async def change_backing_file(self, backing_file: str | None, backing_format: str | None) -> None:
        await reopening.change_backing_file(self, backing_file, backing_format)

    def image_info(self) -> ImageInfo:
        return describing.image_info(
            describing.Known(
                filename=self.filename(),
                header=self.header,
                actual_size=self.allocated_size(),
                snapshots=self.snapshots,
                bitmaps=self.bitmaps.entries,
                luks=self.luks,
                data_file=self.data_file.node.filename() if self.data_file is not None else None,
                corrupt=self.corrupt,
            )
        )

    async def reopen_prepare(self, reopening_: Reopening) -> None:
        await reopening.prepare(self, reopening_)

    async def reopen_commit(self, reopening_: Reopening) -> None:
        await reopening.commit(self, reopening_)

    async def reopen_abort(self, reopening_: Reopening) -> None:
        await reopening.abort(self, reopening_)

    # What it looks like ----------------------------------------------------------------------------------------

    def child_permissions(self, role: str, used: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if role == BACKING:
            return super().child_permissions(role, used, shared)
        wanted = Permission.CONSISTENT_READ | (_WRITE if not self.read_only else Permission(0))
        return wanted, ALL & ~_WRITE

    def flush_target(self) -> Storage | None:
        return None  # a flush is more than that of the file, even for writes in place: their cluster may be new
