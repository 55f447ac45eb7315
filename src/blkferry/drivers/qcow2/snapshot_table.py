"""The snapshot table of qcow2: one entry of variable length per internal snapshot.

How long the table is stands nowhere, so that `SnapshotTableReader` takes it in pieces and says how much it still wants.
Specification: "Snapshots" in QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blkferry.drivers.qcow2.checks import MAX_L1_SIZE, check_table, corrupt, decode
from blkferry.drivers.qcow2.header import MAX_SNAPSHOTS, SNAPSHOT_ENTRY_SIZE, Header
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

MAX_EXTRA_DATA: Final = 1024  # bytes an entry, QEMU's
MAX_TABLE_SIZE: Final = 1024 * MAX_SNAPSHOTS  # bytes, QEMU's
NO_ICOUNT: Final = -1

_STRUCTURE: Final = "snapshot table"
# l1_table_offset, l1_size, length of ID, length of name, date_sec, date_nsec, vm_clock_nsec, 32 bits of vm_state_size,
# length of extra data
_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQq")  # vm_state_size, disk_size, icount
_VM_STATE_END: Final = 8
_DISK_SIZE_END: Final = 16
_NO_DISK_SIZE: Final = struct.Struct(">Q")  # the extra data of a snapshot that does not know its disk's size

assert _ENTRY.size == SNAPSHOT_ENTRY_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One internal snapshot. Without `disk_size` (version 2 only) its disk is as large as the active one."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int = 0
    disk_size: int | None
    icount: int = NO_ICOUNT
    unknown_extra: bytes = b""


class SnapshotTableReader:
    """Takes the table as it comes from the file, from `header.snapshots_offset` on, in pieces of any length.

    While `wanted` is not 0, at least so many bytes are missing (at most an entry's 130 KiB). What comes behind the
    table's end is ignored, so that whole clusters can be read; a file that ends before that cuts the table off.
    """

    def __init__(self, count: int, header: Header) -> None:
        self.snapshots: list[Snapshot] = []
        self.length = 0
        """Bytes of the table that have been understood: all of it once nothing is wanted."""
        self._count = count
        self._header = header
        self._kept = bytearray()  # begins at _base
        self._base = 0
        self._entry_length = _ENTRY.size
        if count > MAX_SNAPSHOTS:
            hint = f"it has {count} entries, at most {MAX_SNAPSHOTS} are supported"
            raise corrupt("Snapshot table too large", structure=_STRUCTURE, offset=header.snapshots_offset, hint=hint)

    @property
    def wanted(self) -> int:
        if len(self.snapshots) == self._count:
            return 0
        return align_up(self.length, 8) + self._entry_length - self._base - len(self._kept)

    def receive(self, data: bytes) -> None:
        if not self.wanted:
            return
        self._kept += data
        while len(self.snapshots) < self._count and self.wanted <= 0:
            at = align_up(self.length, 8)
            self._entry_length = self._length_of(at)
            if at + self._entry_length > MAX_TABLE_SIZE:
                hint = f"its first {len(self.snapshots) + 1} entries end behind {MAX_TABLE_SIZE} bytes"
                raise self._corrupt("Snapshot table is too big", at, hint)
            if self.wanted <= 0:
                self.snapshots.append(self._entry(at))
                self.length = at + self._entry_length
                self._entry_length = _ENTRY.size
        # The part that has been understood goes once for all entries: once for each would be quadratic.
        done = min(align_up(self.length, 8) - self._base, len(self._kept))
        del self._kept[:done]
        self._base += done

    def _length_of(self, at: int) -> int:
        *_, extra_size = fields = _ENTRY.unpack_from(self._kept, at - self._base)
        if extra_size > MAX_EXTRA_DATA:
            sentence = f"Too much extra metadata in snapshot table entry {len(self.snapshots)}"
            hint = "you can force-remove this extra metadata with qemu-img check -r all"
            raise self._corrupt(sentence, at, hint)
        return _ENTRY.size + int(extra_size) + int(fields[2]) + int(fields[3])

    def _entry(self, at: int) -> Snapshot:
        start = at - self._base
        (
            *(l1_table_offset, l1_size, id_size, name_size, date_sec, date_nsec, vm_clock_nsec, vm_state_size),
            extra_size,
        ) = _ENTRY.unpack_from(self._kept, start)
        name_at = start + self._entry_length - name_size
        id_at = name_at - id_size
        extra = bytes(self._kept[start + _ENTRY.size : id_at])
        # A field that is not there whole is not there.
        if extra_size < _DISK_SIZE_END and self._header.version >= 3:
            hint = "qemu-img check -r all can repair it"
            raise self._corrupt(f"Snapshot table entry {len(self.snapshots)} is incomplete", at, hint)
        large_size, disk_size, icount = _EXTRA.unpack(extra[: _EXTRA.size].ljust(_EXTRA.size, b"\0"))
        check_table(
            "Snapshot L1 table",
            offset=l1_table_offset,
            entries=l1_size,
            entry_size=8,
            limit=MAX_L1_SIZE,
            cluster_size=self._header.cluster_size,
        )
        return Snapshot(
            id=decode(bytes(self._kept[id_at:name_at])),
            name=decode(bytes(self._kept[name_at : name_at + name_size])),
            l1_table_offset=l1_table_offset,
            l1_size=l1_size,
            date_sec=date_sec,
            date_nsec=date_nsec,
            vm_clock_nsec=vm_clock_nsec,
            vm_state_size=large_size if extra_size >= _VM_STATE_END else vm_state_size,
            disk_size=disk_size if extra_size >= _DISK_SIZE_END else None,
            icount=icount if extra_size >= _EXTRA.size else NO_ICOUNT,
            unknown_extra=extra[_EXTRA.size :],
        )

    def _corrupt(self, sentence: str, at: int, hint: str) -> Error:
        offset = self._header.snapshots_offset + at
        return corrupt(sentence, structure=_STRUCTURE, offset=offset, hint=f"at {offset:#x}: {hint}")


def parse(data: bytes, count: int, header: Header) -> list[Snapshot]:
    """The first `count` snapshots of a table that is in memory whole; bytes behind it are ignored."""
    reader = SnapshotTableReader(count, header)
    reader.receive(data)
    if reader.wanted:
        offset = header.snapshots_offset
        hint = f"entry {len(reader.snapshots)} lacks {reader.wanted} bytes"
        raise corrupt(f"Snapshot table at {offset:#x} is cut off", structure=_STRUCTURE, offset=offset, hint=hint)
    return reader.snapshots


def build(snapshots: Sequence[Snapshot]) -> bytes:
    """The table of these snapshots, with the extra data that QEMU writes."""
    if len(snapshots) > MAX_SNAPSHOTS:
        raise Error(ErrorKind.NO_SPACE, f"An image cannot have more than {MAX_SNAPSHOTS} internal snapshots")
    table = b"".join(_build(snapshot) for snapshot in snapshots)
    if len(table) > MAX_TABLE_SIZE:
        raise Error(ErrorKind.NO_SPACE, f"Snapshot table is too big ({len(table)} bytes, at most {MAX_TABLE_SIZE})")
    return table


def _build(snapshot: Snapshot) -> bytes:
    if snapshot.disk_size is None:
        if snapshot.icount != NO_ICOUNT or snapshot.unknown_extra:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Snapshot '{snapshot.id}' must know the size of its disk")
        extra = _NO_DISK_SIZE.pack(snapshot.vm_state_size)
    else:
        extra = _EXTRA.pack(snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) + snapshot.unknown_extra
    # Either may be empty, which encode() is not made for.
    id_field, name_field = (text.encode(errors="surrogateescape") for text in (snapshot.id, snapshot.name))
    if len(extra) > MAX_EXTRA_DATA or max(len(id_field), len(name_field)) > 0xFFFF:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Snapshot '{snapshot.id}' has too long a name or too much extra data")
    entry = _ENTRY.pack(
        *(snapshot.l1_table_offset, snapshot.l1_size, len(id_field), len(name_field)),
        *(snapshot.date_sec, snapshot.date_nsec, snapshot.vm_clock_nsec),
        # Who reads only the 32 bits shall take it for a snapshot of the disk alone rather than cut its state off.
        snapshot.vm_state_size if snapshot.vm_state_size < 1 << 32 else 0,
        len(extra),
    )
    built = entry + extra + id_field + name_field
    return built + bytes(-len(built) % 8)
