"""Mounting a FUSE file system over a file, and taking it away again. Knows nothing of the protocol.

Every call that may touch a file system happens in a thread with a time limit: what lies below a path may be a FUSE file
system that does not answer, or one that this very process serves.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from dataclasses import dataclass

from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import fusermount, mountinfo, mountpoint
from blkferry.exports.fuse.fusermount import COULD_NOT_MOUNT
from blkferry.exports.fuse.users import users
from blkferry.plane import syscalls
from blkferry.plane.patience import within
from blkferry.schema.export import FuseExportAllowOther

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
MAX_READ = 64 << 20
"""QEMU's; what a read can really be the kernel says in FUSE_INIT."""

MAX_SOURCE = 1024
"""Characters of what df(1) and findmnt(8) show as the source, which must fit into a page with everything else."""

LOOK_SECONDS = 5.0
MOUNT_SECONDS = 15.0
UNMOUNT_SECONDS = 10.0
SYNC_SECONDS = 5.0
"""How long to wait for what takes no time unless it never ends. Unmounting waits for pages that are still dirty."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system, which is dead as soon as its last descriptor is closed.

    `fd` is the non-blocking descriptor of /dev/fuse, and belongs to whoever has this. `device` is what the file's
    st_dev is. `allow_other` tells whether other users are let in.
    """

    fd: int
    path: str
    device: int
    allow_other: bool

    async def unmount(self, *, lazy: bool) -> None:
        """Have it mounted nowhere any more. Requests must be answered meanwhile: the kernel may have data to write.

        Raises Error(BUSY) when somebody has the file open; `lazy` unmounts it nevertheless, and those go on using it
        until `fd` is closed. Also raises TimeoutError.
        """
        await within(UNMOUNT_SECONDS, unmount, self.device, lazy)

    async def leave(self, export_id: str) -> None:
        """Unmount it if nobody has it open. Raises Error(BUSY), naming those who have."""
        try:
            await self.unmount(lazy=False)
        except (Error, TimeoutError) as error:
            if isinstance(error, Error) and error.kind is not ErrorKind.BUSY:
                raise
            who = await users(self.path)
            opened = f" It is open in {', '.join(who)}." if who else ""
            hint = f"Use mode='hard' to force client disconnect.{opened}"
            raise Error(ErrorKind.BUSY, f"export '{export_id}' still in use", hint=hint) from error

    async def detach(self) -> None:
        """Unmount it, whoever has it open. What hinders that is logged: with `fd` closed, nothing waits for us.

        The kernel may hold data that programs have written by mmap(2); it gets the time to give them to us.
        """
        try:
            try:
                await self.unmount(lazy=False)
            except Error as error:
                if error.kind is not ErrorKind.BUSY:
                    raise
                with contextlib.suppress(OSError, TimeoutError):
                    await within(SYNC_SECONDS, sync, self.path)
                await self.unmount(lazy=True)
        except (Error, OSError) as error:  # a TimeoutError is an OSError
            log.warning("%s", str(error) or f"'{self.path}' cannot be unmounted now")


async def mount(path: str, *, source: str, allow_other: FuseExportAllowOther) -> Mount:
    """Mount over the regular file at `path`; `source` is the image, a path or not, which tools show. Raises Error.

    The kernel has sent FUSE_INIT when this returns. Nobody can use the file before that is answered.
    """
    try:
        real = await within(LOOK_SECONDS, mountpoint.prepare, path)
        return await within(MOUNT_SECONDS, _mount, real, source, allow_other, undo=_take_back)
    except TimeoutError as error:
        raise does_not_answer(path) from error


def does_not_answer(path: str) -> Error:
    """What to say when a look at `path` takes for ever."""
    hint = "If that is a FUSE file system, `umount -f` ends it; if it is a network's, its server does not answer."
    return Error(ErrorKind.IO, f"What is mounted at '{path}' does not answer", hint=hint, path=path)


def sync(path: str) -> None:
    """Have the kernel write what programs have changed in the mounted file. Blocks; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unmount(device: int, lazy: bool) -> None:
    """Unmount a file system, wherever it is by now. Blocks; raises Error."""
    mounted = mountinfo.by_device(device)
    if mounted is None:
        return
    top = mountinfo.topmost(mounted.path)
    if top != mounted:
        raise Error(
            ErrorKind.BUSY,
            f"Cannot unmount '{mounted.path}': something else is mounted over it",
            hint=f"Unmount that first: umount '{mounted.path}'.",
        )
    mountpoint.umount(mounted.path, lazy=lazy)


def _take_back(mounted: Mount) -> None:
    os.close(mounted.fd)
    unmount(mounted.device, lazy=True)


def _mount(path: str, source: str, allow_other: FuseExportAllowOther) -> Mount:
    options = ["default_permissions", f"max_read={MAX_READ}"]
    source = (os.path.abspath(source) if os.path.lexists(source) else source)[:MAX_SOURCE]
    match allow_other:
        case FuseExportAllowOther.OFF:
            fd, others = _mount_with(path, source, options), False
        case FuseExportAllowOther.ON:
            fd, others = _mount_with(path, source, [*options, "allow_other"]), True
        case FuseExportAllowOther.AUTO:
            try:
                fd, others = _mount_with(path, source, [*options, "allow_other"]), True
            except Error:  # of both attempts the second one's complaint is of interest
                fd, others = _mount_with(path, source, options), False
    os.set_blocking(fd, False)
    mounted = mountinfo.topmost(path)
    if mounted is None or not mounted.ours:
        os.close(fd)
        raise Error(ErrorKind.GONE, f"{COULD_NOT_MOUNT}: it is no longer there", path=path)
    return Mount(fd, path, mounted.device, others)


def _mount_with(path: str, source: str, options: list[str]) -> int:
    """Mount by ourselves if we may, else by fusermount3; return the descriptor of /dev/fuse."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return fusermount.mount(path, source, [*options, f"subtype={mountinfo.SUBTYPE}"])
    except OSError as error:
        hint = "The kernel's module is missing: modprobe fuse. A container has to be given /dev/fuse."
        raise Error.from_oserror(f"{COULD_NOT_MOUNT}: Could not open '{DEVICE}'", error, hint=hint) from error
    kernel_options = [f"fd={fd}", f"rootmode={stat.S_IFREG:o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    try:
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount(source, path, mountinfo.TYPE, flags, ",".join([*kernel_options, *options]))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EPERM:
            return fusermount.mount(path, source, [*options, f"subtype={mountinfo.SUBTYPE}"])
        raise Error.from_oserror(COULD_NOT_MOUNT, error, path=path) from error
    return fd
