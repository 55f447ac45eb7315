"""Reading all metadata of an image once, to count what refers to each cluster and to find what is wrong.

Theory of operation. An image may be anybody's, so nothing is read because one field says so: tables that the header,
the snapshot table or the bitmap directory name must lie in the file and must not overlap, so that together they are no
larger than the file; an L2 table is read once, however many L1 entries refer to it, and what it refers to is counted
that many times; a refcount block is read once. So a survey ends, after reading no more than the file has.

In memory are two counts per cluster of the file (see `counts`), 100 bytes or so per L2 table, and one table. Findings
are counted as `qemu-img check` counts them.
"""

from __future__ import annotations

import bisect
from collections.abc import AsyncIterator, Callable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import NamedTuple

from blkferry.drivers.qcow2 import bitmap_directory, raw_snapshots
from blkferry.drivers.qcow2.checks import printable
from blkferry.drivers.qcow2.counts import Counts
from blkferry.drivers.qcow2.entries import COPIED, OFFSET
from blkferry.drivers.qcow2.findings import CheckResult
from blkferry.drivers.qcow2.header import Autoclear, Header, Incompatible
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.refcount_codec import codec
from blkferry.drivers.qcow2.table_scan import TableScan
from blkferry.drivers.qcow2.verdicts import Judge
from blkferry.errors import Error

MAX_CLUSTERS = (1 << 31) - 1
"""QEMU's limit for a check: 128 TiB of 64 KiB clusters."""

WORDS = codec(6)
"""L1, L2, refcount and bitmap tables are 64-bit numbers, like the widest refcounts."""

_PIECE = 1 << 20  # bytes; large tables are read in pieces
_BLOCKS_BEYOND = 8  # refcount blocks for clusters behind the end of the file that are read
_BLOCK_OFFSET = 0xFFFF_FFFF_FFFF_FE00
_BITMAP_RESERVED = 0xFF00_0000_0000_01FE

Progress = Callable[[int, int], None]


class Region(NamedTuple):
    """Clusters from `start` to `end` (half-open) that the table `name` is in."""

    start: int
    end: int
    name: str


@dataclass(slots=True)
class TableUse:
    """How often L1 entries refer to an L2 table; `index` is the first of the active ones."""

    active: int = 0
    inactive: int = 0
    index: int | None = None


class Survey:
    """What one reading of the image has found. `result` has it in numbers and words, the rest is for repairs.

    `stuck` says why nothing can be repaired. `entries_wrong`, `snapshots_wrong`, `bitmaps_wrong` (entries of bitmap
    tables) and `bitmaps_lost` (the directory) say what has to be mended, `refcounts_lost` that the refcount structures
    cannot be repaired where they are.
    """

    def __init__(self, host: HostFile, header: Header, progress: Progress | None = None) -> None:
        self.host = host
        self.header = header
        self.progress = progress
        self.result = CheckResult()
        self.form = codec(header.refcount_order)
        self.cluster_bits = header.cluster_bits
        self.clusters = -(-host.length // header.cluster_size)
        self.has_data_file = Incompatible.DATA_FILE in header.incompatible
        self.judge = Judge(header, host.length, has_data_file=self.has_data_file)
        self.regions: list[Region] = []
        self.snapshots: list[raw_snapshots.RawSnapshot] = []
        self.snapshot_l1s: list[tuple[int, int]] = []  # offset, entries; only what may be read and written
        self.bitmaps: list[bitmap_directory.BitmapEntry] = []
        self.tables: dict[int, TableUse] = {}
        self._sound_l1: dict[int, TableUse] = {}  # by entry: a hostile L1 table may have millions that are the same
        self.blocks: dict[int, int] = {}  # refcount block by its index: those that can be written where they are
        self._blocks_beyond: dict[int, MutableSequence[int]] = {}
        self._blocks_unread: set[int] = set()
        self.refcount_structures: dict[int, int] = {}  # how often a cluster is counted as one of these
        self.stuck = ""
        self.entries_wrong = self.snapshots_wrong = self.bitmaps_wrong = self.bitmaps_lost = False
        self.refcounts_lost = self.refcounts_wrong = False
        self.copied_wrong = 0
        self.grow_to = 0  # the L1 table is cut off by the end of the file

    @property
    def mendable(self) -> bool:
        wrong = self.entries_wrong or self.snapshots_wrong or self.bitmaps_wrong or self.bitmaps_lost
        return wrong or bool(self.grow_to)

    async def run(self) -> None:
        """Read the image. What cannot be read is a check error; no exception comes out, whatever the image holds."""
        if self.clusters > MAX_CLUSTERS:
            self.result.fail(f"The file has {self.clusters} clusters, at most {MAX_CLUSTERS} can be checked")
            return
        try:
            # The last cluster may be cut off, and compressed data may end in what is missing of it.
            self.counted = Counts(self.clusters + 1)
            self.stored = Counts(self.clusters + 1)
            await self._run()
        except Error as error:
            self.result.fail(error.message)
        except OSError as error:
            self.result.fail(f"I/O error: {error.strerror}")

    async def _run(self) -> None:
        entries = await self._stored_refcounts()
        await self._claim_tables()
        await self._l1_tables()
        await self._l2_tables()
        await self._bitmap_tables()
        self._refcount_structures(entries)
        if not self.counted[self.clusters]:
            self.stored[self.clusters] = 0  # nobody looks at the refcounts of what is not there
        self._compare()
        cluster_size = self.header.cluster_size
        self.result.total_clusters = -(-self.header.size // cluster_size)
        self.result.image_end_offset = (max(self.counted.last(), self.stored.last(), 0) + 1) * cluster_size

    # Counting --------------------------------------------------------------------------------------------------

    def refer(self, offset: int, length: int, times: int = 1) -> None:
        """Count a use of a range that lies in the file."""
        for cluster in range(offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1):
            self.add(cluster, times)

    def add(self, cluster: int, times: int = 1) -> int:
        """Count uses of a cluster, as many as its refcount can have; tells how many that were."""
        count = self.counted[cluster] + times
        over = max(count - self.form.maximum, 0)
        if over:
            self.result.corrupt(f"overflow cluster offset={cluster << self.cluster_bits:#x}", over)
        self.counted[cluster] = count - over
        return times - over

    def _claim(self, offset: int, length: int, name: str) -> bool:
        """Count a table that the image has only one of, or say what is wrong; tells whether it may be read."""
        if not length:
            return False
        if self._beyond(offset, length):
            self.result.corrupt(f"{name} at {offset:#x} ({length} bytes) ends behind the end of the file")
            return False
        self.refer(offset, length)
        start, end = offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1
        other = self.region_in(start, end)
        if other is not None:
            self.result.corrupt(f"{name} at {offset:#x} overlaps with {other.name}")
            return False
        bisect.insort(self.regions, Region(start, end, name))
        return True

    def _beyond(self, offset: int, length: int) -> bool:
        return offset >= self.host.length or self.judge.outside(offset, length)

    def region_in(self, start: int, end: int) -> Region | None:
        """A table that has some of these clusters."""
        at = bisect.bisect_left(self.regions, (start,))
        for region in self.regions[max(at - 1, 0) : at + 1]:
            if region.start < end and start < region.end:
                return region
        return None

    async def words(self, offset: int, count: int) -> AsyncIterator[tuple[int, list[int]]]:
        """A table of 64-bit numbers in pieces, each with the index of its first."""
        for start in range(0, count * 8, _PIECE):
            data = await self.host.get(offset + start, min(_PIECE, count * 8 - start))
            yield start // 8, list(WORDS.load(data)) if data != bytes(len(data)) else []

    # Tables that there is one of -------------------------------------------------------------------------------

    async def _claim_tables(self) -> None:
        header = self.header
        self._claim(0, header.cluster_size, "the header")
        if header.l1_size and not self._claim(header.l1_table_offset, header.l1_size * 8, "active L1 table"):
            if self.region_in(header.l1_table_offset >> self.cluster_bits, self.clusters) is None:
                self.grow_to = header.l1_table_offset + header.l1_size * 8
            else:
                self.stuck = "the active L1 table is not where it can be"
        if header.nb_snapshots:
            await self._claim_snapshots()
        if header.encryption is not None:
            pointer = header.encryption
            if pointer.length and not self._claim(pointer.offset, pointer.length, "the encryption header"):
                self.stuck = "the encryption header is damaged"
        if header.bitmaps is not None and Autoclear.BITMAPS in header.autoclear:
            await self._claim_bitmaps()

    async def _claim_snapshots(self) -> None:
        header = self.header
        self.snapshots, length = await raw_snapshots.read(self.host, header)
        if self.has_data_file:
            self.result.corrupt(f"{header.nb_snapshots} snapshots in image with data file")
            self.stuck = "an image with a data file has snapshots"
        if not self._claim(header.snapshots_offset, length, "snapshot table"):
            self.stuck = "the snapshot table is damaged"
        for snapshot in self.snapshots:
            complaints = snapshot.complaints(header)
            for complaint in complaints:
                self.result.corrupt(complaint)
            self.snapshots_wrong |= bool(complaints)
            if not snapshot.l1_usable(header):
                continue
            offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
            if self._claim(offset, length, f"L1 table of snapshot {snapshot.label}"):
                self.snapshot_l1s.append((offset, snapshot.l1_size))
            elif length and self._beyond(offset, length):
                self.snapshots_wrong = True
            elif length:
                self.stuck = "the L1 table of a snapshot overlaps with another table"

    async def _claim_bitmaps(self) -> None:
        header = self.header
        assert header.bitmaps is not None
        where = header.bitmaps
        if not self._claim(where.directory_offset, where.directory_size, "bitmap directory"):
            self.bitmaps_lost = True
            return
        data = bytes(await self.host.get(where.directory_offset, where.directory_size))
        try:
            self.bitmaps = bitmap_directory.parse(data, where.count, header)
        except Error as error:
            self.result.corrupt(error.message)
            self.bitmaps_lost = True
            return
        for bitmap in self.bitmaps:
            name = f"table of bitmap '{printable(bitmap.name)}'"
            self.bitmaps_lost |= not self._claim(bitmap.table_offset, bitmap.table_size * 8, name)

    async def _bitmap_tables(self) -> None:
        if self.bitmaps_lost:
            return
        for bitmap in self.bitmaps:
            async for start, entries in self.words(bitmap.table_offset, bitmap.table_size):
                for index, entry in enumerate(entries, start):
                    if self.bitmap_entry_wrong(entry):
                        self.result.corrupt(f"bitmap table entry {index} of '{printable(bitmap.name)}': {entry:#x}")
                        self.bitmaps_wrong = True
                    elif entry & OFFSET:
                        self.refer(entry & OFFSET, self.header.cluster_size)

    def bitmap_entry_wrong(self, entry: int) -> bool:
        offset = entry & OFFSET
        if entry & _BITMAP_RESERVED or offset % self.header.cluster_size or (offset and entry & 1):
            return True
        return bool(offset) and self.judge.outside(offset, self.header.cluster_size)

    # L1 and L2 tables ------------------------------------------------------------------------------------------

    def l1_entry(self, entry: int) -> tuple[list[str], int]:
        """What is wrong with an L1 entry that is not 0, and what it should be."""
        complaints, repaired = self.judge.l1(entry)
        cluster = (repaired & OFFSET) >> self.cluster_bits
        if repaired and (region := self.region_in(cluster, cluster + 1)) is not None:
            complaints.append(f"l2_offset={repaired & OFFSET:x}: Table overlaps with {region.name}")
            repaired = 0
        return complaints, repaired

    async def _l1_tables(self) -> None:
        header = self.header
        active = not (self.stuck or self.grow_to)
        for offset, count in [(header.l1_table_offset, header.l1_size)] if active else []:
            async for start, entries in self.words(offset, count):
                for index, entry in enumerate(entries, start):
                    if entry and (use := self._use(entry)) is not None:
                        use.active += 1
                        use.index = index if use.index is None else use.index
        for offset, count in self.snapshot_l1s:
            async for _, entries in self.words(offset, count):
                for entry in entries:
                    if entry and (use := self._use(entry)) is not None:
                        use.inactive += 1
        if active:
            await self._l1_copied()

    def _use(self, entry: int) -> TableUse | None:
        if (use := self._sound_l1.get(entry)) is not None:
            return use
        complaints, repaired = self.l1_entry(entry)
        for complaint in complaints:
            self.result.corrupt(complaint)
        self.entries_wrong |= bool(complaints)
        if not repaired:
            return None
        use = self.tables.setdefault(repaired & OFFSET, TableUse())
        if not complaints:
            self._sound_l1[entry] = use
        return use

    async def _l1_copied(self) -> None:
        header = self.header
        async for start, entries in self.words(header.l1_table_offset, header.l1_size):
            for index, entry in enumerate(entries, start):
                if entry & OFFSET:
                    self.check_copied(entry, entry & OFFSET, 1, f"L2 cluster: l1_index={index} l1_entry")

    def check_copied(self, entry: int, place: int, times: int, what: str) -> None:
        """Whether an active entry says rightly that its cluster has one user."""
        cluster = place >> self.cluster_bits
        refcount = self.stored[cluster] if cluster < self.stored.clusters else self._stored_beyond(cluster)
        if (refcount == 1) != bool(entry & COPIED) and not self._unknown(cluster):
            self.copied_wrong += times
            self.result.corrupt(f"OFLAG_COPIED {what}={entry:x} refcount={refcount}", times)

    async def _l2_tables(self) -> None:
        scan = TableScan(self)
        for done, (offset, use) in enumerate(self.tables.items()):
            if self.progress is not None:
                self.progress(done, len(self.tables))
            self.refer(offset, self.header.cluster_size, use.active + use.inactive)
            data = await self.host.get(offset, self.header.cluster_size)
            if data != bytes(len(data)):
                scan.table(WORDS.load(data), use)
        if self.progress is not None:
            self.progress(len(self.tables), len(self.tables))

    # Refcounts -------------------------------------------------------------------------------------------------

    async def _stored_refcounts(self) -> list[int]:
        """Read what the image says; gives the refcount table."""
        header = self.header
        per_block = self.form.entries(header.cluster_size)
        table: list[int] = []
        read: set[int] = set()
        length = header.refcount_table_clusters * header.cluster_size
        async for start, entries in self.words(header.refcount_table_offset, length // 8):
            table.extend([0] * (start - len(table)))
            table.extend(entries)
        needed = -(-self.counted.clusters // per_block)
        for index, entry in enumerate(table[: needed + _BLOCKS_BEYOND]):
            offset = entry & _BLOCK_OFFSET
            if offset % header.cluster_size or offset in read:
                self._blocks_unread.add(index)
            elif offset and offset < self.host.length:
                read.add(offset)
                counts = self.form.load(await self.host.get(offset, header.cluster_size))
                if index < needed:
                    self.stored.load(index * per_block, counts)
                    self.blocks[index] = offset
                if index >= needed - 1:
                    self._blocks_beyond[index] = counts
        return table

    def _stored_beyond(self, cluster: int) -> int:
        """The stored refcount of a cluster that the file has not (any more)."""
        index, entry = divmod(cluster, self.form.entries(self.header.cluster_size))
        return self._blocks_beyond[index][entry] if index in self._blocks_beyond else 0

    def _unknown(self, cluster: int) -> bool:
        """Whether the stored refcount of this cluster could not be read."""
        if not self._blocks_unread:
            return False
        return cluster // self.form.entries(self.header.cluster_size) in self._blocks_unread

    def _refcount_structures(self, table: list[int]) -> None:
        header, cluster_size = self.header, self.header.cluster_size
        length = header.refcount_table_clusters * cluster_size
        if self.judge.outside(header.refcount_table_offset, length):
            self.result.corrupt(f"refcount table at {header.refcount_table_offset:#x} ends behind the end of the file")
            self.refcounts_lost = True
        else:
            first = header.refcount_table_offset >> self.cluster_bits
            for cluster in range(first, first + header.refcount_table_clusters):
                self._refer_structure(cluster)
        for index, entry in enumerate(table):
            if not entry:
                continue
            offset = entry & _BLOCK_OFFSET
            if entry & ~_BLOCK_OFFSET:
                complaint = f"refcount table entry {index} has reserved bits set"
            elif offset % cluster_size:
                complaint = f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
            elif offset >= self.host.length:
                complaint = f"refcount block {index} is outside image"
            else:
                self._refer_structure(offset >> self.cluster_bits)
                count = self.counted[offset >> self.cluster_bits]
                if count == 1:
                    continue
                complaint = f"refcount block {index} refcount={count}"
            self.result.corrupt(complaint)
            self.refcounts_lost = True
        self.refcounts_lost |= any(self.counted[cluster] != 1 for cluster in self.refcount_structures)

    def _refer_structure(self, cluster: int) -> None:
        added = self.add(cluster)
        self.refcounts_lost |= not added  # somebody else has all the uses that this refcount can tell
        self.refcount_structures[cluster] = self.refcount_structures.get(cluster, 0) + added

    def differences(self) -> Iterator[int]:
        """Clusters whose stored refcount is known to be wrong, in order."""
        for cluster in self.counted.differences(self.stored):
            if not self._unknown(cluster):
                yield cluster

    def _compare(self) -> None:
        per_block = self.form.entries(self.header.cluster_size)
        for cluster in self.differences():
            stored, counted = self.stored[cluster], self.counted[cluster]
            self.refcounts_wrong = True
            message = f"cluster {cluster} refcount={stored} reference={counted}"
            if stored < counted:
                self.result.corrupt(message)
                self.refcounts_lost |= cluster // per_block not in self.blocks
            else:
                self.result.leak(message)
