"""The dirty log of a live migration: which pages of the guest's memory we have written ("Migration").

The front end fetches and clears bits while we set some, and other devices of the same guest set theirs in the same
bytes, so setting one must be atomic. What Python has for that is a store: it writes bytes with all bits set, which
loses nobody's bits and says at most seven pages too many. A page too many is sent twice; one too few is corruption.

The bytes go to the descriptor, not to a mapping of it: a log that the front end cuts off is an error then, no signal.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from typing import Final

from blkferry.wire.vhost_user.constants import LOG_PAGE
from blkferry.wire.vhost_user.payloads import Log, ProtocolError

BYTE_SPAN: Final = LOG_PAGE * 8
"""Bytes of guest memory that one byte of the log stands for."""

_SEAL_WRITE: Final = 0x0008 | 0x0010  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE


class DirtyLog:
    """A log in `fd`, which it owns from now on. Raises ProtocolError when that cannot be one.

    `failed` is told when it cannot be written any more.
    """

    def __init__(self, described: Log, fd: int, failed: Callable[[str], None]) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < described.offset + described.size:
            raise ProtocolError(f"the log of {described.size:#x} bytes at {described.offset:#x} is not in its file")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or _seals(fd) & _SEAL_WRITE:
            raise ProtocolError("the log cannot be written")
        self._fd = fd
        self._offset = described.offset
        self._failed = failed
        self.size = described.size

    def covers(self, address: int, length: int) -> bool:
        """Whether all of a range of guest memory has its bits."""
        return address + length <= self.size * BYTE_SPAN

    def mark(self, address: int, length: int) -> None:
        """A range of guest memory was written. What lies beyond the log is nobody's."""
        first = address // BYTE_SPAN
        end = min((address + length - 1) // BYTE_SPAN + 1, self.size)
        if first >= end or self._fd < 0:
            return
        try:
            os.pwrite(self._fd, b"\xff" * (end - first), self._offset + first)
        except OSError as error:
            self._failed(f"the dirty log cannot be written: {error.strerror}")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memfd
        return 0
