"""The bitmap directory of qcow2, one entry per persistent bitmap, and the bitmap tables that entries point to.

Where the directory is stands in the header's bitmaps extension. Specification: "Bitmaps" in QEMU's
docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import KEEP, IntFlag
from typing import Final

from blkferry.drivers.qcow2.checks import MAX_OFFSET, corrupt, decode, encode, printable
from blkferry.drivers.qcow2.extensions import MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAPS
from blkferry.drivers.qcow2.header import Header
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

MIN_GRANULARITY_BITS: Final = 9  # QEMU's
MAX_GRANULARITY_BITS: Final = 31  # QEMU's
MAX_NAME: Final = 1023  # bytes
MAX_TABLE_SIZE: Final = 0x8000000  # entries, QEMU's
MAX_BITMAP_SIZE: Final = 0x20000000  # bytes; QEMU's limit for what a bitmap takes in memory

ALL_ONES: Final = 1
"""The entry of a bitmap table for a cluster of ones that is not stored. 0 is one of zeroes, all else is an offset."""

_STRUCTURE: Final = "bitmap directory"
_DIRTY_TRACKING: Final = 1  # the only type there is
_ENTRY: Final = struct.Struct(">QIIBBHI")  # table offset, table size, flags, type, granularity, name and extra length
_TABLE_RESERVED: Final = 0xFF000000000001FE


class BitmapFlags(IntFlag, boundary=KEEP):
    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


_FLAGS: Final = sum(BitmapFlags)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapEntry:
    """One persistent bitmap. While IN_USE is set, neither its data nor the size of its table can be trusted."""

    name: str
    table_offset: int
    table_size: int
    flags: BitmapFlags = BitmapFlags(0)  # noqa: RUF009 - flags are immutable
    granularity_bits: int = 16
    extra_data: bytes = b""

    @property
    def usable(self) -> bool:
        """Whether we may use this bitmap rather than only keep it."""
        known = not self.extra_data or BitmapFlags.EXTRA_DATA_COMPATIBLE in self.flags
        return known and MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS

    def check(self, header: Header) -> None:
        """Refuse what the specification or QEMU's limits do not allow in an image with this header."""
        allocated = self.table_size * header.cluster_size
        needed = table_size_of(header.size, self.granularity_bits, header.cluster_size)
        if self.flags & ~_FLAGS:
            wrong = f"flags {self.flags:#x}"
        elif self.granularity_bits > 63:
            wrong = f"granularity 2^{self.granularity_bits}"
        elif self.table_offset % header.cluster_size or not 0 < self.table_offset <= MAX_OFFSET - self.table_size * 8:
            wrong = f"table offset {self.table_offset:#x}"
        elif not 0 < self.table_size <= MAX_TABLE_SIZE or allocated > MAX_BITMAP_SIZE:
            wrong = f"table of {self.table_size} entries"
        elif BitmapFlags.IN_USE not in self.flags and self.table_size != needed:
            wrong = f"table of {self.table_size} entries, where the disk's size needs {needed}"
        else:
            return
        raise corrupt(
            f"Bitmap '{printable(self.name)}' doesn't satisfy the constraints",
            structure=_STRUCTURE,
            offset=self.table_offset,
            hint=wrong,
        )


def table_size_of(size: int, granularity_bits: int, cluster_size: int) -> int:
    """Entries in the table of a bitmap for a disk of `size` bytes."""
    bits = -(-size >> granularity_bits)
    return -(-bits // (8 * cluster_size))


def parse(data: bytes, count: int, header: Header) -> list[BitmapEntry]:
    """The bitmaps of a directory that `data` is the whole of, and that has `count` entries."""
    found: dict[str, BitmapEntry] = {}
    at = 0
    while at < len(data):
        if len(found) == count:
            raise _broken("More bitmaps found than specified in header extension", header, at)
        entry, at = _parse_entry(data, at, header)
        if entry.name in found:
            raise _broken("Broken bitmap directory", header, at, f"two bitmaps are called '{printable(entry.name)}'")
        entry.check(header)
        found[entry.name] = entry
    if len(found) != count:
        raise _broken("Less bitmaps found than specified in header extension", header, at)
    return list(found.values())


def _parse_entry(data: bytes, at: int, header: Header) -> tuple[BitmapEntry, int]:
    extra_at = at + _ENTRY.size
    if extra_at > len(data):
        raise _broken("Broken bitmap directory", header, at, "an entry is cut off")
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = _ENTRY.unpack_from(data, at)
    name_at = extra_at + extra_size
    end = name_at + name_size
    after = align_up(end, 8)
    if after > len(data):
        raise _broken("Broken bitmap directory", header, at, "an entry is cut off")
    name = decode(data[name_at:end])
    if any(data[end:after]):
        raise _broken("Broken bitmap directory", header, at, "the padding of an entry is not zero")
    if kind != _DIRTY_TRACKING or not name or name_size > MAX_NAME:
        hint = f"type {kind}" if kind != _DIRTY_TRACKING else f"name of {name_size} bytes"
        raise _broken(f"Bitmap '{printable(name[:MAX_NAME])}' doesn't satisfy the constraints", header, at, hint)
    entry = BitmapEntry(
        name=name,
        table_offset=table_offset,
        table_size=table_size,
        flags=BitmapFlags(flags),
        granularity_bits=granularity_bits,
        extra_data=data[extra_at:name_at],
    )
    return entry, after


def _broken(sentence: str, header: Header, at: int, hint: str = "") -> Error:
    offset = at + (header.bitmaps.directory_offset if header.bitmaps is not None else 0)
    return corrupt(sentence, structure=_STRUCTURE, offset=offset, hint=f"at {offset:#x}: {hint}" if hint else "")


def build(entries: Sequence[BitmapEntry], header: Header) -> bytes:
    """The directory of these bitmaps; raises Error for what `parse` would refuse."""
    for entry in entries:
        entry.check(header)
    if len({entry.name for entry in entries}) != len(entries):
        raise Error(ErrorKind.EXISTS, "Bitmaps of one image need different names")
    directory = b"".join(_build_entry(entry) for entry in entries)
    if len(entries) > MAX_BITMAPS or len(directory) > MAX_BITMAP_DIRECTORY_SIZE:
        sentence = f"A bitmap directory of {len(entries)} entries and {len(directory)} bytes is too big"
        hint = f"there may be {MAX_BITMAPS} entries and {MAX_BITMAP_DIRECTORY_SIZE} bytes"
        raise Error(ErrorKind.NO_SPACE, sentence, hint=hint)
    return directory


def entry_size(name: str) -> int:
    """Bytes that the entry of a bitmap of this name, without extra data, takes in the directory."""
    return align_up(_ENTRY.size + len(encode(name, "Bitmap name")), 8)


def _build_entry(entry: BitmapEntry) -> bytes:
    name = encode(entry.name, "Bitmap name")
    if len(name) > MAX_NAME:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Name length exceeds maximum ({MAX_NAME} characters)")
    head = _ENTRY.pack(
        *(entry.table_offset, entry.table_size, entry.flags, _DIRTY_TRACKING, entry.granularity_bits),
        *(len(name), len(entry.extra_data)),
    )
    built = head + entry.extra_data + name
    return built + bytes(-len(built) % 8)


def parse_table(data: bytes, cluster_size: int) -> list[int]:
    """The entries of a bitmap table: 0, ALL_ONES or the offset of a cluster of bits."""
    entries = [entry for (entry,) in struct.iter_unpack(">Q", data)]
    _check_table(entries, cluster_size)
    return entries


def build_table(entries: Sequence[int], cluster_size: int) -> bytes:
    """The bitmap table of these entries; raises Error for what `parse_table` would refuse."""
    _check_table(entries, cluster_size)
    return struct.pack(f">{len(entries)}Q", *entries)


def _check_table(entries: Iterable[int], cluster_size: int) -> None:
    # Bits of an offset within a cluster and reserved bits at once; bit 0 is only for clusters that are not stored.
    mask = _TABLE_RESERVED | cluster_size - 1
    for index, entry in enumerate(entries):
        if entry & mask and entry != ALL_ONES:
            sentence = f"Bitmap table entry {index} is invalid: {entry:#x}"
            raise corrupt(sentence, structure="bitmap table", offset=index * 8)
