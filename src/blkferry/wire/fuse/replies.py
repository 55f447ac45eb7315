"""What the kernel is answered, and what it is told unasked. All builders return whole messages."""

from __future__ import annotations

import errno
import struct
from typing import Final, NamedTuple

from blkferry.errors import Error, ErrorKind
from blkferry.wire.fuse.constants import ROOT_ID, Notify

OUT_HEADER: Final = struct.Struct("=IiQ")
"""Length of the reply, 0 or a negated errno, unique. Data of a READ follow as they are."""

WRITE_REPLY: Final = struct.Struct("=IiQI4x")
"""A whole reply to WRITE: header, and how many bytes were written."""

ERRNO_OF_KIND: Final = {
    ErrorKind.NOT_FOUND: errno.ENOENT,
    ErrorKind.EXISTS: errno.EEXIST,
    ErrorKind.BUSY: errno.EBUSY,
    ErrorKind.DENIED: errno.EACCES,
    ErrorKind.INVALID_ARGUMENT: errno.EINVAL,
    ErrorKind.UNSUPPORTED: errno.EOPNOTSUPP,
    ErrorKind.CORRUPT: errno.EIO,
    ErrorKind.IO: errno.EIO,
    ErrorKind.NO_SPACE: errno.ENOSPC,
    ErrorKind.GONE: errno.EIO,
    ErrorKind.UNKNOWN_COMMAND: errno.ENOSYS,
}

_ATTR: Final = struct.Struct("=6Q10I")
_ATTR_OUT: Final = struct.Struct("=QI4x")
_STATX_OUT: Final = struct.Struct("=QI4x16x")
_STATX: Final = struct.Struct("=IIQIIIHxxQQQQ" + "qI4x" * 4 + "4I112x")
_OPEN_OUT: Final = struct.Struct("=QIi")
_STATFS_OUT: Final = struct.Struct("=5Q3I28x")
_LSEEK_OUT: Final = struct.Struct("=Q")
_INVAL_INODE: Final = struct.Struct("=Qqq")

BACKING_MAP: Final = struct.Struct("=iI8x")
"""The argument of DEV_IOC_BACKING_OPEN: descriptor, flags (0)."""

BACKING_ID: Final = struct.Struct("=I")
"""The argument of DEV_IOC_BACKING_CLOSE."""

_STATX_BASIC: Final = 0x7FF
"""STATX_BASIC_STATS: type, mode, nlink, uid, gid, three times, inode, size and blocks."""

_NANO: Final = 1_000_000_000


class Attributes(NamedTuple):
    """A file's attributes. `size` in bytes, `blocks` of 512, `blksize` in bytes, times in ns since 1970."""

    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    uid: int
    gid: int
    blksize: int


def errno_of(error: Error) -> int:
    """What the kernel is told of an error: what the system said, if that is where it comes from."""
    told = error.facts.get("errno")
    return told if isinstance(told, int) and told > 0 else ERRNO_OF_KIND[error.kind]


def success(unique: int, payload: bytes | bytearray = b"") -> bytes:
    """The reply to a request that was executed."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def failure(unique: int, error: int) -> bytes:
    """The reply to a request that was not; `error` is an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)


def attr_reply(unique: int, attributes: Attributes, valid_seconds: int) -> bytes:
    """The reply to GETATTR and SETATTR. The kernel may believe it for so long."""
    size, blocks, atime, mtime, ctime, mode, uid, gid, blksize = attributes
    seconds, nanoseconds = zip(*(divmod(time, _NANO) for time in (atime, mtime, ctime)), strict=True)
    attr = _ATTR.pack(ROOT_ID, size, blocks, *seconds, *nanoseconds, mode, 1, uid, gid, 0, blksize, 0)
    return success(unique, _ATTR_OUT.pack(valid_seconds, 0) + attr)


def statx_reply(unique: int, attributes: Attributes, valid_seconds: int) -> bytes:
    """The reply to STATX. There is no time of birth."""
    size, blocks, atime, mtime, ctime, mode, uid, gid, blksize = attributes
    times = [part for time in (atime, 0, ctime, mtime) for part in divmod(time, _NANO)]
    counts = (1, uid, gid, mode, ROOT_ID, size, blocks)
    statx = _STATX.pack(_STATX_BASIC, blksize, 0, *counts, 0, *times, 0, 0, 0, 0)
    return success(unique, _STATX_OUT.pack(valid_seconds, 0) + statx)


def open_reply(unique: int, fh: int, flags: int, backing_id: int = 0) -> bytes:
    """The reply to OPEN: the handle that requests will name, and how to treat it (OpenReply)."""
    return success(unique, _OPEN_OUT.pack(fh, flags, backing_id))


def statfs_reply(unique: int, block_size: int, blocks: int, free: int) -> bytes:
    """The reply to STATFS; counts are in blocks."""
    return success(unique, _STATFS_OUT.pack(blocks, free, free, 1, 0, block_size, 255, block_size))


def lseek_reply(unique: int, offset: int) -> bytes:
    """The reply to LSEEK."""
    return success(unique, _LSEEK_OUT.pack(offset))


def attributes_changed() -> bytes:
    """The notification that the file's attributes are not what was said before. Its pages stay where they are."""
    payload = _INVAL_INODE.pack(ROOT_ID, -1, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), Notify.INVAL_INODE, 0) + payload
