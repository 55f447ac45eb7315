"""io_uring from Python: the rings are mapped and filled here, one system call starts a whole batch.

Ordering: only the thread that owns the ring touches it, and there is no kernel polling thread. The kernel reads the
submission tail inside io_uring_enter, on this very thread, so program order is enough. With DEFER_TASKRUN completions
are posted inside io_uring_enter too. On kernels without it they may be posted by another processor; every reap is
preceded by an io_uring_enter, which orders our loads behind the kernel's stores on every architecture.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence

from blkferry.plane.engine import Done, Memory
from blkferry.plane.syscalls import address_of

_SYS_SETUP = 425
_SYS_ENTER = 426
_SYS_REGISTER = 427
_REGISTER_EVENTFD = 4
_ENTER_GETEVENTS = 1
_SETUP_CLAMP = 1 << 4
_SETUP_SINGLE_ISSUER = 1 << 12
_SETUP_DEFER_TASKRUN = 1 << 13
_OFF_SQ_RING = 0
_OFF_SQES = 0x10000000
_FEAT_SINGLE_MMAP = 1 << 0
_FEAT_NODROP = 1 << 1

_OP_READV = 1
_OP_WRITEV = 2
_OP_FSYNC = 3
_OP_FALLOCATE = 17
_OP_READ = 22
_OP_WRITE = 23
_FSYNC_DATASYNC = 1

_SQE = struct.Struct("<BBHiQQIIQ")
_SQE_SIZE = 64
_CQE = struct.Struct("<QiI")
_CQE_SIZE = 16

ENTRIES = 256
"""Submission slots. A batch larger than this costs one more system call, nothing else."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_long,
]
_syscall.restype = ctypes.c_long


class RingUnavailable(Exception):  # noqa: N818 - it is a condition to fall back on, not a mistake
    """The kernel has no io_uring for us (too old, switched off, or refused by a container's filter)."""


class _Operation:
    """One request in flight; short transfers are continued until they are complete or hit the end of the file."""

    __slots__ = ("address", "buffer", "done", "fd", "flags", "length", "moved", "offset", "opcode")

    def __init__(
        self,
        opcode: int,
        fd: int,
        offset: int,
        address: int,
        length: int,
        flags: int,
        buffer: object,
        done: Done,
    ) -> None:
        self.opcode = opcode
        self.fd = fd
        self.offset = offset
        self.address = address
        self.length = length
        self.flags = flags
        self.buffer = buffer  # keeps the memory alive while the kernel writes to it
        self.done = done
        self.moved = 0


class Ring:
    """An io_uring owned by one loop. Raises RingUnavailable where the kernel refuses."""

    name = "io_uring"

    def __init__(self, loop: asyncio.AbstractEventLoop, after_batch: Callable[[], None]) -> None:
        self._loop = loop
        self._after_batch = after_batch
        self.fd, parameters = _setup(ENTRIES)
        (sq_entries, cq_entries, _flags, _cpu, _idle, features) = struct.unpack_from("<6I", parameters, 0)
        if not (features & _FEAT_SINGLE_MMAP and features & _FEAT_NODROP):
            os.close(self.fd)
            raise RingUnavailable("the kernel's io_uring is older than 5.5")
        _sq_head, sq_tail, _mask, _n, _flags, _dropped, sq_array = struct.unpack_from("<7I", parameters, 40)
        cq_head, cq_tail, _mask, _n, _overflow, cqes, _flags = struct.unpack_from("<7I", parameters, 80)
        length = max(sq_array + sq_entries * 4, cqes + cq_entries * _CQE_SIZE)
        self._rings = mmap.mmap(self.fd, length, offset=_OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, sq_entries * _SQE_SIZE, offset=_OFF_SQES)
        self._words = memoryview(self._rings).cast("I")
        for slot in range(sq_entries):
            self._words[sq_array // 4 + slot] = slot
        self._sq_entries = sq_entries
        self._sq_tail_word = sq_tail // 4
        self._cq_head_word = cq_head // 4
        self._cq_tail_word = cq_tail // 4
        self._cqes = cqes
        self._cq_mask = cq_entries - 1
        self._tail = 0
        self._head = 0
        self._queued = 0
        self._kick_scheduled = False
        self._reaping = False
        self._flight: dict[int, _Operation] = {}
        self._flight_limit = cq_entries
        self._waiting: deque[_Operation] = deque()
        self._next_tag = 0
        # With DEFER_TASKRUN a finished operation does not make the ring's own descriptor readable, only this one.
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        number = ctypes.c_int(self._event_fd)
        if _syscall(_SYS_REGISTER, self.fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1, None, 0) != 0:
            code = ctypes.get_errno()
            self._release()
            raise RingUnavailable(os.strerror(code))
        loop.add_reader(self._event_fd, self._signalled)

    def read(self, fd: int, buffer: Memory, start: int, length: int, offset: int, done: Done) -> None:
        self._push(_Operation(_OP_READ, fd, offset, buffer.address + start, length, 0, buffer, done))

    def write(self, fd: int, buffer: Memory, start: int, length: int, offset: int, flags: int, done: Done) -> None:
        self._push(_Operation(_OP_WRITE, fd, offset, buffer.address + start, length, flags, buffer, done))

    def readv(self, fd: int, pieces: Sequence[memoryview], offset: int, done: Done) -> None:
        self._push_vector(_OP_READV, fd, pieces, offset, 0, done)

    def writev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, done: Done) -> None:
        self._push_vector(_OP_WRITEV, fd, pieces, offset, flags, done)

    def _push_vector(
        self, opcode: int, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, done: Done
    ) -> None:
        vector = (ctypes.c_uint64 * (2 * len(pieces)))()
        for index, piece in enumerate(pieces):
            vector[2 * index] = address_of(piece)
            vector[2 * index + 1] = len(piece)
        kept = (vector, pieces)
        self._push(_Operation(opcode, fd, offset, ctypes.addressof(vector), len(pieces), flags, kept, done))

    def fdatasync(self, fd: int, done: Done) -> None:
        self._push(_Operation(_OP_FSYNC, fd, 0, 0, 0, _FSYNC_DATASYNC, None, done))

    def fallocate(self, fd: int, mode: int, offset: int, length: int, done: Done) -> None:
        # The submission entry carries the length where others have an address, and the mode where they have a length.
        self._push(_Operation(_OP_FALLOCATE, fd, offset, length, mode, 0, None, done))

    def _push(self, operation: _Operation) -> None:
        if len(self._flight) >= self._flight_limit:
            self._waiting.append(operation)
            return
        if self._queued == self._sq_entries:
            self._enter()
            if self._queued == self._sq_entries:  # the kernel takes none now, and none may be overwritten
                self._waiting.append(operation)
                return
        tag = self._next_tag
        self._next_tag = tag + 1
        self._flight[tag] = operation
        _SQE.pack_into(
            self._sqes,
            (self._tail % self._sq_entries) * _SQE_SIZE,
            operation.opcode,
            0,
            0,
            operation.fd,
            operation.offset,
            operation.address,
            operation.length,
            operation.flags,
            tag,
        )
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        self._queued += 1
        if not self._kick_scheduled:
            self._kick_scheduled = True
            self._loop.call_soon(self.kick)

    def kick(self) -> None:
        """Submit what is queued and reap what is there already."""
        self._kick_scheduled = False
        if self._queued:
            self._reap()

    def _enter(self) -> None:
        self._words[self._sq_tail_word] = self._tail
        while True:
            submitted = _syscall(_SYS_ENTER, self.fd, self._queued, 0, _ENTER_GETEVENTS, None, 0)
            if submitted >= 0:
                self._queued -= submitted
                return
            code = ctypes.get_errno()
            if code not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise OSError(code, os.strerror(code))
            if code != errno.EINTR:
                return  # out of memory or completions first: what is left goes with the next kick

    def _signalled(self) -> None:
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        if self._reaping:  # a completion's callback submits more: the outer call takes care of it
            return
        self._reaping = True
        self._enter()
        words = self._words
        tail = words[self._cq_tail_word]
        while self._head != tail:
            tag, result, _flags = _CQE.unpack_from(self._rings, self._cqes + (self._head & self._cq_mask) * _CQE_SIZE)
            self._head = (self._head + 1) & 0xFFFFFFFF
            words[self._cq_head_word] = self._head
            self._complete(self._flight.pop(tag), result)
        for _ in range(min(len(self._waiting), self._flight_limit - len(self._flight))):
            self._push(self._waiting.popleft())
        if self._queued and not self._kick_scheduled:
            self._kick_scheduled = True
            self._loop.call_soon(self.kick)
        self._reaping = False
        self._after_batch()

    def _complete(self, operation: _Operation, result: int) -> None:
        if result in (-errno.EINTR, -errno.EAGAIN):
            self._push(operation)
            return
        if result > 0 and result < operation.length and operation.opcode in (_OP_READ, _OP_WRITE):
            operation.moved += result
            operation.offset += result
            operation.address += result
            operation.length -= result
            self._push(operation)
            return
        if operation.opcode == _OP_WRITE and result == 0 and operation.length:
            result = -errno.EIO  # a write that moves nothing and does not say why would be retried for ever
        operation.done(result if result < 0 else operation.moved + result)

    def close(self) -> None:
        """Give the ring back. Nothing may be in flight."""
        self._loop.remove_reader(self._event_fd)
        self._release()

    def _release(self) -> None:
        os.close(self._event_fd)
        self._words.release()
        self._sqes.close()
        self._rings.close()
        os.close(self.fd)


def _setup(entries: int) -> tuple[int, bytes]:
    flags = _SETUP_CLAMP
    for extra in (_SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN, 0):
        parameters = ctypes.create_string_buffer(120)
        struct.pack_into("<II", parameters, 8, flags | extra, 0)
        fd = _syscall(_SYS_SETUP, entries, ctypes.addressof(parameters), 0, 0, None, 0)
        if fd >= 0:
            return fd, parameters.raw
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            break
    raise RingUnavailable(os.strerror(code))
