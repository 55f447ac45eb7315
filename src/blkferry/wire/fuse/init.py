"""What both sides agree on before anything else: version, limits, and what the kernel may do."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from blkferry.wire.fuse.constants import MAJOR, MINOR, OLDEST_MINOR, InitFlag
from blkferry.wire.fuse.replies import success
from blkferry.wire.fuse.requests import Init

MAX_WRITE: Final = 1 << 20
"""The largest request, in bytes: 256 pages is what the kernel allows unless fs.fuse.max_pages_limit says more."""

MAX_BACKGROUND: Final = 256
"""Requests that nobody waits for one by one (direct I/O of io_uring or libaio among them) at the same time."""

CONGESTION: Final = 192
"""From this many of them on the file counts as congested."""

_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")

_WANTED: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.INIT_EXT
    | InitFlag.DIRECT_IO_ALLOW_MMAP
)


class Agreed(NamedTuple):
    """What came of it. `minor` is the version that both use."""

    minor: int
    flags: InitFlag


def too_old(init: Init) -> bool:
    """Whether the kernel speaks a version that we do not: there is no answer then but EPROTO."""
    return init.major < MAJOR or (init.major == MAJOR and init.minor < OLDEST_MINOR)


def answer(unique: int, init: Init, *, page_size: int, passthrough: bool) -> tuple[bytes, Agreed | None]:
    """The reply to an INIT that is not `too_old`, and what is agreed on now.

    That is None when the kernel speaks a later major version: it will ask again in ours.
    """
    if init.major > MAJOR:
        return success(unique, _INIT_OUT.pack(MAJOR, MINOR, *(0,) * 11)), None
    wanted = _WANTED | (InitFlag.PASSTHROUGH if passthrough else InitFlag(0))
    flags = wanted & (init.flags | init.flags2 << 32)
    reply = _INIT_OUT.pack(
        MAJOR,
        MINOR,
        init.max_readahead,
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        CONGESTION,
        MAX_WRITE,
        1,  # times are exact to a nanosecond
        MAX_WRITE // page_size,
        0,
        flags >> 32,
        1 if flags & InitFlag.PASSTHROUGH else 0,  # file systems on top of each other: only us
        0,
    )
    return success(unique, reply), Agreed(min(init.minor, MINOR), InitFlag(flags))
