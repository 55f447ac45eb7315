"""Reads and writes off the straight line: of several pieces, by the engine, at the end of the file, or as a task.

Each function answers the request, now or later. What it starts and does not finish is counted by `session.begin`, and
ends with one `session.finished`.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from blkferry.exports.fuse.limits import MAX_PIECES, MAX_SIZE
from blkferry.exports.gathering import gather
from blkferry.plane.buffers import Buffer
from blkferry.plane.window import REGION_BITS
from blkferry.wire.fuse.init import MAX_WRITE
from blkferry.wire.fuse.replies import OUT_HEADER, WRITE_REPLY, failure, success

if TYPE_CHECKING:
    from blkferry.exports.fuse.session import Session
    from blkferry.exports.places import Lane, Stretch

_ZEROES = memoryview(bytes(MAX_WRITE))


# Reads ---------------------------------------------------------------------------------------------------------------


def read(session: Session, unique: int, offset: int, size: int) -> None:
    """Answer a READ; at the end of the file it gets less than it asks for."""
    size = min(size, max(session.places.size - offset, 0))
    if not size:
        session.reply(success(unique))
        return
    if size > MAX_WRITE:  # more than was agreed on
        session.reply(failure(unique, errno.EINVAL))
        return
    stretches = session.places.stretches(offset, size)
    if stretches is not None and (
        _answer_cached(session, unique, offset, size, stretches) or _gather(session, unique, offset, size, stretches)
    ):
        return
    if not _read_later(session, unique, offset, size):
        session.spawn(unique, _read(session, unique, offset, size), size)


def _read_later(session: Session, unique: int, offset: int, size: int) -> bool:
    """Have one driver read all of it, as another server's disk is read; False when that takes a task."""
    buffer = session.services.buffers.acquire(size)

    def have_read(result: int) -> None:
        if result < 0:
            session.fail(unique, OSError(-result, os.strerror(-result)), "reading")
        else:
            session.sent += size
            session.reply(OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), buffer.view[:size])
        buffer.release()
        session.finished(size)

    if not session.root.read_later(offset, buffer.view[:size], have_read):
        buffer.release()
        return False
    session.begin(size)
    return True


async def _read(session: Session, unique: int, offset: int, size: int) -> bytes:
    data = bytearray(size)
    await session.root.read(offset, memoryview(data))
    session.sent += size
    return success(unique, data)


def _answer_cached(session: Session, unique: int, offset: int, size: int, stretches: list[Stretch]) -> bool:
    """Answer from the page cache; False when it is not all there."""
    if len(stretches) > MAX_PIECES:
        return False
    parts: list[memoryview] = []
    for lane, delta, start, end in stretches:
        part = _ZEROES[: end - start]
        if lane is not None:
            found = _cached(session, lane, start + delta, end - start, start - offset)
            if found is None:
                return False
            part = found
        parts.append(part)
    session.sent += size
    session.reply(OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), *parts)
    return True


def _cached(session: Session, lane: Lane, place: int, length: int, at: int) -> memoryview | None:
    """A piece of an image that is in the page cache: from its mapping, or copied to `at` of the scratch memory."""
    storage = lane.storage
    if lane.is_hot(place, length, session.places.turn):
        window = storage.window()
        assert window is not None
        return window.view[place : place + length]
    flags = storage.inline_read_flags
    if flags is None:
        return None
    window = storage.window()
    if window is not None and place + length <= window.size:
        window.touch(place >> REGION_BITS, session.services.cache)
    view = session.services.scratch_view[at : at + length]
    try:
        return view if os.preadv(storage.fd, (view,), place, flags) == length else None
    except OSError:  # it would have to wait; or it fails, as it will once more where that is answered
        return None


def _gather(session: Session, unique: int, offset: int, size: int, stretches: list[Stretch]) -> bool:
    """Read all pieces at once by the engine; False when they are too many or not aligned."""

    def done(buffer: Buffer, result: int) -> None:
        if result == size:
            session.sent += size
            session.reply(OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), buffer.view[:size])
        elif result < 0:
            session.fail(unique, OSError(-result, os.strerror(-result)), "reading")
        else:  # the end of the file: the task knows what may be zero there and what may not
            session.spawn(unique, _read(session, unique, offset, size), size)
        buffer.release()
        session.finished(size)

    if not gather(session.services, stretches, MAX_PIECES, done):
        return False
    session.begin(size)
    return True


# Writes --------------------------------------------------------------------------------------------------------------


def write(session: Session, unique: int, offset: int, size: int, *, tried: bool = False) -> None:
    """Answer a WRITE, whose data the session has just received; a file that does not grow takes what fits into it.

    `tried` says that it could not be done within the turn.
    """
    if not session.writable:
        session.reply(failure(unique, errno.EACCES))
        return
    if size > MAX_WRITE:
        session.reply(failure(unique, errno.EINVAL))
        return
    end, length = offset + size, session.places.size
    if end > MAX_SIZE:
        session.reply(failure(unique, errno.EFBIG))
        return
    if end > length and not session.growable:
        if offset >= length:
            session.reply(failure(unique, errno.ENOSPC))
            return
        size = length - offset
    try:
        if size and (end <= length or not session.growable or _grow_now(session, end)):
            if not tried and _write_now(session, offset, size):
                session.reply(_written(session, unique, size))
            else:
                _write(session, unique, offset, size)
            return
    except OSError as error:
        session.fail(unique, error, "writing")
        return
    if not size:
        session.reply(_written(session, unique, 0))
        return
    buffer, start = session.keep_data(size)
    session.spawn(unique, _grow_and_write(session, unique, offset, size, buffer, start), size)


def _written(session: Session, unique: int, size: int) -> bytes:
    session.received += size
    session.inode.modified = time.time_ns()
    return WRITE_REPLY.pack(WRITE_REPLY.size, 0, unique, size)


def _grow_now(session: Session, end: int) -> bool:
    """Make the file longer if that can be done at once."""
    node = session.root.node
    if session.resizing.locked() or not node.grow(end):
        return False
    node.retire()
    return True


def _write_now(session: Session, offset: int, size: int) -> bool:
    if not session.places.pace.begin(time.monotonic()):
        return False
    return session.root.write_now(offset, session.data[:size])


def _write(session: Session, unique: int, offset: int, size: int) -> None:
    """Have it written in place by the engine, or elsewhere by one driver, where that is all; or as a task."""
    root = session.root
    buffer, start = session.keep_data(size)

    def written(result: int) -> None:
        buffer.release()
        if result < 0:
            session.fail(unique, OSError(-result, os.strerror(-result)), "writing")
        else:
            session.reply(_written(session, unique, size))
        session.finished(size)

    spot = session.places.in_place(offset, size)
    if spot is not None and session.places.is_plain_write(*spot, size, fua=root.writethrough):
        session.begin(size)
        spot[0].fast_write(buffer, size, spot[1], root.writethrough, written, start=start)
    elif spot is None and root.write_later(offset, buffer.view[start : start + size], written):
        session.begin(size)
    else:
        session.spawn(unique, _write_all(session, unique, offset, size, buffer, start), size)


async def _write_all(session: Session, unique: int, offset: int, size: int, buffer: Buffer, start: int) -> bytes:
    try:
        await session.root.write(offset, buffer.view[start : start + size])
    finally:
        buffer.release()
    return _written(session, unique, size)


async def _grow_and_write(session: Session, unique: int, offset: int, size: int, buffer: Buffer, start: int) -> bytes:
    try:
        async with session.resizing:
            if session.root.node.length < offset + size:
                await resize(session, offset + size)
    except BaseException:
        buffer.release()
        raise
    return await _write_all(session, unique, offset, size, buffer, start)


async def resize(session: Session, length: int) -> None:
    """Change the length of the node; the caller holds `session.resizing`. Raises OSError or Error."""
    node = session.root.node
    await node.resize(length)
    if session.places.size != node.length:
        node.retire()
