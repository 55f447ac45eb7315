"""Page-aligned memory for I/O that outlives a turn of the loop.

A buffer belongs to whoever acquired it until `release`: the ring writes into its address behind Python's back, so
it is never resized or freed while in use. Pools belong to one loop and keep a few buffers of each size for reuse.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

SMALLEST_BITS = 12
"""Buffers are powers of two from a page up, so that O_DIRECT and reuse need no thought."""

IDLE_BYTES = 64 << 20
"""What a pool keeps for reuse; more than that goes back to the system when it is released."""


class Buffer:
    """`size` bytes at `address`, seen from Python as `view`."""

    __slots__ = ("_map", "_pool", "address", "size", "view")

    def __init__(self, pool: BufferPool, size: int) -> None:
        self._pool = pool
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def release(self) -> None:
        """Give the memory back to its pool; the caller must not touch it any more."""
        self._pool.put(self)


class BufferPool:
    """Buffers by size class, owned by one loop. `limit` bounds all bytes handed out at a time.

    `call_soon` is how those who waited are told that there is room again.
    """

    def __init__(self, limit: int, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self.limit = limit
        self._call_soon = call_soon
        self._waiting: set[Callable[[], None]] = set()
        self.used = 0
        self._idle: dict[int, list[Buffer]] = {}
        self._idle_bytes = 0

    @property
    def exhausted(self) -> bool:
        """Whether new work should wait: what has been handed out has reached the limit."""
        return self.used >= self.limit

    def wait(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once when the pool is no longer exhausted."""
        self._waiting.add(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Undo `wait`."""
        self._waiting.discard(callback)

    def acquire(self, length: int) -> Buffer:
        """Return a buffer of at least `length` bytes, its contents undefined. Never refuses: ask `exhausted` first."""
        size = 1 << max(SMALLEST_BITS, (length - 1).bit_length())
        self.used += size
        idle = self._idle.get(size)
        if idle:
            self._idle_bytes -= size
            return idle.pop()
        return Buffer(self, size)

    def put(self, buffer: Buffer) -> None:
        """Take a buffer back (use `Buffer.release`)."""
        self.used -= buffer.size
        if self._idle_bytes + buffer.size <= IDLE_BYTES:
            self._idle_bytes += buffer.size
            self._idle.setdefault(buffer.size, []).append(buffer)
        if self._waiting and not self.exhausted:
            waiting, self._waiting = self._waiting, set()
            for callback in waiting:
                self._call_soon(callback)
