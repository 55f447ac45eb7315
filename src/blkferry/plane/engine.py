"""What moves bytes when it may block: the interface that the ring and the worker threads share.

Every operation ends with exactly one call of `done` on the loop that owns the engine, with the number of bytes moved
(all of them, unless a read met the end of the file) or a negated errno. `start` is an offset in the buffer. Memory that
is not a `Buffer` may go away meanwhile: then the result is -EFAULT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

Done = Callable[[int], None]


class Memory(Protocol):
    """What bytes are moved from and to: `Buffer`s of ours, or memory that is shared with somebody."""

    @property
    def address(self) -> int:
        """Where in this process `view` begins."""

    @property
    def view(self) -> memoryview: ...


class Engine(Protocol):
    """Asynchronous file operations of one loop."""

    name: str

    def read(self, fd: int, buffer: Memory, start: int, length: int, offset: int, done: Done) -> None: ...

    def write(self, fd: int, buffer: Memory, start: int, length: int, offset: int, flags: int, done: Done) -> None: ...

    def readv(self, fd: int, pieces: Sequence[memoryview], offset: int, done: Done) -> None:
        """Read into writable memory of any kind, 1024 pieces at most. What is moved may be short for any reason."""

    def writev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, done: Done) -> None:
        """Write likewise."""

    def fdatasync(self, fd: int, done: Done) -> None: ...

    def fallocate(self, fd: int, mode: int, offset: int, length: int, done: Done) -> None: ...

    def kick(self) -> None:
        """Start what was queued. Called at the end of a batch; forgetting it only costs a turn of the loop."""

    def close(self) -> None: ...
