"""The snapshot table as it is on disk, for checking and repairing it: nothing but the lengths of entries is believed.

`snapshot_table` is stricter: what it accepts needs no repair here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.checks import MAX_L1_SIZE, decode, printable
from blkferry.drivers.qcow2.snapshot_table import MAX_EXTRA_DATA, MAX_TABLE_SIZE
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.header import Header
    from blkferry.drivers.qcow2.hostfile import HostFile

_HEAD = struct.Struct(">QIHH")  # l1_table_offset, l1_size, length of ID, length of name
_MIDDLE = 16  # bytes of dates and clocks, as they are
_TAIL = struct.Struct(">II")  # 32 bits of vm_state_size, length of extra data
_EXTRA = struct.Struct(">QQ")  # what version 3 must have: vm_state_size, disk_size
_FIXED = _HEAD.size + _MIDDLE + _TAIL.size
_PIECE = 1 << 16
_SHOWN = 64  # bytes of a name that messages have room for


@dataclass(frozen=True, slots=True)
class RawSnapshot:
    """One entry. `extra` is None where there is more of it than we are ready to read."""

    l1_table_offset: int
    l1_size: int
    middle: bytes
    vm_state_size: int
    extra: bytes | None
    id: bytes
    name: bytes

    @property
    def label(self) -> str:
        """ID and name as they may stand in a sentence."""
        shown_id, name = (printable(decode(text[:_SHOWN])) for text in (self.id, self.name))
        return f"{shown_id} ({name})"

    def complaints(self, header: Header) -> list[str]:
        """What has to be changed in this entry itself."""
        found = []
        if self.extra is None:
            found.append(f"snapshot {self.label}: too much extra metadata in its table entry")
        elif len(self.extra) < _EXTRA.size and header.version >= 3:
            found.append(f"snapshot {self.label}: snapshot table entry is incomplete")
        if self.l1_table_offset % header.cluster_size:
            found.append(f"snapshot {self.label} l1_offset={self.l1_table_offset:#x}: L1 table is not cluster aligned")
        if self.l1_size > MAX_L1_SIZE // 8:
            found.append(f"snapshot {self.label} l1_size={self.l1_size:#x}: L1 table is too large")
        return found

    def l1_usable(self, header: Header) -> bool:
        """Whether its L1 table may be looked for in the file."""
        return not self.l1_table_offset % header.cluster_size and self.l1_size <= MAX_L1_SIZE // 8

    def without_l1(self) -> RawSnapshot:
        """The same, holding nothing."""
        return replace(self, l1_table_offset=0, l1_size=0)

    def complete(self, header: Header) -> RawSnapshot:
        """The same with the extra data that version 3 needs; its disk is taken to be as large as the active one."""
        extra = self.extra or b""
        if len(extra) >= _EXTRA.size or (header.version < 3 and self.extra is not None):
            return self
        large = int.from_bytes(extra[:8], "big") if len(extra) >= 8 else self.vm_state_size
        return replace(self, extra=_EXTRA.pack(large, header.size))

    def build(self) -> bytes:
        extra = self.extra or b""
        head = _HEAD.pack(self.l1_table_offset, self.l1_size, len(self.id), len(self.name))
        built = head + self.middle + _TAIL.pack(self.vm_state_size, len(extra)) + extra + self.id + self.name
        return built + bytes(-len(built) % 8)


async def read(host: HostFile, header: Header) -> tuple[list[RawSnapshot], int]:
    """All snapshots, and how many bytes their table has. Raises Error where that cannot be told."""
    table = _Window(host, header.snapshots_offset)
    found: list[RawSnapshot] = []
    at = end = 0
    for _ in range(header.nb_snapshots):
        head = await table.get(at, _FIXED)
        l1_table_offset, l1_size, id_size, name_size = _HEAD.unpack_from(head)
        vm_state_size, extra_size = _TAIL.unpack_from(head, _HEAD.size + _MIDDLE)
        strings_at = at + _FIXED + extra_size
        end = strings_at + id_size + name_size
        if end > MAX_TABLE_SIZE or header.snapshots_offset + end > host.length:
            raise Error(
                ErrorKind.CORRUPT,
                f"snapshot table entry {len(found)} ends behind the end of the table or of the file",
                offset=header.snapshots_offset + at,
            )
        extra = await table.get(at + _FIXED, extra_size) if extra_size <= MAX_EXTRA_DATA else None
        strings = await table.get(strings_at, id_size + name_size)
        found.append(
            RawSnapshot(
                l1_table_offset,
                l1_size,
                head[_HEAD.size : _HEAD.size + _MIDDLE],
                vm_state_size,
                extra,
                strings[:id_size],
                strings[id_size:],
            )
        )
        at = align_up(end, 8)
    return found, end


class _Window:
    """Bytes of a table, read in larger pieces than they are asked for."""

    def __init__(self, host: HostFile, offset: int) -> None:
        self._host = host
        self._offset = offset
        self._start = 0
        self._bytes = b""

    async def get(self, at: int, length: int) -> bytes:
        skip = at - self._start
        if skip < 0 or skip + length > len(self._bytes):
            self._bytes = bytes(await self._host.get(self._offset + at, max(length, _PIECE)))
            self._start, skip = at, 0
        return self._bytes[skip : skip + length]
