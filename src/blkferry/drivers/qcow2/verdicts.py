"""What is wrong with an L1 or L2 entry, what it refers to, and what a repair makes of it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, OFFSET, ZERO, Geometry

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.header import Header

L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE


class Verdict(NamedTuple):
    """On an L2 entry: it uses `length` bytes at `offset` of the image file (none if 0).

    `standard` clusters are allocated and not compressed; they have a `place` in the image or the data file.
    `repaired` and `repaired_bitmap` are the entry as it should be; where nothing is wrong, as it is.
    """

    complaints: list[str]
    repaired: int
    repaired_bitmap: int
    offset: int = 0
    length: int = 0
    standard: bool = False
    compressed: bool = False
    place: int = 0


class Judge:
    """Judges the entries of one image whose file is `file_size` bytes long."""

    def __init__(self, header: Header, file_size: int, *, has_data_file: bool) -> None:
        self.geometry = Geometry(header, header.cluster_size)
        self.cluster_size = header.cluster_size
        self.file_size = file_size
        self.has_data_file = has_data_file
        self.extended = header.extended_l2
        self.reads_zero = ZERO if header.version >= 3 else 0
        inside = header.cluster_size - 1 & OFFSET
        # Standard clusters whose entries have none of these bits, and lie in the file, are sound.
        self.unusual = COMPRESSED | L2_RESERVED | ZERO | inside

    def outside(self, offset: int, length: int) -> bool:
        """Whether a cluster or more of this range is behind the end of the file. The last cluster may be cut off."""
        return offset + length - self.file_size >= self.cluster_size

    def l1(self, entry: int) -> tuple[list[str], int]:
        """What is wrong with an L1 entry that is not 0, and what it should be."""
        complaints = []
        offset = entry & OFFSET
        repaired = entry & ~L1_RESERVED
        if entry & L1_RESERVED:
            complaints.append(f"found L1 entry with reserved bits set: {entry:x}")
        if not offset:
            if not complaints:
                complaints.append(f"L1 entry {entry:x} has flags without an L2 table")
            return complaints, 0
        if offset % self.cluster_size:
            complaints.append(f"l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            repaired = 0
        if self.outside(offset, self.cluster_size):
            complaints.append(f"l2_offset={offset:x}: Table is behind the end of the file")
            repaired = 0
        return complaints, repaired

    def l2(self, entry: int, bitmap: int, guest_offset: int | None) -> Verdict:
        """On an L2 entry. `guest_offset` is what it describes, None where that is not known."""
        if entry & COMPRESSED:
            return self._compressed(entry, bitmap)
        complaints = []
        repaired = entry & ~L2_RESERVED
        if entry & L2_RESERVED:
            complaints.append(f"found l2 entry with reserved bits set: {entry:x}")
        offset = entry & OFFSET
        zero_plain = entry & ZERO and not self.extended and not offset
        at_zero = self.has_data_file and entry & COPIED and not zero_plain
        if not offset and not at_zero:
            if bitmap & ALL_ALLOCATED:
                complaints.append("Unallocated cluster has non-zero subcluster allocation map")
                return Verdict(complaints, 0, self._zero_bitmap(bitmap))
            return Verdict(complaints, repaired, bitmap)
        both = (bitmap >> 32) & bitmap & ALL_ALLOCATED
        if both:
            complaints.append(f"offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
        misaligned = offset % self.cluster_size
        if misaligned:
            complaints.append(f"offset={offset:x}: cluster is not properly aligned; L2 entry corrupted.")
        if self.has_data_file:
            if guest_offset is not None and offset != guest_offset:
                if not misaligned:
                    complaints.append(f"offset={offset:x}: external data file has no cluster {guest_offset:x} there")
                repaired = repaired & ~OFFSET | guest_offset | COPIED
            return Verdict(complaints, repaired, bitmap & ~(both << 32), standard=True, place=offset)
        outside = self.outside(offset, self.cluster_size)
        if outside:
            complaints.append(f"offset={offset:x}: cluster is behind the end of the file")
        if misaligned or outside:
            return Verdict(
                complaints,
                self._nowhere(),
                self._zero_bitmap(bitmap),
                *((0, 0) if outside else (offset, self.cluster_size)),
                standard=True,
                place=offset,
            )
        return Verdict(
            complaints, repaired, bitmap & ~(both << 32), offset, self.cluster_size, standard=True, place=offset
        )

    def _compressed(self, entry: int, bitmap: int) -> Verdict:
        complaints = []
        place = self.geometry.compressed_place(entry & ~COPIED)
        outside = self.outside(place.offset, place.length)
        lost = self.has_data_file or outside
        repaired = self._nowhere() if lost else entry & ~COPIED
        repaired_bitmap = ALL_ZERO if lost and self.extended else 0
        if entry & COPIED:
            complaints.append(f"coffset={place.offset:x}: copied flag must never be set for compressed clusters")
        if self.has_data_file:
            complaints.append(f"compressed cluster with data file, entry={entry:x}")
            return Verdict(complaints, repaired, repaired_bitmap)
        if bitmap:
            complaints.append(f"compressed cluster with non-zero subcluster allocation bitmap, entry={entry:x}")
            return Verdict(complaints, repaired, repaired_bitmap)
        if outside:
            complaints.append(f"coffset={place.offset:x}: compressed cluster is behind the end of the file")
            return Verdict(complaints, repaired, repaired_bitmap, compressed=True)
        return Verdict(complaints, repaired, repaired_bitmap, place.offset, place.length, compressed=True)

    def _nowhere(self) -> int:
        """The entry for a cluster whose bytes are lost. What the backing file has there is older: better zeroes."""
        return 0 if self.extended else self.reads_zero

    def _zero_bitmap(self, bitmap: int) -> int:
        """Subclusters that were allocated read as zeroes now."""
        return (bitmap | bitmap << 32) & ALL_ZERO
