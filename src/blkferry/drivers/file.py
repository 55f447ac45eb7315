"""`file`: a regular file of the host.

Offsets are the file's own. Locks are QEMU's (see plane.locks): an image that is written anywhere else is refused,
also for reading, unless `force-share` says otherwise; an image that we write is refused elsewhere.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec

from blkferry.drivers.file_create import BlockdevCreateOptionsFile, create_file
from blkferry.errors import Error, ErrorKind
from blkferry.graph.descriptor import DescriptorNode
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.permissions import ALL, NONE, Permission, cumulative
from blkferry.graph.reopen import Reopening
from blkferry.plane import locks
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.common import OnOffAuto
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import ImageInfo, ImageInfoSpecificFile
from blkferry.schema.qapi import Doc, branch

_CHANGES = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE


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
    create_options: ClassVar[type[BlockdevCreateOptions] | None] = BlockdevCreateOptionsFile
    reopenable: ClassVar[frozenset[str]] = frozenset({"drop-cache"})
    options: FileOptionsBase
    _lock: locks.ImageLock | None = None

    @classmethod
    async def create(cls, graph: Graph, options: BlockdevCreateOptions) -> None:
        del graph
        assert isinstance(options, BlockdevCreateOptionsFile)
        await create_file(options)

    async def open(self, opening: Opening) -> None:
        options = self.options
        if options.aio is BlockdevAioOptions.NATIVE and not opening.cache.direct:
            raise _native_needs_direct()
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
        fd = await self.services.in_thread(self._open_file, opening.graph.shown)
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

    def _open_file(self, shown: Mapping[int, str]) -> int:
        """Open read-write when that is wanted at once, read-only when it may wait for the first writer.

        `shown` are the nodes that are files, by FUSE: see `Graph`.
        """
        path = self.options.filename
        self._writable_descriptor = not self.read_only and not self._auto_read_only
        flags = os.O_CLOEXEC | self._direct | os.O_NONBLOCK  # non-blocking: a FIFO given by mistake must not hang us
        try:
            try:
                fd = os.open(path, flags | (os.O_RDWR if self._writable_descriptor else os.O_RDONLY))
                os.set_blocking(fd, True)
                _refuse_own(fd, path, shown)
                return fd
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                raise _no_direct(path) from error
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
        if used & _CHANGES and not self.storage.writable:
            await self._reopen(writable=True)
        await self.services.in_thread(self._apply_locks, used, shared)
        if not used & _CHANGES and self.storage.writable and (self._auto_read_only or self.read_only):
            await self._reopen(writable=False)

    async def _reopen(self, *, writable: bool) -> None:
        fd = await self._open_again(writable=writable, direct=self._direct)
        self.storage.replace(fd, writable=writable)
        self.retire()

    async def _open_again(self, *, writable: bool, direct: int) -> int:
        """Another descriptor of the file. By descriptor, not by name, which may mean another file by now."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | direct
        path = self.options.filename
        try:
            return await self.services.in_thread(os.open, f"/proc/self/fd/{self.storage.fd}", flags)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                raise _no_direct(path) from error
            purpose = " for writing" if writable else ""
            raise Error.from_oserror(f"Could not open '{path}'{purpose}", error, path=path, node=self.name) from error

    async def reopen_prepare(self, reopening: Reopening) -> None:
        if not reopening.cache.direct and self.options.aio is BlockdevAioOptions.NATIVE:
            raise _native_needs_direct()
        direct = os.O_DIRECT if reopening.cache.direct else 0
        used, _ = cumulative(self)
        writable = not reopening.read_only and (not reopening.auto_read_only or bool(used & _CHANGES))
        if direct != self._direct or writable != self.storage.writable:
            reopening.prepared = await self._open_again(writable=writable, direct=direct), writable, direct

    async def reopen_commit(self, reopening: Reopening) -> None:
        self._auto_read_only = reopening.auto_read_only
        self.storage.no_flush = reopening.cache.no_flush
        if reopening.prepared is not None:
            fd, writable, self._direct = reopening.prepared
            self.storage.replace(fd, writable=writable, direct=bool(self._direct))
            self.adopt(self.storage)

    async def reopen_abort(self, reopening: Reopening) -> None:
        if reopening.prepared is not None:
            os.close(reopening.prepared[0])

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

    def image_info(self) -> ImageInfo:
        return msgspec.structs.replace(super().image_info(), format_specific=ImageInfoSpecificFile())

    async def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
        await super().close()


def _refuse_own(fd: int, path: str, shown: Mapping[int, str]) -> None:
    """Close a file that shows a node of ours, and raise Error. Our loop would have to wait for itself, with it.

    That goes for the close as well, so it has to happen here, in a thread.
    """
    if (name := shown.get(os.fstat(fd).st_dev)) is not None:
        os.close(fd)
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"'{path}' shows a node of this daemon",
            hint=f"Use the node itself: '{name}'.",
            path=path,
        )


def _native_needs_direct() -> Error:
    return Error(
        ErrorKind.INVALID_ARGUMENT,
        "aio=native was specified, but it requires cache.direct=on, which was not specified.",
    )


def _no_direct(path: str) -> Error:
    return Error(
        ErrorKind.UNSUPPORTED,
        f"Could not open '{path}': its file system has no O_DIRECT",
        hint="Use cache.direct=off.",
        path=path,
    )
