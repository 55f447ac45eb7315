"""A node whose data is one descriptor, offset for offset: the base of files, host devices and memory disks.

It knows how to say what is allocated, how zeroes and discards are done by fallocate, and how to flush and resize. It
does not know where the descriptor comes from.
"""

from __future__ import annotations

import errno
import logging
import os
import stat

from blkferry.errors import Error, ErrorKind
from blkferry.extent import MAX_EXTENTS, Content, Effort, Extent
from blkferry.graph.node import Node
from blkferry.plane.storage import Storage
from blkferry.plane.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from blkferry.units import SECTOR, align_up

log = logging.getLogger(__name__)

_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENODEV})


class DescriptorNode(Node):
    """A node over one descriptor; subclasses open it and call `adopt`."""

    storage: Storage

    def adopt(self, storage: Storage) -> None:
        """Serve from `storage` from now on."""
        self.storage = storage
        self.alignment = storage.alignment
        self.remap_alignment = storage.remap_alignment
        self.length = align_up(storage.size, SECTOR)

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        storage = self.storage
        writable = storage.writable
        if effort is Effort.PLACE or storage.known_data(start, length):
            return [Extent(start, length, Content.DATA, start, None, writable)]
        extents: list[Extent] = []
        for run, is_data in storage.allocation(start, length, MAX_EXTENTS):
            content = Content.DATA if is_data else Content.ZERO
            extents.append(Extent(start, run, content, start, None, writable, allocated=is_data))
            start += run
        return extents

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        if unmap and self.unmaps:
            if await self._fallocate(_PUNCH, start, length):
                return
        elif fast and self.storage.is_block_device:
            pass  # the kernel would write zeroes itself, which is slow and cannot be interrupted
        elif await self._fallocate(_ZERO, start, length):
            return
        elif not self.storage.is_block_device and await self._fallocate(_PUNCH, start, length):
            # Without ZERO_RANGE (tmpfs, NFS): a hole, then space for it, is the same to every reader.
            await self._fallocate(FALLOC_FL_KEEP_SIZE, start, length)
            return
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def discard(self, start: int, length: int) -> None:
        if self.unmaps:
            await self._fallocate(_PUNCH, start, length)  # a file system without holes has nothing to give back

    async def _fallocate(self, mode: int, start: int, length: int) -> bool:
        """Whether it was done; False where the file system does not know this mode."""
        storage = self.storage
        async with storage.exclusive(start, start + length):
            try:
                await storage.afallocate(mode, start, length)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return False
                raise
        return True

    async def prefetch(self, start: int, length: int) -> None:
        storage = self.storage
        if not storage.direct:
            await self.services.in_thread(os.posix_fadvise, storage.fd, start, length, os.POSIX_FADV_WILLNEED)

    async def flush(self) -> None:
        await self.storage.aflush()

    def flush_target(self) -> Storage | None:
        return self.storage

    def grow(self, length: int) -> bool:
        if self.storage.is_block_device or not self.storage.writable:
            return False
        self.storage.grow(length)
        self.length = align_up(self.storage.size, SECTOR)
        return True

    async def resize(self, length: int) -> None:
        storage = self.storage
        if storage.is_block_device:
            if length > storage.refresh_size():
                raise Error(ErrorKind.INVALID_ARGUMENT, "Cannot grow device files", node=self.name)
            return
        try:
            await self.services.in_thread(os.ftruncate, storage.fd, length)
        except OSError as error:
            raise Error.from_oserror("Failed to resize the file", error, path=self.filename()) from error
        storage.dirty += 1
        storage.unmap()
        storage.refresh_size()
        self.length = align_up(storage.size, SECTOR)
        self.retire()

    def allocated_size(self) -> int | None:
        status = os.fstat(self.storage.fd)
        return None if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512

    async def close(self) -> None:
        storage: Storage | None = getattr(self, "storage", None)  # opening may have failed before there was one
        if storage is None:
            return
        await storage.idle()
        try:
            await storage.aflush()
        except OSError as error:
            log.error("%s: the last flush failed: %s", self.filename(), error.strerror)  # noqa: TRY400
        storage.close()
