"""`blkferry umount`: take a mounted file away, and wait until the daemon behind it is done with its image.

That daemon is not spoken to: the kernel tells it that the file is unmounted, and the lock that it has on the file
underneath tells us when it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence

from blkferry.daemon.mountpoints import released
from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import fusermount, mountinfo, mountpoint
from blkferry.exports.fuse.mounting import does_not_answer, sync
from blkferry.exports.fuse.users import users
from blkferry.plane import syscalls
from blkferry.plane.patience import within

LOOK_SECONDS = 5.0
UNMOUNT_SECONDS = 30.0
"""The kernel writes what is dirty before it unmounts."""

CLOSE_SECONDS = 60.0
"""How long a daemon may take to flush and close an image."""

ABORT = "/sys/fs/fuse/connections/{}/abort"


def umount_file(file: str, *, force: bool) -> None:
    """Unmount a file, and return when its image is closed. Raises Error."""
    asyncio.run(_umount(file, force=force))


async def _umount(file: str, *, force: bool) -> None:
    try:
        real = await within(LOOK_SECONDS, os.path.realpath, file)
        mounted = mountinfo.topmost(real)
        if mounted is None or not mounted.ours:
            raise _not_mounted(file)
        try:
            await within(UNMOUNT_SECONDS, _unmount, real)
        except Error as error:
            if error.kind is not ErrorKind.BUSY:
                raise
            if not force:
                raise _in_use(file, await users(real)) from error
            await _cut_off(mounted)
    except TimeoutError as error:
        raise does_not_answer(file) from error
    if not await released(real, CLOSE_SECONDS):
        raise Error(
            ErrorKind.BUSY,
            f"'{file}' is unmounted, but its image {mounted.source} is not closed yet",
            hint="The daemon is still writing to it, or somebody who sees other mounts has the file open.",
        )


def _unmount(path: str) -> None:
    mountpoint.umount(path, lazy=False)


async def _cut_off(mounted: mountinfo.Mounted) -> None:
    """Unmount a file that is open, and fail whatever those who have it open ask from now on."""
    with contextlib.suppress(OSError, TimeoutError):
        await within(UNMOUNT_SECONDS, sync, mounted.path)
    await within(UNMOUNT_SECONDS, _force, mounted)


def _force(mounted: mountinfo.Mounted) -> None:
    try:
        syscalls.umount(mounted.path, syscalls.MNT_FORCE | syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except PermissionError:
        # Who mounts by fusermount3 may abort as well, where the kernel shows how; else it ends with the last close.
        with contextlib.suppress(OSError), open(ABORT.format(mounted.device), "w") as abort:
            abort.write("1")
        fusermount.unmount(mounted.path, lazy=True)
    except OSError as error:
        raise Error.from_oserror(f"Cannot unmount '{mounted.path}'", error) from error


def _not_mounted(file: str) -> Error:
    ours = ", ".join(mounted.path for mounted in mountinfo.mounts() if mounted.ours)
    hint = f"These are: {ours}." if ours else "Nothing is at the moment."
    return Error(ErrorKind.NOT_FOUND, f"'{file}' is not mounted by blkferry", hint=hint)


def _in_use(file: str, who: Sequence[str]) -> Error:
    opened = f"It is open in {', '.join(who)}. " if who else ""
    loops = [user for user in who if user.startswith("/dev/")]
    remedy = f"Detach it (losetup --detach {' '.join(loops)})" if loops else "Close it"
    return Error(ErrorKind.BUSY, f"'{file}' is in use", hint=f"{opened}{remedy}, or say --force to cut it off.")
