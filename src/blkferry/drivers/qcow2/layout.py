"""What an image says of a guest range, in more detail than lookups on the data path need: for maps of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET, ZERO

if TYPE_CHECKING:
    from collections.abc import MutableSequence

    from blkferry.drivers.qcow2.node import Qcow2


class Layout(NamedTuple):
    """`length` bytes that are alike; neither data nor zero means that the image says nothing of them.

    `offset` is their place in the file (the data file where there is one).
    """

    length: int
    data: bool
    zero: bool
    compressed: bool
    offset: int | None


async def layout(node: Qcow2, start: int, length: int) -> Layout:
    """The first stretch of a range. Raises OSError."""
    geometry, metadata = node.metadata.geometry, node.metadata
    number = start >> geometry.slice_shift
    end = min(start + length, (number + 1) << geometry.slice_shift)
    while (table := metadata.slices.get(number)) is None:
        if not metadata.slice_host(number):
            return Layout(_empty(node, start, start + length) - start, False, False, False, None)
        await metadata.load_slice(number)
    table.used = True
    first = _unit(node, table.values, start)
    bits = geometry.unit_bits
    at = min(((start >> bits) + 1) << bits, end)
    if not geometry.extended:
        at = _equals(node, table.values, at, end, bool(first.offset is not None or first.data))
    while at < end:
        found = _unit(node, table.values, at)
        if found[:3] != first[:3] or found.offset != (None if first.offset is None else first.offset + at - start):
            break
        at = min(at + geometry.unit, end)
    return Layout(at - start, *first[:3], first.offset)


def _equals(node: Qcow2, values: MutableSequence[int], at: int, end: int, moves: bool) -> int:
    """Up to where the entries before `at` go on: the same entry, or the next cluster if it has a place."""
    geometry = node.metadata.geometry
    index = ((at - 1) >> geometry.cluster_bits) & geometry.slice_mask
    entry = values[index]
    step = geometry.cluster_size if moves else 0
    while at < end and not entry & COMPRESSED and values[index + 1] == entry + step:
        index, entry, at = index + 1, entry + step, at + geometry.cluster_size
    return min(at, end)


class _Unit(NamedTuple):
    data: bool
    zero: bool
    compressed: bool
    offset: int | None


def _empty(node: Qcow2, start: int, end: int) -> int:
    """Up to where there are no L2 tables."""
    geometry, l1 = node.metadata.geometry, node.metadata.l1
    shift = geometry.cluster_bits + geometry.table_bits
    index = geometry.l1_index(start)
    while index << shift < end and not (index < len(l1) and l1[index] & OFFSET):
        index += 1
    return min(index << shift, end)


def _unit(node: Qcow2, values: MutableSequence[int], at: int) -> _Unit:
    """What the entry of a cluster says, or of a subcluster."""
    geometry = node.metadata.geometry
    index = ((at >> geometry.cluster_bits) & geometry.slice_mask) * geometry.words
    entry = values[index]
    if entry & COMPRESSED:
        return _Unit(data=True, zero=False, compressed=True, offset=None)
    host = entry & OFFSET
    fixed = node.data_file is not None
    has_host = bool(host) or (fixed and bool(entry & COPIED))
    offset = host + (at & (geometry.cluster_size - 1)) if has_host and node.cipher is None else None
    if geometry.extended:
        bit = 1 << ((at & (geometry.cluster_size - 1)) >> geometry.unit_bits)
        bitmap = values[index + 1]
        data, zero = bool(bitmap & ALL_ALLOCATED & bit), bool(bitmap >> 32 & bit)
        return _Unit(data=data, zero=zero and not data, compressed=False, offset=offset)
    zero = geometry.has_zero_flag and bool(entry & ZERO)
    return _Unit(data=has_host and not zero, zero=zero, compressed=False, offset=offset)


async def is_sparse(node: Qcow2) -> bool:
    """Whether the file holds less than its clusters (preallocated metadata), by QEMU's rule. Raises OSError."""
    file = node.file.node
    taken = file.allocated_size()
    if taken is None:
        return False
    size = node.header.cluster_size
    there = taken // size
    threshold = max(there * 10 // 9, there + 2)
    used = 0
    for cluster in range(-(-file.length // size)):
        used += await node.metadata.refcounts.count(cluster) > 0
        if used >= threshold:
            return True
    return False
