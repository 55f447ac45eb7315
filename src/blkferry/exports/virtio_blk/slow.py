"""What takes more than one step, as coroutines on the loop of the node. They raise OSError or Error, or return.

Bytes that are not moved by one system call between disk and driver are copied by way of a buffer: so a driver that
changes them meanwhile changes nothing that was looked at, and what was lost with its memory is not written.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

from blkferry.exports.virtio_blk.limits import CHUNK
from blkferry.exports.virtio_blk.request import Request, gather
from blkferry.plane.buffers import Buffer

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.queue import Queue


async def _acquire(queue: Queue, length: int) -> Buffer:
    """A buffer, when the loop has one to give."""
    buffers = queue.services.buffers
    while buffers.exhausted:
        room = asyncio.Event()
        buffers.wait(room.set)
        await room.wait()
    return buffers.acquire(length)


async def read(queue: Queue, request: Request, offset: int) -> None:
    """Fill the driver's memory with what is at `offset`."""
    done, length = 0, request.length_in
    buffer = await _acquire(queue, min(length, CHUNK))
    try:
        while done < length:
            view = buffer.view[: min(length - done, CHUNK)]
            await queue.device.root.read(offset + done, view)
            at = 0
            for piece in gather(request.data_in, done, len(view)):
                piece[:] = view[at : at + len(piece)]
                at += len(piece)
            done += len(view)
    finally:
        buffer.release()


async def write(queue: Queue, request: Request, offset: int) -> None:
    """Write the driver's memory at `offset`."""
    done, length = 0, request.length_out
    root = queue.device.root
    buffer = await _acquire(queue, min(length, CHUNK))
    try:
        while done < length:
            view = buffer.view[: min(length - done, CHUNK)]
            at = 0
            for piece in gather(request.data_out, done, len(view)):
                view[at : at + len(piece)] = piece
                at += len(piece)
            if queue.memory.lost:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            await root.write(offset + done, view)
            done += len(view)
    finally:
        buffer.release()


async def flush(queue: Queue) -> None:
    if queue.device.lost_writes:
        queue.device.lost_writes = False
        raise OSError(errno.EIO, "writes were lost")
    await queue.device.root.flush()


async def discard(queue: Queue, offset: int, length: int) -> None:
    await queue.device.root.discard(offset, length)


async def write_zeroes(queue: Queue, offset: int, length: int, *, unmap: bool) -> None:
    await queue.device.root.write_zeroes(offset, length, unmap=unmap)
