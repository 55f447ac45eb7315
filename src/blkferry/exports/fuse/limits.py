"""What one file may ask of a turn and hold of the daemon, and where one way of serving it gives way to another."""

from __future__ import annotations

TURN_REQUESTS = 64
"""Requests that are served before others of the loop get a turn."""

MAX_PIECES = 64
"""Places that one reply is gathered from; a read that is more scattered is a task."""

COPY_BELOW = 128 << 10
"""Data of a write that has to wait are copied out of the message; larger ones keep it, and the next gets another."""

ATTRIBUTES_SECONDS = 1
"""How long the kernel may believe what it was told of the file, unless it hears otherwise."""

BLOCK_SIZE = 4096
"""What programs are told to read and write at least."""

MAX_SIZE = (1 << 63) - 512
"""The largest file, in bytes."""

PUNCH_BY_WRITING = 1 << 20
"""Holes up to this are made by writing zeroes where the node knows no other way; a larger one is refused."""

INTERRUPT_SECONDS = 1.0
"""A request whose process got a signal is given up if it takes that much longer."""

READY_SECONDS = 10.0
"""How long the kernel may take to agree on the protocol."""

RELEASE_SECONDS = 5.0
"""How long an export that is removed waits for those whom it let through to the image."""

SETTLE_SECONDS = 0.25
"""How long the kernel may take to tell that a file was closed, before a safe removal is refused."""
