"""How large a qcow2 image will be: what `qemu-img measure -O qcow2` says, to the byte.

Pure arithmetic. The size of refcount structures, which have to count themselves, is found here for whoever lays out an
image as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from blkferry.drivers.qcow2.checks import MAX_L1_SIZE
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.creation import CreateSpec

_DIRECTORY_ENTRY = 24  # bytes of a bitmap's directory entry without its name


class RefcountClusters(NamedTuple):
    """How many clusters the refcount table and the refcount blocks take."""

    table: int
    blocks: int


def refcount_clusters(clusters: int, cluster_size: int, refcount_order: int) -> RefcountClusters:
    """The refcount structures of an image that has `clusters` other clusters, without gaps."""
    per_block = cluster_size * 8 >> refcount_order
    per_table = cluster_size // 8
    table = blocks = 0
    while True:
        more_blocks = -(-(clusters + table + blocks) // per_block)
        more_table = -(-more_blocks // per_table)
        if (more_table, more_blocks) == (table, blocks):
            return RefcountClusters(table, blocks)
        table, blocks = more_table, more_blocks


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of an image file. `bitmaps` comes on top, None where source or target cannot have any."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(
    spec: CreateSpec,
    allocated: Iterable[tuple[int, int]] | None = None,
    *,
    encryption_length: int = 0,
    bitmaps: Iterable[tuple[str, int]] | None = None,
) -> Measured:
    """What an image created by `spec` takes, which `spec.size` bytes are copied to.

    `allocated` are the ranges (start, length) of the source that hold data other than zeroes, in order; None when there
    is no source. `encryption_length` is the length of the LUKS header. `bitmaps` are the source's persistent bitmaps
    that can be copied (name, granularity in bits), None where it cannot have any. Raises Error as `create` would.
    """
    spec.check_format()
    size = align_up(spec.size, spec.cluster_size)
    tables = -(-(size // spec.cluster_size) // spec.l2_entries)
    if tables * 8 > MAX_L1_SIZE:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "The image size is too large (try using a larger cluster size)",
            size=spec.size,
        )
    required = 0
    if spec.preallocates_data or (allocated is not None and spec.backing_file is not None):
        required = size  # nobody knows how much of it the backing file will share
    elif allocated is not None:
        required = _whole_clusters(allocated, spec.cluster_size)
    fully = align_up(encryption_length, spec.cluster_size) + _fully_allocated(size, spec)
    size_of_bitmaps = None if bitmaps is None or spec.version < 3 else _bitmaps(size_of_disk(spec), bitmaps, spec)
    return Measured(fully - size + required, fully, size_of_bitmaps)


def size_of_disk(spec: CreateSpec) -> int:
    """The disk's size in bytes: whole sectors."""
    return align_up(spec.size, 512)


def _whole_clusters(ranges: Iterable[tuple[int, int]], cluster_size: int) -> int:
    """Bytes of the clusters that these ranges touch."""
    found = at = 0
    for start, length in ranges:
        first, end = max(start, at), align_up(start + length, cluster_size)
        if first < end:
            found += end - first + first % cluster_size
            at = end
    return found


def _fully_allocated(size: int, spec: CreateSpec) -> int:
    cluster_size = spec.cluster_size
    l2_tables = -(-(size // cluster_size) // spec.l2_entries)
    l1_clusters = -(-l2_tables * 8 // cluster_size)
    clusters = 1 + l2_tables + l1_clusters + size // cluster_size
    return (clusters + sum(refcount_clusters(clusters, cluster_size, spec.refcount_order))) * cluster_size


def _bitmaps(size: int, bitmaps: Iterable[tuple[str, int]], spec: CreateSpec) -> int:
    total = directory = 0
    for name, granularity_bits in bitmaps:
        bits = -(-size >> granularity_bits)
        clusters = -(-bits // (8 * spec.cluster_size))
        total += clusters * spec.cluster_size + align_up(clusters * 8, spec.cluster_size)
        directory += align_up(_DIRECTORY_ENTRY + len(name.encode(errors="surrogateescape")), 8)
    return total + align_up(directory, spec.cluster_size)
