"""What the kernel asks: one message for each read of the device, a header and what belongs to its kind.

Everything is checked here, for whoever opened the device need not be the kernel as we know it: `parse` raises
ProtocolError for messages whose length does not fit, and the layouts have no other way to be wrong. Numbers are in the
machine's own byte order (`=`), as everywhere in this protocol.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from blkferry.errors import Error, ErrorKind
from blkferry.wire.fuse.constants import Opcode

Bytes = bytes | bytearray | memoryview

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
HEAD: Final = struct.Struct("=IIQQ16xQQI")
"""As much of a READ or WRITE as is needed: length, opcode, unique, nodeid, fh, offset, size."""

READ_SIZE: Final = IN_HEADER.size + 40
"""The length of a READ, and of a WRITE without its data."""


class ProtocolError(Error):
    """A message that no kernel sends. `unique` is the request it would be, 0 if not even that can be told."""

    def __init__(self, message: str, unique: int = 0) -> None:
        super().__init__(ErrorKind.CORRUPT, message)
        self.unique = unique


class InHeader(NamedTuple):
    """What every request begins with. `opcode` may be one that we do not know; `extensions` is in units of 8 bytes."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


class Init(NamedTuple):
    """INIT. `flags2` is the upper half of the flags, for kernels that have it."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int


class Getattr(NamedTuple):
    """GETATTR. `fh` means something if `flags` says so."""

    flags: int
    dummy: int
    fh: int


class Setattr(NamedTuple):
    """SETATTR; `valid` (Fattr) says which of the others are meant."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atime_nsec: int
    mtime_nsec: int
    ctime_nsec: int
    mode: int
    uid: int
    gid: int


class Statx(NamedTuple):
    """STATX."""

    getattr_flags: int
    fh: int
    flags: int
    mask: int


class Open(NamedTuple):
    """OPEN. `flags` are those of open(2), without O_CREAT and the like."""

    flags: int
    open_flags: int


class Transfer(NamedTuple):
    """READ, and WRITE without its data. `size` is in bytes."""

    fh: int
    offset: int
    size: int
    transfer_flags: int
    lock_owner: int
    flags: int


class Release(NamedTuple):
    """RELEASE: the last descriptor of an open file is closed."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class Flush(NamedTuple):
    """FLUSH: a descriptor is closed."""

    fh: int
    lock_owner: int


class Fsync(NamedTuple):
    """FSYNC."""

    fh: int
    flags: int


class Fallocate(NamedTuple):
    """FALLOCATE, with a mode of fallocate(2)."""

    fh: int
    offset: int
    length: int
    mode: int


class Lseek(NamedTuple):
    """LSEEK; `whence` is SEEK_DATA or SEEK_HOLE."""

    fh: int
    offset: int
    whence: int


class Interrupt(NamedTuple):
    """INTERRUPT: whoever waits for request `unique` got a signal."""

    unique: int


Body = (
    Init | Getattr | Setattr | Statx | Open | Transfer | Release | Flush | Fsync | Fallocate | Lseek | Interrupt | None
)

_BODIES: Final[dict[int, tuple[struct.Struct, type[NamedTuple]]]] = {
    Opcode.GETATTR: (struct.Struct("=IIQ"), Getattr),
    Opcode.SETATTR: (struct.Struct("=I4xQQQQQQIIII4xII4x"), Setattr),
    Opcode.STATX: (struct.Struct("=I4xQII"), Statx),
    Opcode.OPEN: (struct.Struct("=II"), Open),
    Opcode.READ: (struct.Struct("=QQIIQI4x"), Transfer),
    Opcode.WRITE: (struct.Struct("=QQIIQI4x"), Transfer),
    Opcode.RELEASE: (struct.Struct("=QIIQ"), Release),
    Opcode.FLUSH: (struct.Struct("=Q8xQ"), Flush),
    Opcode.FSYNC: (struct.Struct("=QI4x"), Fsync),
    Opcode.FALLOCATE: (struct.Struct("=QQQI4x"), Fallocate),
    Opcode.LSEEK: (struct.Struct("=QQI4x"), Lseek),
    Opcode.INTERRUPT: (struct.Struct("=Q"), Interrupt),
}
_INIT_SHORT: Final = struct.Struct("=IIII")
_INIT: Final = struct.Struct("=IIIII44x")  # since 7.36


class Request(NamedTuple):
    """A message. `body` is None for kinds that we refuse or that have nothing to say; `data` is what a WRITE brings."""

    header: InHeader
    body: Body
    data: memoryview


def parse(message: memoryview) -> Request:
    """Read a whole message. Raises ProtocolError."""
    if len(message) < IN_HEADER.size:
        raise ProtocolError(f"a request is at least {IN_HEADER.size} bytes long, not {len(message)}")
    header = InHeader(*IN_HEADER.unpack_from(message))
    if header.length != len(message):
        raise ProtocolError(f"a request of {len(message)} bytes says that it has {header.length}", header.unique)
    payload = message[IN_HEADER.size :]
    if header.opcode == Opcode.INIT:
        return Request(header, _parse_init(payload, header.unique), payload[:0])
    layout, kind = _BODIES.get(header.opcode, (None, None))
    if layout is None or kind is None:
        return Request(header, None, payload[:0])
    if len(payload) < layout.size:
        raise _misfit(header, len(payload), layout.size)
    body: Body = kind(*layout.unpack_from(payload))  # type: ignore[assignment]
    data = payload[layout.size :]
    expected = body.size if isinstance(body, Transfer) and header.opcode == Opcode.WRITE else 0
    if len(data) != expected:
        raise _misfit(header, len(payload), layout.size + expected)
    return Request(header, body, data)


def _misfit(header: InHeader, length: int, expected: int) -> ProtocolError:
    name = Opcode(header.opcode).name
    return ProtocolError(f"{name} has {length} bytes after its header instead of {expected}", header.unique)


def _parse_init(payload: memoryview, unique: int) -> Init:
    """INIT grows with the protocol, and is what tells its version: what we do not know of it is left alone."""
    if len(payload) >= _INIT.size:
        return Init(*_INIT.unpack_from(payload))
    if len(payload) >= _INIT_SHORT.size:
        major, minor, max_readahead, flags = _INIT_SHORT.unpack_from(payload)
        return Init(major, minor, max_readahead, flags, 0)
    raise ProtocolError(f"INIT has {len(payload)} bytes after its header instead of {_INIT.size}", unique)
