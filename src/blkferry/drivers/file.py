"""`file`: a regular file of the host.

Offsets are the file's own. Locks are QEMU's (see plane.locks): an image that is written anywhere else is refused,
also for reading, unless `force-share` says otherwise; an image that we write is refused elsewhere.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.graph.descriptor import DescriptorNode
from blkferry.graph.graph import Opening
from blkferry.graph.permissions import ALL, NONE, Permission
from blkferry.plane import locks
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.common import OnOffAuto
from blkferry.schema.qapi import Doc, branch


class BlockdevAioOptions(enum.StrEnum):
    """How requests that may block reach the kernel."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class FileOptionsBase(BlockdevOptions):
    """What regular files and host devices have in common."""

    filename: Annotated[str, Doc("path of the image file", since="2.9")]
    locking: Annotated[
        OnOffAuto, Doc("whether to lock the image against other processes, as QEMU does", since="2.10")
    ] = OnOffAuto.AUTO
    aio: Annotated[
        BlockdevAioOptions | None,
        Doc(
            "how requests that may block are done: io_uring, threads, or native, which is io_uring here and needs "
            "cache.direct (default: io_uring where the kernel has it)",
            since="2.9",
        ),
    ] = None
    aio_max_batch: Annotated[
        int, Doc("accepted for compatibility: batches are as large as what clients send", since="6.2")
    ] = 0
    drop_cache: Annotated[bool, Doc("accepted for compatibility: it matters for live migration only", since="4.0")] = (
        True
    )


@branch
class BlockdevOptionsFile(FileOptionsBase):
    """A regular file of the host."""

    driver: Literal["file"] = "file"


class File(DescriptorNode):
    """A node over a file that it opens by name."""

    driver: ClassVar[str] = "file"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsFile
    options: FileOptionsBase
    _lock: locks.ImageLock | None = None

    async def open(self, opening: Opening) -> None:
        options = self.options
        if options.aio is BlockdevAioOptions.NATIVE and not opening.cache.direct:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            )
        if (
            options.aio in (BlockdevAioOptions.IO_URING, BlockdevAioOptions.NATIVE)
            and self.services.engine.name != "io_uring"
        ):
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"aio={options.aio} needs io_uring, which this system refuses",
                hint="Use aio=threads.",
            )
        self._direct = os.O_DIRECT if opening.cache.direct else 0
        self._auto_read_only = opening.auto_read_only
        fd = await self.services.in_thread(self._open_file)
        try:
            self._check_kind(os.fstat(fd))
            self.storage = Storage(
                fd,
                self.services,
                writable=self._writable_descriptor,
                direct=bool(self._direct),
                threads=options.aio is BlockdevAioOptions.THREADS,
            )
        except OSError as error:
            os.close(fd)
            raise Error.from_oserror(f"Could not open '{options.filename}'", error, path=options.filename) from error
        except BaseException:
            os.close(fd)
            raise
        self.storage.no_flush = opening.cache.no_flush
        self.adopt(self.storage)
        self._path = os.path.abspath(options.filename)

    def _open_file(self) -> int:
        """Open read-write when that is wanted at once, read-only when it may wait for the first writer."""
        path = self.options.filename
        self._writable_descriptor = not self.read_only and not self._auto_read_only
        flags = os.O_CLOEXEC | self._direct | os.O_NONBLOCK  # non-blocking: a FIFO given by mistake must not hang us
        try:
            try:
                fd = os.open(path, flags | (os.O_RDWR if self._writable_descriptor else os.O_RDONLY))
                os.set_blocking(fd, True)
                return fd
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                raise Error(
                    ErrorKind.UNSUPPORTED,
                    f"Could not open '{path}': its file system has no O_DIRECT",
                    hint="Use cache.direct=off.",
                    path=path,
                ) from error
        except OSError as error:
            hint = ""
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and self._writable_descriptor:
                hint = "Add read-only=on if the image is only to be read."
            elif error.errno == errno.ENOENT:
                hint = f"The path was taken relative to {os.getcwd()}." if not os.path.isabs(path) else ""
            raise Error.from_oserror(f"Could not open '{path}'", error, hint=hint, path=path) from error

    def _check_kind(self, status: os.stat_result) -> None:
        path = self.options.filename
        if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"'file' driver requires '{path}' to be a regular file",
                hint="Use the host_device driver for a block device.",
                path=path,
            )
        if not stat.S_ISREG(status.st_mode):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"'file' driver requires '{path}' to be a regular file", path=path)

    # Permissions and locks -------------------------------------------------------------------------------------

    async def permissions_changed(self, used: Permission, shared: Permission) -> None:
        changes = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE
        if used & changes and not self.storage.writable:
            await self._reopen(writable=True)
        await self.services.in_thread(self._apply_locks, used, shared)
        if not used & changes and self.storage.writable and self._auto_read_only:
            await self._reopen(writable=False)

    async def _reopen(self, *, writable: bool) -> None:
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            # By descriptor, not by name: it is the same file even if the name means another one by now.
            fd = await self.services.in_thread(
                os.open, f"/proc/self/fd/{self.storage.fd}", mode | os.O_CLOEXEC | self._direct
            )
        except OSError as error:
            raise Error.from_oserror(
                f"Could not open '{self.options.filename}' for writing",
                error,
                path=self.options.filename,
                node=self.name,
            ) from error
        self.storage.replace(fd, writable=writable)
        self.retire()

    def _apply_locks(self, used: Permission, shared: Permission) -> None:
        if self.options.locking is OnOffAuto.OFF or self.options.force_share:
            return
        if self._lock is None:
            if not used and shared == ALL:
                return
            if self.options.locking is OnOffAuto.AUTO and not locks.supported(self.storage.fd):
                return
            self._lock = locks.ImageLock(self.storage.fd, self._path)
        # Our own users may share a node with each other, but not with other processes.
        unshared = (ALL & ~shared) | Permission.WRITE | Permission.RESIZE if used else NONE
        self._lock.apply(used, unshared)

    async def resize(self, length: int) -> None:
        if not self.storage.writable:
            await self._reopen(writable=True)
        await super().resize(length)

    def filename(self) -> str:
        return self.options.filename

    async def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
        await super().close()
