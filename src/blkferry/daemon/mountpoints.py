"""The files that we mount over for people and programs: made where they are not there, and taken away afterwards.

Each is locked (flock(2)) from before it is mounted over until all that stood behind it is closed. So two processes do
not mount over one file at once, and whoever has unmounted it can wait until its image is free: see `released`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import mountinfo, mountpoint
from blkferry.exports.fuse.mounting import does_not_answer
from blkferry.plane.patience import within

SECONDS = 5.0
"""How long to wait for a file system that may not answer."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Mountpoint:
    """A file that may be mounted over: its real path, a descriptor of it that has the lock, and whether we made it."""

    path: str
    fd: int
    made: bool


class Mountpoints:
    """Those that a daemon has claimed."""

    def __init__(self) -> None:
        self._claimed: list[Mountpoint] = []

    async def claim(self, path: str, *, image: str | None = None, over: bool = False) -> Mountpoint:
        """See to it that there is a file to mount over.

        It must be empty, for nobody sees what is in it while it is mounted over, unless that is wanted (`over`) or it
        is the `image` itself. Raises Error.
        """
        claimed = await _patiently(path, _claim, path, image, over, undo=_release)
        self._claimed.append(claimed)
        return claimed

    async def release(self, claimed: Mountpoint) -> None:
        """Give it up, and take it away if we made it. It must not be mounted over any more."""
        if claimed in self._claimed:
            self._claimed.remove(claimed)
            await _patiently(claimed.path, _release, claimed)

    async def release_all(self) -> None:
        """Give up all that are left."""
        for claimed in list(self._claimed):
            with contextlib.suppress(Error):
                await self.release(claimed)


async def released(path: str, seconds: float) -> bool:
    """Wait until whoever had mounted over this file is done with it; tells whether that has come to pass."""
    try:
        await within(seconds, _wait_for_lock, path)
    except TimeoutError:
        return False
    return True


async def _patiently(path: str, call: Callable[..., Result], *arguments: Any, undo: Any = None) -> Result:
    try:
        return await within(SECONDS, call, *arguments, undo=undo)
    except TimeoutError as error:
        raise does_not_answer(path) from error


def _claim(path: str, image: str | None, over: bool) -> Mountpoint:
    made = False
    try:
        real = mountpoint.prepare(path)
    except Error as error:
        if error.facts.get("errno") != errno.ENOENT:
            raise
        real, made = _make(path), True
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise Error.from_oserror(f"Cannot mount over '{path}'", error, path=path) from error
    claimed = Mountpoint(real, fd, made)
    try:
        _lock(claimed, path)
        if not over:
            _refuse_contents(claimed, path, image)
    except BaseException:
        _release(claimed)
        raise
    return claimed


def _make(path: str) -> str:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise Error.from_oserror(f"Cannot make '{path}'", error, path=path) from error
    return os.path.realpath(path)


def _lock(claimed: Mountpoint, path: str) -> None:
    try:
        fcntl.flock(claimed.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "Try again in a moment: it is about to be mounted over, or its image is still being closed."
        raise Error(ErrorKind.BUSY, f"Another blkferry has '{path}'", hint=hint, path=path) from error


def _refuse_contents(claimed: Mountpoint, path: str, image: str | None) -> None:
    status = os.fstat(claimed.fd)
    if not status.st_size:
        return
    if image is not None:
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.stat(image)):
                return
    raise Error(
        ErrorKind.EXISTS,
        f"'{path}' is not empty, and what is in it could not be seen while it is mounted over",
        hint="Name a file that is not there, or an empty one; --over hides what is in it for that time.",
        path=path,
    )


def _release(claimed: Mountpoint) -> None:
    if claimed.made:
        with contextlib.suppress(OSError):  # gone, or still mounted over
            if os.path.samestat(os.fstat(claimed.fd), os.lstat(claimed.path)):
                os.unlink(claimed.path)
    os.close(claimed.fd)


def _wait_for_lock(path: str) -> None:
    if mountinfo.topmost(path) is not None:
        return  # mounted over by somebody else by now
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # taken away, as the last thing that was done; or none of our business
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)
