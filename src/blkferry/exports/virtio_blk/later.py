"""Requests that one driver begins within the turn and answers later, by a callback: no task, no future.

That is what another server's disk is made of (`Node.read_later` and the like). Each function tells whether the request
was begun; where it was not, it takes a task (`slow`). The bytes go by way of a buffer: what a driver of ours fills must
not be memory that a guest can take away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from blkferry.exports.virtio_blk.limits import MAX_INLINE
from blkferry.exports.virtio_blk.request import Request, gather
from blkferry.wire.virtio_blk import Status

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.queue import Queue

Failed = Callable[["Queue", Request, OSError], None]


def read(queue: Queue, request: Request, offset: int, failed: Failed) -> bool:
    """Begin to fill the driver's memory with what is at `offset`."""
    length, buffers = request.length_in, queue.services.buffers
    if length > MAX_INLINE or buffers.exhausted:
        return False
    buffer = buffers.acquire(length)

    def have_read(result: int) -> None:
        if result < 0:
            failed(queue, request, OSError(-result, os.strerror(-result)))
        else:
            at = 0
            for piece in request.data_in:
                piece[:] = buffer.view[at : at + len(piece)]
                at += len(piece)
            queue.finish(request, Status.OK)
        buffer.release()
        queue.end()

    if not queue.device.root.read_later(offset, buffer.view[:length], have_read):
        buffer.release()
        return False
    queue.begin()
    return True


def write(queue: Queue, request: Request, offset: int, failed: Failed) -> bool:
    """Begin to write the driver's memory at `offset`."""
    length, buffers = request.length_out, queue.services.buffers
    if length > MAX_INLINE or buffers.exhausted:
        return False
    buffer = buffers.acquire(length)
    at = 0
    for piece in gather(request.data_out, 0, length):
        buffer.view[at : at + len(piece)] = piece
        at += len(piece)

    def written(result: int) -> None:
        buffer.release()
        if result < 0:
            failed(queue, request, OSError(-result, os.strerror(-result)))
        else:
            queue.finish(request, Status.OK)
        queue.end()

    if queue.memory.lost:  # what was copied may be zeroes that took its place
        buffer.release()
        failed(queue, request, OSError(errno.EFAULT, os.strerror(errno.EFAULT)))
        return True
    if not queue.device.root.write_later(offset, buffer.view[:length], written):
        buffer.release()
        return False
    queue.begin()
    return True
