"""What one driver may ask at once, and where one way of serving it gives way to another."""

from __future__ import annotations

from typing import Final

MAX_REMAP_SECTORS: Final = 32768
"""What one DISCARD or WRITE_ZEROES may cover, 16 MiB; QEMU's limit."""

MAX_QUEUES: Final = 256
"""Vhost-user's messages number queues with eight bits."""

BLOCK_SIZES: Final = (512, 2 << 20)
"""Smallest and largest logical block size, in bytes."""

CHUNK: Final = 1 << 20
"""Piece by piece means this."""

BATCH: Final = 32
"""Requests that are executed before the driver is shown the first of them."""

TURN_SECONDS: Final = 1e-3
"""After this long others of the loop get their turn, once a batch has ended."""

MAX_INLINE: Final = 2 << 20
"""A request for more is a task, done piece by piece: moving a gigabyte from within a turn would hold everybody up."""

FILL_BELOW: Final = 32 << 10
"""Smaller writes are worth finding a place for that will be overwritten again."""

MAX_COPY: Final = 256 << 10
"""What is copied from a mapped file by one request; a system call costs little beside more than that."""

ZEROES: Final = memoryview(bytes(MAX_COPY))
