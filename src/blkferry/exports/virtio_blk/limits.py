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
"""Requests that have to be copied are, piece by piece."""

TURN_REQUESTS: Final = 256
"""How many requests one queue may have served before others of its loop get their turn."""

STALL_SECONDS: Final = 0.005
"""A turn with inline writes that takes longer was throttled by the kernel: writes then go by the engine for a while."""

WRITE_SECONDS: Final = 100e-6
"""What one write may take besides: a turn with many of them is not one that stalled."""

STALL_PENALTY: Final = 20
"""For so many times as long as a turn stalled, writes go to the engine."""

COMPLAINT_SECONDS: Final = 1.0
"""One log line about failed requests of a device in this time."""

FILL_BELOW: Final = 32 << 10
"""Smaller writes are worth finding a place for that will be overwritten again."""

MAX_COPY: Final = 256 << 10
"""What is copied from a mapped file by one request; a system call costs little beside more than that."""

ZEROES: Final = memoryview(bytes(MAX_COPY))
