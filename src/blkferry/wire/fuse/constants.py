"""The numbers of the FUSE protocol, version 7.

Names are those of include/uapi/linux/fuse.h without FUSE_, FATTR_ and the like. Values that arrive may be outside these
enums: a newer kernel knows more of them.
"""

from __future__ import annotations

import enum
from typing import Final

MAJOR: Final = 7
MINOR: Final = 45
"""The version whose structures we know; both sides use the smaller one."""

OLDEST_MINOR: Final = 31
"""Linux 5.4, the first with everything that is taken for granted here: 1 MiB requests, FUSE_LSEEK, long replies to
FUSE_INIT."""

ROOT_ID: Final = 1
"""The inode at the root of the mount."""

MIN_READ_BUFFER: Final = 8192
"""Less than this may not be read from the device at once, in bytes."""


class Opcode(enum.IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2  # no reply
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36  # no reply
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41  # no reply
    BATCH_FORGET = 42  # no reply
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


UNANSWERED: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})
"""Requests that get no reply, whatever becomes of them."""


class InitFlag(enum.IntFlag):
    """What the kernel offers and we take (64 bits, in two halves)."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    AUTO_INVAL_DATA = 1 << 12
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    OVER_IO_URING = 1 << 41


class OpenReply(enum.IntFlag):
    """How the kernel is to treat an open file (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class Fattr(enum.IntFlag):
    """Which members of a SETATTR are meant."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class Notify(enum.IntEnum):
    """What the kernel can be told unasked."""

    INVAL_INODE = 2


DEV_IOC_BACKING_OPEN: Final = 0x4010E501
"""_IOW(229, 1, struct fuse_backing_map): register a descriptor; returns its backing id."""

DEV_IOC_BACKING_CLOSE: Final = 0x4004E502
"""_IOW(229, 2, uint32_t): forget a backing id."""
