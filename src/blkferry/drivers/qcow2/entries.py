"""L1 and L2 entries: their bits, and the arithmetic between guest offsets, tables and clusters.

Everything here is pure. "Cluster" alone is the index of a guest cluster; host places are byte offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.header import Header

COPIED = 1 << 63
"""The refcount is exactly one: this cluster or table may be overwritten where it is."""

COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FF_FFFF_FFFF_FE00
ALL_ALLOCATED = (1 << 32) - 1
ALL_ZERO = ALL_ALLOCATED << 32
"""Subcluster bitmaps: the low half says which are allocated, the high half which read as zero."""

SECTOR_BITS = 9


class CompressedPlace(NamedTuple):
    """Where the compressed bytes of a cluster are: from `offset`, at most `length` bytes."""

    offset: int
    length: int


class Geometry:
    """How an image divides guest offsets; made once from its header.

    `unit` is the smallest range that can be allocated on its own, in bytes: a subcluster, or a cluster where there are
    none. An L2 entry is `words` 64-bit numbers long. `slice_entries` of them are cached together: a slice of a table.
    """

    def __init__(self, header: Header, slice_bytes: int) -> None:
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << header.cluster_bits
        self.extended = header.extended_l2
        self.words = 2 if self.extended else 1
        self.unit = self.cluster_size // 32 if self.extended else self.cluster_size
        self.unit_bits = self.unit.bit_length() - 1
        self.table_bits = self.cluster_bits - (4 if self.extended else 3)
        self.table_clusters = 1 << self.table_bits
        """How many guest clusters one L2 table describes."""
        self.slice_bytes = min(slice_bytes, self.cluster_size)
        self.slice_entries = self.slice_bytes // (8 * self.words)
        self.slice_mask = self.slice_entries - 1
        self.slice_shift = self.cluster_bits + self.slice_entries.bit_length() - 1
        """Guest offset to slice number."""
        self.slices_per_table_bits = self.table_bits - (self.slice_entries.bit_length() - 1)
        self.has_zero_flag = header.version >= 3 and not self.extended
        self._compressed_size_bits = self.cluster_bits - 8

    def l1_index(self, guest_offset: int) -> int:
        return guest_offset >> (self.cluster_bits + self.table_bits)

    def l1_entries(self, size: int) -> int:
        """How many L1 entries a disk of `size` bytes has."""
        per_table = 1 << (self.cluster_bits + self.table_bits)
        return -(-size // per_table)

    def clusters(self, length: int) -> int:
        """How many clusters `length` bytes take."""
        return (length + self.cluster_size - 1) >> self.cluster_bits

    def compressed_place(self, entry: int) -> CompressedPlace:
        """Take the descriptor of a compressed cluster apart."""
        shift = 62 - self._compressed_size_bits
        offset = entry & ((1 << shift) - 1)
        sectors = ((entry >> shift) & ((1 << self._compressed_size_bits) - 1)) + 1
        return CompressedPlace(offset, (sectors << SECTOR_BITS) - (offset & 511))

    def compressed_clusters(self, entry: int) -> tuple[int, int]:
        """The first host cluster that a compressed cluster has a part of, and how many there are."""
        offset, length = self.compressed_place(entry)
        first = offset >> self.cluster_bits
        return first, ((offset + length - 1) >> self.cluster_bits) - first + 1

    def compressed_entry(self, place: CompressedPlace) -> int:
        """The descriptor of a compressed cluster at `place`; `length` is that of the compressed bytes."""
        offset, length = place
        sectors = ((offset + length - 1) >> SECTOR_BITS) - (offset >> SECTOR_BITS)
        return COMPRESSED | offset | sectors << (62 - self._compressed_size_bits)

    def compressed_offset_limit(self) -> int:
        """Compressed bytes have to begin below this offset."""
        return 1 << min(62 - self._compressed_size_bits, 56)
