"""Another size for the disk: a longer L1 table where it is needed, and nothing old where something new should be."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COPIED
from blkferry.drivers.qcow2.words import big_endian
from blkferry.errors import Error, ErrorKind
from blkferry.graph import access
from blkferry.plane.drain import uninterrupted
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

MAX_L1_BYTES = 32 << 20


async def resize(node: Qcow2, length: int) -> None:
    """Make the disk `length` bytes long. Raises Error."""
    await uninterrupted(asyncio.ensure_future(_resize_alone(node, length)))


async def _resize_alone(node: Qcow2, length: int) -> None:
    async with node.reshaping:
        await _resize(node, length)


async def _resize(node: Qcow2, length: int) -> None:
    if length % 512:
        raise Error(ErrorKind.INVALID_ARGUMENT, "The new size must be a multiple of 512", size=length)
    if not node.metadata.writable or node.corrupt:
        raise Error(ErrorKind.DENIED, f"Block node is read-only: '{node.name}'", node=node.name)
    if node.snapshots and node.header.version < 3:
        raise Error(
            ErrorKind.UNSUPPORTED, "Can't resize a v2 image which has snapshots", hint="Delete them, or make it v3."
        )
    node.bitmaps.check_resize(node)
    geometry = node.metadata.geometry
    if geometry.l1_entries(length) * 8 > MAX_L1_BYTES:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"The new size is too large for clusters of {geometry.cluster_size} bytes",
            hint="Convert the image to larger clusters.",
            size=length,
        )
    old = node.length
    try:
        with node.marking_corruption():
            if length < old:
                await _shrink(node, length)
            elif length > old:
                await _grow(node, old, length)
    except OSError as error:
        raise Error.from_oserror("Failed to resize the image", error, node=node.name) from error


async def _shrink(node: Qcow2, length: int) -> None:
    size = node.metadata.geometry.cluster_size
    async with node.frozen():
        await node.remapping.forget(align_up(length, size), align_up(node.length, size))
        await node.metadata.commit()  # first: whoever made the disk longer after a crash would find the old bytes
        await _set_size(node, length)
    node.fit_bitmaps()


async def _grow(node: Qcow2, old: int, length: int) -> None:
    metadata = node.metadata
    async with node.frozen():
        await metadata.commit()
        await grow_l1(node, metadata.geometry.l1_entries(length))
        if node.raw_data is not None and node.raw_data.length < length:
            await node.raw_data.resize(length)
    node.length = length  # nobody has been told yet
    try:
        await _clear_what_was_behind(node, old, length)
        if node.raw_data is not None:
            await _map_raw_data(node, old, length)
        await metadata.commit()
        await _set_size(node, length)
    except BaseException:
        node.length = old
        raise
    node.fit_bitmaps()
    node.retire()


async def _clear_what_was_behind(node: Qcow2, old: int, length: int) -> None:
    """New space reads as zeroes, whatever is in the rest of the last cluster or in a longer backing file."""
    edge = min(align_up(old, node.metadata.geometry.cluster_size), length)
    if edge > old and not await node.remapping.is_zero(old, edge):
        await access.write_zeroes(node, old, edge - old, unmap=False)
    if node.backing_length() > old and length > edge:  # all of it, as QEMU does
        await access.write_zeroes(node, edge, length - edge, unmap=True)


async def _map_raw_data(node: Qcow2, old: int, length: int) -> None:
    """In a raw data file new clusters have their places from the beginning, as QEMU has it and creation does it.

    Whoever reads that file as it is must find what the disk holds: zeroes, also where it was longer than the disk.
    """
    assert node.raw_data is not None
    geometry, metadata = node.metadata.geometry, node.metadata
    await access.write_zeroes(node.raw_data, old, length - old, unmap=True)
    at = align_up(old, geometry.cluster_size)
    while at < length:
        number, values = await node.writing.load_table(at)
        end = min((number + 1) << geometry.slice_shift, align_up(length, geometry.cluster_size))
        index = ((at >> geometry.cluster_bits) & geometry.slice_mask) * geometry.words
        for place in range(index, index + ((end - at) >> geometry.cluster_bits) * geometry.words, geometry.words):
            values[place] = at | COPIED
            if geometry.extended:
                values[place + 1] = ALL_ALLOCATED
            at += geometry.cluster_size
        metadata.slices.touch(number, index, place + geometry.words)


async def _set_size(node: Qcow2, length: int) -> None:
    metadata = node.metadata
    await metadata.change_header(size=length)
    node.header_changed()


async def grow_l1(node: Qcow2, entries: int) -> None:
    """Move the L1 table to a larger place if it has fewer entries. Everything is committed; the node is frozen."""
    metadata = node.metadata
    header = metadata.header
    if entries <= len(metadata.l1):
        return
    l1 = array("Q", metadata.l1)
    l1.frombytes(bytes(8 * (entries - len(l1))))
    offset = await metadata.place_table(big_endian(l1))
    await metadata.commit()
    await metadata.change_header(l1_size=entries, l1_table_offset=offset)
    metadata.l1 = l1
    node.header_changed()
    _moved(node, header.l1_table_offset, 8 * header.l1_size, offset, 8 * entries, "active L1 table")


def _moved(node: Qcow2, old: int, old_length: int, new: int, new_length: int, name: str) -> None:
    metadata = node.metadata
    bits = metadata.geometry.cluster_bits
    first, count = old >> bits, metadata.geometry.clusters(old_length)
    for cluster in range(first, first + count):
        metadata.known.pop(cluster, None)
    metadata.know(new, new_length, name)
    if count:
        metadata.drop(first, count, discard=False)
