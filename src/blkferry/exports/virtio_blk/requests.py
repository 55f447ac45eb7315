"""Requests off the straight line: checked, then done at once, by the engine, or as a task.

Every request ends with exactly one `queue.finish`. What is not finished within the turn is counted by `queue.begin`.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from blkferry.exports.virtio_blk import later, slow
from blkferry.exports.virtio_blk.limits import MAX_INLINE, MAX_REMAP_SECTORS
from blkferry.exports.virtio_blk.request import Request, gather
from blkferry.graph import access
from blkferry.plane.storage import Storage
from blkferry.units import SECTOR
from blkferry.wire.virtio_blk import ID_BYTES, SEGMENT, UNMAP, Segment, Status, Type

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.queue import Queue

MAX_ENGINE_PIECES: Final = 8
"""Places that a read is gathered from at once; one that is more scattered is a task."""

_IN, _OUT = int(Type.IN), int(Type.OUT)
_OK = int(Status.OK)


def dispatch(queue: Queue, request: Request, *, inline_writes: bool) -> None:
    """Execute one request, or begin to."""
    if queue.memory.lost:  # what it says may be zeroes that took the place of something else
        queue.finish(request, Status.IOERR)
        return
    kind = request.type
    if kind == _IN:
        _read(queue, request)
        return
    if kind == _OUT:
        _write(queue, request, inline=inline_writes)
        return
    match kind:
        case Type.FLUSH:
            _flush(queue, request)
        case Type.GET_ID:
            _get_id(queue, request)
        case Type.DISCARD | Type.WRITE_ZEROES:
            _remap(queue, request)
        case _:
            queue.finish(request, Status.UNSUPP)


def _range(queue: Queue, request: Request, length: int) -> int | None:
    """Where a read or write of `length` bytes begins, None if it is refused."""
    device = queue.device
    offset: int = request.sector * SECTOR
    if length % SECTOR or offset % device.block_size or offset + length > device.size:
        device.complain(
            f"a request for {length} bytes at sector {request.sector} of a disk of {device.size // SECTOR} is refused"
        )
        return None
    return offset


def failed(queue: Queue, request: Request, error: OSError) -> None:
    """The storage refused."""
    queue.device.complain(
        f"{Type(request.type).name} of {max(request.length_in, request.length_out)} bytes at sector {request.sector}:"
        f" {error.strerror}"
    )
    unsupported = error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP)
    queue.finish(request, Status.UNSUPP if unsupported else Status.IOERR)


# --- Reads ----------------------------------------------------------------------------------------------------


def _read(queue: Queue, request: Request) -> None:
    length = request.length_in
    offset = _range(queue, request, length)
    if offset is None:
        queue.finish(request, Status.IOERR)
        return
    if not length:
        queue.finish(request, _OK)
        return
    stretches = queue.device.places.stretches(offset, length) if length <= MAX_INLINE else None
    if stretches is not None and len(stretches) <= MAX_ENGINE_PIECES:
        parts: list[tuple[Storage, int, list[memoryview], int]] = []
        for lane, delta, start, end in stretches:
            pieces = request.data_in if len(stretches) == 1 else gather(request.data_in, start - offset, end - start)
            if lane is None:
                for piece in pieces:
                    piece[:] = bytes(len(piece))
            else:
                parts.append((lane.storage, start + delta, pieces, end - start))
        if _read_now(queue, request, parts):
            return
        if _read_later(queue, request, offset, parts):
            return
    if not later.read(queue, request, offset, failed):
        queue.spawn(request, slow.read(queue, request, offset))


def _read_now(queue: Queue, request: Request, parts: list[tuple[Storage, int, list[memoryview], int]]) -> bool:
    """Read from the page cache; False when it is not all there."""
    for storage, place, pieces, length in parts:
        if storage.inline_read_flags is None:
            return False
        try:
            if os.preadv(storage.fd, pieces, place, storage.inline_read_flags) != length:
                return False
        except BlockingIOError:
            return False
        except OSError as error:
            failed(queue, request, error)
            return True
    queue.finish(request, _OK)
    return True


def _read_later(
    queue: Queue, request: Request, offset: int, parts: list[tuple[Storage, int, list[memoryview], int]]
) -> bool:
    """Read by the engine, straight into the driver's memory; False when the storage wants another alignment."""
    for storage, place, _, length in parts:
        if (place | length) % storage.alignment:
            return False
    left, failure = len(parts), 0

    def done(wanted: int, result: int) -> None:
        nonlocal left, failure
        if result != wanted:
            failure = -result if result < 0 else errno.ENODATA
        left -= 1
        if left:
            return
        if failure in (errno.ENODATA, errno.EINVAL):  # the end of the file, or memory that O_DIRECT cannot take
            queue.spawn(request, slow.read(queue, request, offset))
        elif failure:
            failed(queue, request, OSError(failure, os.strerror(failure)))
        else:
            queue.finish(request, _OK)
        queue.end()

    queue.begin()
    for storage, place, pieces, length in parts:
        storage.readv(pieces, place, partial(done, length))
    return True


# --- Writes ---------------------------------------------------------------------------------------------------


def _write(queue: Queue, request: Request, *, inline: bool) -> None:
    device, length = queue.device, request.length_out
    offset = _range(queue, request, length) if device.writable else None
    if offset is None:
        queue.finish(request, Status.IOERR)
        return
    if not length:
        queue.finish(request, _OK)
        return
    root = device.root
    spot = device.places.in_place(offset, length) if length <= MAX_INLINE else None
    if spot is None:
        if inline and length <= MAX_INLINE and _put(queue, request, offset):
            return
        if not later.write(queue, request, offset, failed):
            queue.spawn(request, slow.write(queue, request, offset))
        return
    storage, place = spot
    if inline and not storage.direct:
        storage.dirty += 1  # at once: a flush may follow in this very turn
        try:
            if os.pwritev(storage.fd, request.data_out, place) == length:
                queue.finish(request, _OK)
                return
        except OSError as error:
            failed(queue, request, error)
            return
        # It was cut short, by a limit or a full disk: doing all of it again says why.
    fua = root.writethrough
    if not device.places.is_plain_write(storage, place, length, fua=fua):
        queue.spawn(request, slow.write(queue, request, offset))
        return

    def written(result: int) -> None:
        if result == length:
            queue.finish(request, _OK)
        elif result >= 0 or result == -errno.EINVAL:  # cut short, or memory that O_DIRECT cannot take
            queue.spawn(request, slow.write(queue, request, offset))
        else:
            failed(queue, request, OSError(-result, os.strerror(-result)))
        queue.end()

    queue.begin()
    storage.fast_writev(request.data_out, place, fua, written)


def _put(queue: Queue, request: Request, offset: int) -> bool:
    """Have the driver of the node find a place and write, at once; False when that cannot be done."""
    device = queue.device
    if not device.places.may_write:
        return False
    done = 0
    try:
        for piece in request.data_out:
            if not access.write_now(device.root.node, offset + done, piece):
                return False
            done += len(piece)
    except OSError as error:
        failed(queue, request, error)
    else:
        queue.finish(request, _OK)
    return True


# --- The rest -------------------------------------------------------------------------------------------------


def _flush(queue: Queue, request: Request) -> None:
    if queue.device.lost_writes:
        queue.device.lost_writes = False
        queue.device.complain("a flush fails, for writes before it are lost")
        queue.finish(request, Status.IOERR)
        return
    target = queue.device.root.node.flush_target()
    if target is None:
        queue.spawn(request, slow.flush(queue))
        return

    def flushed(result: int) -> None:
        if result < 0:
            failed(queue, request, OSError(-result, os.strerror(-result)))
        else:
            queue.finish(request, _OK)
        queue.end()

    queue.begin()
    target.flush(flushed)


def _get_id(queue: Queue, request: Request) -> None:
    serial = queue.device.serial
    for piece in gather(request.data_in, 0, ID_BYTES):
        piece[:] = serial[: len(piece)]
        serial = serial[len(piece) :]
    queue.finish(request, _OK)


def _remap(queue: Queue, request: Request) -> None:
    """DISCARD or WRITE_ZEROES of one segment (section 5.2.6)."""
    device = queue.device
    data = b"".join(map(bytes, gather(request.data_out, 0, SEGMENT.size)))
    if not device.writable or len(data) < SEGMENT.size:
        queue.finish(request, Status.IOERR)
        return
    segment = Segment._make(SEGMENT.unpack(data))
    zeroes = request.type == Type.WRITE_ZEROES
    if request.length_out > SEGMENT.size or segment.flags & ~(UNMAP if zeroes else 0):
        queue.finish(request, Status.UNSUPP)
        return
    offset, length = segment.sector * SECTOR, segment.sectors * SECTOR
    if segment.sectors > MAX_REMAP_SECTORS or (offset | length) % device.block_size or offset + length > device.size:
        device.complain(f"{Type(request.type).name} of {length} bytes at sector {segment.sector} is refused")
        queue.finish(request, Status.IOERR)
        return
    if not length:
        queue.finish(request, _OK)
    elif zeroes:
        queue.spawn(request, slow.write_zeroes(queue, offset, length, unmap=bool(segment.flags & UNMAP)))
    else:
        queue.spawn(request, slow.discard(queue, offset, length))
