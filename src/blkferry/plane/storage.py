"""An open file or block device and the ways to move its bytes.

This is the leaf of every fast path. It knows which system call cannot block on this descriptor (rule R3), keeps the
truth about what has not been flushed, and never lets a failed fdatasync be forgotten. It knows nothing of formats,
names, options or permissions. Data-path failures are OSError or negated errno values, never `Error`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import AsyncIterator, Callable, Sequence

from blkferry.plane import syscalls
from blkferry.plane.buffers import Buffer
from blkferry.plane.drain import InFlight, RangeLock, Uses, uninterrupted
from blkferry.plane.engine import Done, Engine, Memory
from blkferry.plane.pace import Pace
from blkferry.plane.services import Services
from blkferry.plane.window import Window
from blkferry.units import SECTOR, align_up

_TMPFS_MAGIC = 0x01021994
_MEMORY_FILESYSTEMS = frozenset({_TMPFS_MAGIC, 0x858458F6})  # tmpfs (memfd too) and ramfs
_LOCAL_FILESYSTEMS = _MEMORY_FILESYSTEMS | {0xEF53, 0x58465342, 0x9123683E, 0x2FC12FC1, 0xF2F52010, 0x794C7630}
"""Where SEEK_HOLE is answered from memory or a local disk (ext, xfs, btrfs, zfs, f2fs, overlay): never by a server."""

_WORTH_MAPPING = 8 << 20
"""A file that grew by this, and by a quarter, is mapped anew: not for every allocation, as page tables start empty."""

_LARGEST_ALIGNMENT = 4096
_BLKSSZGET = 0x1268

_NO_CACHE_ERRORS = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})


class Storage:
    """A descriptor with its capabilities, owned by the loop of `services`.

    `alignment` is what offsets and lengths of requests must be multiples of (1 unless O_DIRECT); `remap_alignment` the
    same for discard and zeroes. `inline_read_flags` are the preadv flags with which a read cannot sleep on the disk, or
    None when there are none. `size` is in bytes, as last seen.

    `readers` and `writers` count who moves bytes from and to places of this storage: a place may be given to somebody
    else only after those have ended who might still use it.
    """

    def __init__(
        self, fd: int, services: Services, *, writable: bool, direct: bool = False, threads: bool = False
    ) -> None:
        self.fd = fd
        self.writable = writable
        self.direct = direct
        self._threads = threads
        self.no_flush = False
        # Counts changes that reached the kernel. Not 0: whoever had the file before us may have left some unflushed.
        self.dirty = 1
        self._flushed = 0
        self._flush_error = 0
        self.readers = Uses()
        self.writers = Uses()
        self._fast_writes = InFlight()
        self._edge_writers = 0
        self.pace = Pace()
        self._ranges = RangeLock()
        self.move(services)
        self._probe()

    def move(self, services: Services) -> None:
        """Live on another loop. Nothing may be in flight."""
        self.services = services
        self.engine: Engine = services.threads if self._threads else services.engine

    def _probe(self) -> None:
        status = os.fstat(self.fd)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        filesystem = 0 if self.is_block_device else syscalls.filesystem_type(self.fd)
        self.in_memory = filesystem in _MEMORY_FILESYSTEMS
        self.seek_inline = filesystem in _LOCAL_FILESYSTEMS
        self.alignment = _direct_alignment(self.fd, self.is_block_device) if self.direct else 1
        self.remap_alignment = _logical_block_size(self.fd) if self.is_block_device else self.alignment
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        self.inline_read_flags: int | None = None
        if not self.direct:
            self.inline_read_flags = 0 if self.in_memory else _nowait(self.fd)
        self._known_data = (0, 0)
        self._window: Window | None = None

    def replace(self, fd: int, *, writable: bool, direct: bool | None = None) -> None:
        """Swap in another descriptor of the same file (re-opened for writing, or back), under the same number.

        What is in flight goes on with the old one; what has only been queued takes the new one, which is as good.
        Nothing may be in flight when that makes it a `direct` one, or no longer one: other alignments hold then.
        """
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        self.writable = writable
        if direct is not None and direct is not self.direct:
            self.direct = direct
            self.unmap()
            self._probe()

    def refresh_size(self) -> int:
        """Ask the kernel for the size again, in bytes."""
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        return self.size

    def grow(self, size: int) -> None:
        """Let the file be `size` bytes long, at least; what is new reads as zeroes. Raises OSError."""
        if size > self.refresh_size():
            os.ftruncate(self.fd, size)
            self.size = size
            self.dirty += 1

    def window(self) -> Window | None:
        """The mapping that hot reads are sent from, None where there is none: O_DIRECT, remote or odd file systems.

        It is made anew when the file has grown a lot. Whoever still sends slices of the old one keeps that mapped.
        """
        window = self._window
        if window is None:
            if self.inline_read_flags is None or not self.seek_inline or not self.size:
                return None
        elif not window.lost and self.size - window.size < max(window.size >> 2, _WORTH_MAPPING):
            return window
        try:
            self._window = Window(self.fd, self.size, in_memory=self.in_memory)
        except (OSError, ValueError, OverflowError):
            self.seek_inline = self.seek_inline and window is not None
        return self._window

    def unmap(self) -> None:
        """Give up the mapping; `window` makes a new one, of the size the file has then."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def _holes_may_come(self) -> None:
        """Space is being given back: what was data may be a hole."""
        self._known_data = (0, 0)
        if self._window is not None:
            self._window.forget()

    # What is allocated -----------------------------------------------------------------------------------------

    def known_data(self, offset: int, length: int) -> bool:
        """Whether the range lies in a run that was data when last asked: data may be called data for ever."""
        start, end = self._known_data
        return start <= offset and offset + length <= end

    def allocation(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """Runs (length, is data) from `offset` by SEEK_DATA and SEEK_HOLE, at most `limit` of them.

        Never cached, except data: somebody else may fill a hole at any time.
        """
        runs: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end and len(runs) < limit:
            try:
                data = os.lseek(self.fd, offset, os.SEEK_DATA)
                hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                    stop = min(max(align_up(self.refresh_size(), SECTOR), offset), end)
                    if stop > offset:
                        runs.append((stop - offset, False))
                    if end > stop:  # somebody cut the file off: only a read can say what that means
                        runs.append((end - stop, True))
                else:  # the file system cannot tell
                    runs.append((end - offset, True))
                break
            if hole <= data:  # it was punched between the two questions; to call what is left data is always right
                runs.append((end - offset, True))
                break
            self._known_data = (data, hole)
            if data > offset:
                stop = min(data, end)
                runs.append((stop - offset, False))
                offset = stop
            if offset < end:
                stop = min(hole, end)
                runs.append((stop - offset, True))
                offset = stop
        return runs

    # Moving bytes ----------------------------------------------------------------------------------------------

    def read(self, buffer: Memory, start: int, length: int, offset: int, done: Done) -> None:
        """Read into a buffer by the engine; `done` gets the count (short only at the end of the file) or -errno."""
        use = self.readers.begin()

        def finish(result: int) -> None:
            self.readers.end(use)
            done(result)

        self.engine.read(self.fd, buffer, start, length, offset, finish)

    def write(self, buffer: Memory, start: int, length: int, offset: int, fua: bool, done: Done) -> None:
        """Write from a buffer by way of the engine; with `fua` the bytes are durable when `done` is called."""
        use = self.writers.begin()
        flags = os.RWF_DSYNC if fua and not self.no_flush else 0

        def finish(result: int) -> None:
            self.dirty += 1
            self.writers.end(use)
            done(result)

        self.engine.write(self.fd, buffer, start, length, offset, flags, finish)

    def readv(self, pieces: Sequence[memoryview], offset: int, done: Done) -> None:
        """Read into memory that is not ours, by way of the engine; `done` gets the count, which may be short."""
        use = self.readers.begin()

        def finish(result: int) -> None:
            self.readers.end(use)
            done(result)

        self.engine.readv(self.fd, pieces, offset, finish)

    def fast_writev(self, pieces: Sequence[memoryview], offset: int, fua: bool, done: Done) -> None:
        """Write from memory that is not ours, else like `fast_write`; `done` gets the count, which may be short."""
        use = self.writers.begin()
        self._fast_writes.begin()
        flags = os.RWF_DSYNC if fua and not self.no_flush else 0

        def finish(result: int) -> None:
            self.dirty += 1
            self._fast_writes.end()
            self.writers.end(use)
            done(result)

        self.engine.writev(self.fd, pieces, offset, flags, finish)

    def flush(self, done: Done) -> None:
        """Make everything that was written before this call durable.

        After a failed fdatasync the kernel has dropped the pages it could not write: from then on every flush fails,
        for a success would be a lie.
        """
        if self._flush_error:
            done(-self._flush_error)
            return
        if self.no_flush or self._flushed == self.dirty:
            done(0)
            return
        use = self.readers.begin()
        covered = self.dirty

        def finish(result: int) -> None:
            self.readers.end(use)
            if result >= 0:
                self._flushed = max(self._flushed, covered)
            elif -result in _NO_CACHE_ERRORS:
                self._flush_error = -result
            done(result)

        self.engine.fdatasync(self.fd, finish)

    def fallocate(self, mode: int, offset: int, length: int, done: Done) -> None:
        """fallocate(2) by way of the engine; `done` gets 0 or -errno."""
        use = self.writers.begin()
        self._holes_may_come()

        def finish(result: int) -> None:
            self.dirty += 1
            self._holes_may_come()
            self.writers.end(use)
            done(result)

        self.engine.fallocate(self.fd, mode, offset, length, finish)

    def write_now(self, view: memoryview, offset: int) -> None:
        """Write into the page cache, from within a turn. Not for O_DIRECT. Raises OSError."""
        self.dirty += 1  # at once: a flush may follow in this very turn
        done = os.pwritev(self.fd, (view,), offset)
        while done < len(view):
            done += os.pwritev(self.fd, (view[done:],), offset + done)

    # Unaligned writes (O_DIRECT) -------------------------------------------------------------------------------

    @property
    def write_shortcut(self) -> bool:
        """Whether `fast_write` may be called: nobody is reading the edges of a write in order to write them back."""
        return not self._edge_writers

    def fast_write(self, buffer: Memory, length: int, offset: int, fua: bool, done: Done, *, start: int = 0) -> None:
        """`write`, for aligned ranges and without queueing behind others; ask `write_shortcut` first."""
        self._fast_writes.begin()

        def finish(result: int) -> None:
            self._fast_writes.end()
            done(result)

        self.write(buffer, start, length, offset, fua, finish)

    @contextlib.asynccontextmanager
    async def exclusive(self, start: int, end: int) -> AsyncIterator[None]:
        """Keep all other changes out of a range while its edges are read and written back, or while it is remapped.

        Without O_DIRECT nothing is ever read back, and this costs nothing.
        """
        if self.alignment == 1:
            yield
            return
        self._edge_writers += 1
        try:
            await self._fast_writes.idle()
            async with self._ranges.hold(start, end):
                yield
        finally:
            self._edge_writers -= 1

    # The same for coroutines -----------------------------------------------------------------------------------

    async def aread(self, buffer: Buffer, start: int, length: int, offset: int) -> int:
        """Await `read`; raises OSError."""
        return await self._await(lambda done: self.read(buffer, start, length, offset, done))

    async def awrite(self, buffer: Buffer, start: int, length: int, offset: int, *, fua: bool = False) -> None:
        """Await `write`; raises OSError."""
        await self._await(lambda done: self.write(buffer, start, length, offset, fua, done))

    async def aflush(self) -> None:
        """Await `flush`; raises OSError."""
        await self._await(self.flush)

    async def afallocate(self, mode: int, offset: int, length: int) -> None:
        """Await `fallocate`; raises OSError."""
        await self._await(lambda done: self.fallocate(mode, offset, length, done))

    async def _await(self, start: Callable[[Done], None]) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(result: int) -> None:
            if not future.done():
                future.set_result(result)

        start(done)
        # A cancelled caller must not release a buffer that the kernel still writes to, so the operation is waited out.
        result = await uninterrupted(future)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self.readers.idle()
        await self.writers.idle()

    def close(self) -> None:
        """Close the descriptor. Nothing may be in flight."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _nowait(fd: int) -> int | None:
    """RWF_NOWAIT where reads of this descriptor support it."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return None
    return os.RWF_NOWAIT


def _direct_alignment(fd: int, is_block_device: bool) -> int:
    """The smallest power of two that an O_DIRECT read of this descriptor accepts as offset and length, in bytes."""
    if is_block_device:
        return _logical_block_size(fd)
    page = mmap.mmap(-1, _LARGEST_ALIGNMENT)
    for alignment in (512, 1024, 2048):
        try:
            with memoryview(page) as view, view[:alignment] as part:
                os.preadv(fd, [part], alignment)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return alignment
    return _LARGEST_ALIGNMENT


def _logical_block_size(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
