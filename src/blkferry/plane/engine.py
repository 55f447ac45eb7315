"""What moves bytes when it may block: the interface that the ring and the worker threads share.

Every operation ends with exactly one call of `done` on the loop that owns the engine, with the number of bytes moved
(all of them, unless a read met the end of the file) or a negated errno. `start` is an offset in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blkferry.plane.buffers import Buffer

Done = Callable[[int], None]


class Engine(Protocol):
    """Asynchronous file operations of one loop."""

    name: str

    def read(self, fd: int, buffer: Buffer, start: int, length: int, offset: int, done: Done) -> None: ...

    def write(self, fd: int, buffer: Buffer, start: int, length: int, offset: int, flags: int, done: Done) -> None: ...

    def fdatasync(self, fd: int, done: Done) -> None: ...

    def fallocate(self, fd: int, mode: int, offset: int, length: int, done: Done) -> None: ...

    def kick(self) -> None:
        """Start what was queued. Called at the end of a batch; forgetting it only costs a turn of the loop."""

    def close(self) -> None: ...
