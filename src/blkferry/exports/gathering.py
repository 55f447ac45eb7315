"""Reads of several pieces by the engine, all at once, into one buffer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from blkferry.exports.places import Stretch
from blkferry.plane.buffers import Buffer
from blkferry.plane.services import Services

Gathered = Callable[[Buffer, int], None]
"""Gets the buffer, which it releases, and a negated errno, or how many bytes came: fewer at the end of a file."""


def gather(services: Services, stretches: list[Stretch], most: int, done: Gathered) -> bool:
    """Begin to read what lies there, `most` pieces of storages at the most, with one call of `done` from the engine.

    False when there are more of them or none, or they are not aligned; then nothing was begun.
    """
    offset, end = stretches[0][2], stretches[-1][3]
    parts = [(lane.storage, delta, start, stop) for lane, delta, start, stop in stretches if lane is not None]
    if not 0 < len(parts) <= most:
        return False
    for storage, delta, start, stop in parts:
        if storage.direct and (start - offset | start + delta | stop - start) % storage.alignment:
            return False
    buffer = services.buffers.acquire(end - offset)
    left, count, failure = len(parts), end - offset, 0

    def have_read(wanted: int, result: int) -> None:
        nonlocal left, count, failure
        if result < 0:
            failure = result
        else:
            count -= wanted - result
        left -= 1
        if not left:
            done(buffer, failure or count)

    if len(parts) < len(stretches):
        for lane, _, start, stop in stretches:
            if lane is None:
                buffer.view[start - offset : stop - offset] = bytes(stop - start)
    for storage, delta, start, stop in parts:
        storage.read(buffer, start - offset, stop - start, start + delta, partial(have_read, stop - start))
    return True
