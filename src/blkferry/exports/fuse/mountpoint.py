"""The file that is mounted over: what it has to be, and what may be in the way. All calls block, perhaps for ever.

A dead mount of ours is cleared away, for a blkferry that is killed leaves one. Live ones and those of others stay.
"""

from __future__ import annotations

import errno
import os
import stat

from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import fusermount, mountinfo
from blkferry.plane import syscalls

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What the kernel says of a FUSE file system whose server is gone."""


def prepare(path: str) -> str:
    """The real path of a regular file that may be mounted over. Raises Error."""
    real = os.path.realpath(path) if path else ""  # an empty one would be the current directory
    while (mounted := mountinfo.topmost(real)) is not None and mounted.ours:
        if not dead(real):
            hint = f"It shows {mounted.source}; `blkferry umount {path}` ends that."
            raise Error(ErrorKind.EXISTS, f"There already is a FUSE export on '{path}'", hint=hint, path=path)
        umount(real, lazy=True)
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        hint = _remedy(path, real, error, mounted)
        raise Error.from_oserror(f"Failed to stat '{path}'", error, hint=hint, path=path) from error
    if not stat.S_ISREG(mode):
        hint = "It is a directory; name a file in it." if stat.S_ISDIR(mode) else ""
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{path}' is not a regular file", hint=hint, path=path)
    return real


def dead(path: str) -> bool:
    """Whether nobody serves the FUSE file system that is mounted there."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in DEAD
    return False


def _remedy(path: str, real: str, error: OSError, mounted: mountinfo.Mounted | None) -> str:
    if error.errno == errno.ENOENT:
        where = "" if os.path.isabs(path) else f" It was looked for in {os.getcwd()}."
        return f"The file has to be there before it is mounted over: touch '{path}'.{where}"
    if error.errno in DEAD and mounted is not None:
        return f"Who served {mounted.type} there is gone: umount '{real}', or fusermount3 -u '{real}'."
    return ""


def umount(path: str, *, lazy: bool) -> None:
    """Unmount what is topmost there, if anything is. Raises Error, unless `lazy` with BUSY if it is in use."""
    try:
        syscalls.umount(path, syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0))
    except OSError as error:
        match error.errno:
            case errno.EPERM:
                fusermount.unmount(path, lazy=lazy)
            case errno.EINVAL | errno.ENOENT:
                pass  # somebody else was quicker
            case _:
                raise Error.from_oserror(f"Cannot unmount '{path}'", error, path=path) from error
