"""Internal snapshots: taking, applying and deleting them (qcow2.rst, "Snapshots").

A snapshot is a copy of the L1 table; everything reachable from it counts once more. Each of these operations walks all
L2 tables, with nobody writing meanwhile, and carries the dirty bit (version 3), so that a crash in between means a
repair and never a wrong count. What is counted down waits for those who still read.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Coroutine, Iterator, MutableSequence
from typing import TYPE_CHECKING, Any, Self

from blkferry.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET, Geometry
from blkferry.drivers.qcow2.header import MAX_SNAPSHOTS
from blkferry.drivers.qcow2.metadata import Metadata
from blkferry.drivers.qcow2.opening import find_snapshot
from blkferry.drivers.qcow2.refcounts import MISSING
from blkferry.drivers.qcow2.resizing import MAX_L1_BYTES, grow_l1
from blkferry.drivers.qcow2.snapshot_table import NO_ICOUNT, Snapshot, build
from blkferry.drivers.qcow2.words import CorruptError, big_endian, from_big_endian
from blkferry.errors import Error, ErrorKind
from blkferry.plane.drain import uninterrupted
from blkferry.schema.image import SnapshotInfo

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

_STRETCH = 256


def info(snapshot: Snapshot) -> SnapshotInfo:
    """What queries tell of a snapshot."""
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_size,
        date_sec=snapshot.date_sec,
        date_nsec=snapshot.date_nsec,
        vm_clock_sec=snapshot.vm_clock_nsec // 1_000_000_000,
        vm_clock_nsec=snapshot.vm_clock_nsec % 1_000_000_000,
        icount=None if snapshot.icount == NO_ICOUNT else snapshot.icount,
    )


def _check(node: Qcow2) -> None:
    if not node.metadata.writable or node.corrupt:
        raise Error(ErrorKind.DENIED, f"Block node is read-only: '{node.name}'", node=node.name)
    if node.data_file is not None:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Block format 'qcow2' used by device '{node.name}' does not support internal snapshots",
            hint="Its data is in an external file, which no snapshot can share.",
            node=node.name,
        )


async def create(node: Qcow2, name: str) -> Snapshot:
    """Take a snapshot of what the disk holds now. Raises Error."""
    return await _alone(node, _create(node, name))


async def _create(node: Qcow2, name: str) -> Snapshot:
    _check(node)
    if len(node.snapshots) >= MAX_SNAPSHOTS:
        raise Error(ErrorKind.NO_SPACE, f"An image has at most {MAX_SNAPSHOTS} snapshots", node=node.name)
    metadata = node.metadata
    now = time.time_ns()
    try:
        with node.marking_corruption():
            async with node.frozen(), _Half(node) as half:
                await metadata.commit()
                await _count(node, metadata.l1, 1)
                half.begun = True
                await _set_copied(node)
                l1 = array("Q", (entry & ~COPIED for entry in metadata.l1))
                offset = await metadata.place_table(big_endian(l1))
                snapshot = Snapshot(
                    id=str(max((int(each.id) for each in node.snapshots if each.id.isdecimal()), default=0) + 1),
                    name=name,
                    l1_table_offset=offset,
                    l1_size=len(l1),
                    date_sec=now // 1_000_000_000,
                    date_nsec=now % 1_000_000_000,
                    vm_clock_nsec=0,
                    vm_state_size=0,
                    disk_size=node.header.size,
                )
                await _store(node, [*node.snapshots, snapshot])
                metadata.know(offset, 8 * len(l1), "inactive L1 table")
    except OSError as error:
        raise Error.from_oserror(f"Failed to create snapshot '{name}' on device '{node.name}'", error) from error
    return snapshot


async def delete(node: Qcow2, snapshot_id: str | None, name: str | None) -> Snapshot:
    """Delete a snapshot. Raises Error."""
    return await _alone(node, _delete(node, snapshot_id, name))


async def _delete(node: Qcow2, snapshot_id: str | None, name: str | None) -> Snapshot:
    _check(node)
    for snapshot in node.snapshots:
        if snapshot_id in (None, snapshot.id) and name in (None, snapshot.name):
            break
    else:
        snapshot = find_snapshot(node.snapshots, snapshot_id or name or "")
    try:
        with node.marking_corruption():
            async with node.frozen(), _Half(node) as half:
                await node.metadata.commit()
                l1 = await _l1_of(node, snapshot)
                half.begun = True
                await _store(node, [each for each in node.snapshots if each is not snapshot])
                await _drop_all(node, l1, snapshot.l1_table_offset)
    except OSError as error:
        raise Error.from_oserror(f"Failed to delete snapshot '{snapshot.name}'", error, node=node.name) from error
    return snapshot


async def apply(node: Qcow2, wanted: str) -> Snapshot:
    """Make the disk what it was when the snapshot was taken, size included. Raises Error."""
    return await _alone(node, _apply(node, wanted))


async def _apply(node: Qcow2, wanted: str) -> Snapshot:
    _check(node)
    snapshot = find_snapshot(node.snapshots, wanted)
    metadata = node.metadata
    size = node.header.size if snapshot.disk_size is None else snapshot.disk_size
    if size != node.header.size:
        node.bitmaps.check_resize(node)
    if metadata.geometry.l1_entries(size) * 8 > MAX_L1_BYTES:
        raise Error(
            ErrorKind.CORRUPT,
            f"Snapshot '{snapshot.id}' says that its disk has {size} bytes, which no L1 table could describe",
            structure="snapshot table",
            offset=node.header.snapshots_offset,
        )
    try:
        with node.marking_corruption():
            async with node.frozen(), _Half(node) as half:
                await metadata.commit()
                l1 = await _l1_of(node, snapshot)
                await grow_l1(node, max(len(l1), metadata.geometry.l1_entries(size)))
                l1.frombytes(bytes(8 * (len(metadata.l1) - len(l1))))
                await _count(node, l1, 1)
                half.begun = True
                offset = await metadata.place_table(big_endian(l1))
                await metadata.commit()
                old, old_offset = metadata.l1, metadata.header.l1_table_offset
                await metadata.change_header(size=size, l1_size=len(l1), l1_table_offset=offset)
                metadata.l1 = l1
                metadata.slices.forget()
                metadata.know(offset, 8 * len(l1), "active L1 table")
                metadata.know_tables(old, l1)
                node.header_changed()
                await _drop_all(node, old, old_offset)
    except OSError as error:
        raise Error.from_oserror(f"Failed to apply snapshot '{snapshot.name}'", error, node=node.name) from error
    node.fit_bitmaps()
    node.mark_dirty_bitmaps(0, node.length)
    return snapshot


async def _alone(node: Qcow2, work: Coroutine[Any, Any, Snapshot]) -> Snapshot:
    """Do one such thing at a time, and to its end."""

    async def run() -> Snapshot:
        async with node.reshaping:
            return await work

    return await uninterrupted(asyncio.ensure_future(run()))


# Steps ----------------------------------------------------------------------------------------------------------


class _Half:
    """A piece of work that is half done in between: the dirty bit is set within this.

    What fails before `begun` is set has been undone. What fails later leaves the bit, and the image is repaired when it
    is opened next.
    """

    def __init__(self, node: Qcow2) -> None:
        self._node = node
        self.begun = False

    async def __aenter__(self) -> Self:
        if self._node.header.version >= 3:
            await self._node.metadata.set_dirty(dirty=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        metadata = self._node.metadata
        metadata.unclean = metadata.unclean or (kind is not None and self.begun)
        if not metadata.lazy and not metadata.unclean:
            await metadata.commit()
            await metadata.set_dirty(dirty=False)
        self._node.header_changed()


async def _l1_of(node: Qcow2, snapshot: Snapshot) -> array[int]:
    metadata = node.metadata
    if snapshot.l1_table_offset + 8 * snapshot.l1_size > metadata.file.length:
        at = snapshot.l1_table_offset
        raise CorruptError(f"the L1 table of snapshot '{snapshot.id}' at {at:#x} reaches behind the end", at)
    l1 = from_big_endian(await metadata.file.get(snapshot.l1_table_offset, 8 * snapshot.l1_size))
    for index, entry in enumerate(l1):
        l1[index] = entry & ~COPIED
    return l1


async def _tables(metadata: Metadata, l1: MutableSequence[int]) -> AsyncIterator[tuple[int, int, array[int]]]:
    """Every L2 table that an L1 table names: the index there, its offset, and its content on disk."""
    size = metadata.geometry.cluster_size
    for index, entry in enumerate(l1):
        offset = entry & OFFSET
        if offset:
            if offset & (size - 1) or offset >= metadata.file.length:
                raise CorruptError(f"L2 table {index} cannot be at {offset:#x}", offset)
            yield index, offset, from_big_endian(await metadata.file.get(offset, size))


def _entries(geometry: Geometry, values: array[int]) -> Iterator[tuple[int, int]]:
    """The entries of an L2 table that are not empty, with their places in it: most tables are sparse."""
    words = geometry.words
    for start in range(0, len(values), _STRETCH):
        if any(values[start : start + _STRETCH]):
            for place in range(start, min(start + _STRETCH, len(values)), words):
                if values[place]:
                    yield place, values[place]


def _clusters_of(metadata: Metadata, values: array[int]) -> list[tuple[int, int]]:
    """The host clusters that an L2 table points at, adjacent ones together: the first and how many."""
    geometry = metadata.geometry
    bits = geometry.cluster_bits
    found: list[tuple[int, int]] = []
    first = count = 0
    for _, entry in _entries(geometry, values):
        if entry & COMPRESSED:
            found.append(geometry.compressed_clusters(entry))
        elif offset := entry & OFFSET:
            if offset & (geometry.cluster_size - 1):
                raise CorruptError(f"Cluster allocation offset {offset:#x} unaligned", offset)
            cluster = offset >> bits
            if count and cluster == first + count:
                count += 1
            else:
                if count:
                    found.append((first, count))
                first, count = cluster, 1
    if count:
        found.append((first, count))
    return found


async def _count(node: Qcow2, l1: MutableSequence[int], change: int) -> None:
    """Add `change` to the refcount of everything that an L1 table reaches, and make that durable."""
    metadata = node.metadata
    done: list[tuple[int, int]] = []
    try:
        async for _, offset, values in _tables(metadata, l1):
            for first, count in [(offset >> metadata.geometry.cluster_bits, 1), *_clusters_of(metadata, values)]:
                await metadata.refcounts.adjust(first, count, change)
                done.append((first, count))
            if metadata.crowded:
                await metadata.commit()
    except BaseException:
        for first, count in done:
            await metadata.refcounts.adjust(first, count, -change)
        raise
    await metadata.commit()


async def _set_copied(node: Qcow2) -> None:
    """Let COPIED flags of the active tables say what the refcounts do."""
    metadata = node.metadata
    geometry, refcounts = metadata.geometry, metadata.refcounts
    bits = geometry.cluster_bits
    async for index, table, values in _tables(metadata, metadata.l1):
        changed = False
        for place, entry in _entries(geometry, values):
            if entry & COMPRESSED or not entry & OFFSET:
                continue
            count = refcounts.get((entry & OFFSET) >> bits)
            if count is MISSING:
                count = await refcounts.count((entry & OFFSET) >> bits)
            once = count == 1
            wanted = entry | COPIED if once else entry & ~COPIED
            if wanted != entry:
                values[place] = wanted
                changed = True
        if changed:
            await metadata.file.put(table, big_endian(values))
        wanted = table | COPIED if await refcounts.count(table >> bits) == 1 else table
        if wanted != metadata.l1[index]:
            metadata.l1[index] = wanted
            metadata.l1_changed(index)
        first = index << geometry.slices_per_table_bits
        metadata.slices.forget(range(first, first + (1 << geometry.slices_per_table_bits)))
    await metadata.commit()


async def _drop_all(node: Qcow2, l1: MutableSequence[int], l1_offset: int) -> None:
    """Count down all that an L1 table reaches, and itself: nothing on disk refers to it any more."""
    metadata = node.metadata
    bits = metadata.geometry.cluster_bits
    discard = node.pass_discard_snapshot
    async for _, offset, values in _tables(metadata, l1):
        if metadata.known.get(offset >> bits) == "inactive L2 table":
            del metadata.known[offset >> bits]
        metadata.drop(offset >> bits, 1, discard=discard)
        for first, count in _clusters_of(metadata, values):
            node.compressed_space.avoid(first, count)
            metadata.drop(first, count, discard=discard)
    first, count = l1_offset >> bits, metadata.geometry.clusters(8 * len(l1))
    for cluster in range(first, first + count):
        metadata.known.pop(cluster, None)
    if count:
        metadata.drop(first, count, discard=False)
    await metadata.commit()
    await metadata.reclaiming.pause()  # it has been counted down when this returns
    await _set_copied(node)


async def _store(node: Qcow2, snapshots: list[Snapshot]) -> None:
    """Write the list of snapshots to a new place, and let the header point there."""
    metadata = node.metadata
    header = metadata.header
    offset = await metadata.place_table(build(snapshots)) if snapshots else 0
    await metadata.commit()
    await metadata.change_header(nb_snapshots=len(snapshots), snapshots_offset=offset)
    if header.nb_snapshots:
        first = header.snapshots_offset >> header.cluster_bits
        count = metadata.geometry.clusters(len(build(node.snapshots)))
        for cluster in range(first, first + count):
            metadata.known.pop(cluster, None)
        metadata.drop(first, count, discard=False)
    if snapshots:
        metadata.know(offset, len(build(snapshots)), "snapshot table")
    node.snapshots = snapshots
    node.header_changed()
