"""Requests off the straight line: by sendfile, by the engine, or as a task.

Each function takes the client whose turn it is. What it starts and does not finish is counted by `client.begin`, and
ends with exactly one `client.finished`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from blkferry.exports.gathering import gather
from blkferry.exports.nbd import later, slow
from blkferry.exports.nbd.limits import (
    MAX_ENGINE_PIECES,
    MAX_READ_PIECES,
    SENDFILE_FROM,
    ZEROES,
)
from blkferry.graph import access
from blkferry.plane.buffers import Buffer
from blkferry.plane.storage import Storage
from blkferry.plane.window import REGION_BITS
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import MAX_REQUEST, Cmd, CmdFlag, Errno, Mode

if TYPE_CHECKING:
    from blkferry.exports.nbd.client import NbdClient
    from blkferry.exports.places import Stretch


_DF, _FUA = int(CmdFlag.DF), int(CmdFlag.FUA)  # as plain numbers: an IntFlag takes a microsecond to test


class Payload:
    """What a request brings along and has not all arrived. Without a `buffer` it is being thrown away."""

    __slots__ = ("buffer", "have", "length", "request")

    def __init__(self, request: wire.Request, length: int, buffer: Buffer | None) -> None:
        self.request = request
        self.length = length
        self.buffer = buffer
        self.have = 0


def dispatch(client: NbdClient, data: memoryview, pos: int, end: int, request: wire.Request) -> int:
    """Execute one request whose header ends at `pos`; return where the next one begins."""
    if request.type == Cmd.DISC:
        client.end()
        return pos
    carried = request.payload_length(client.mode)
    if carried:
        return _with_payload(client, data, pos, end, request, carried)
    refusal = client.check(request)
    if refusal is not None:
        _refuse(client, request, refusal)
    elif request.type == Cmd.READ:
        _read(client, request)
    elif request.type == Cmd.FLUSH and (target := client.root.node.flush_target()) is not None:
        client.begin(0)
        target.flush(lambda result: client.finished(request, result, 0))
    elif request.type != Cmd.FLUSH or not later.flush(client, request):
        client.spawn(slow.execute(client, request), 0)
    return pos


def failed(client: NbdClient, request: wire.Request, error: OSError) -> bytes:
    """The reply to a request that the storage failed."""
    return slow.error_reply(client, request, error)


def zeroes(mode: Mode, request: wire.Request) -> bytes:
    """The reply to a small read of zeroes."""
    if mode is Mode.SIMPLE or request.flags & _DF:
        header = wire.data_header(mode, request, request.offset, request.length, done=True)
        return header + ZEROES[: request.length]
    return wire.hole_chunk(mode, request, request.offset, request.length, done=True)


def _refuse(client: NbdClient, request: wire.Request, refusal: wire.Refusal) -> None:
    client.outbox.send(memoryview(wire.error_reply(client.mode, request, *refusal)))


# --- Requests with a payload ----------------------------------------------------------------------------------


def _with_payload(client: NbdClient, data: memoryview, pos: int, end: int, request: wire.Request, carried: int) -> int:
    """A request that brings bytes along: take them all, or step over them when it is refused anyway."""
    if carried > MAX_REQUEST:
        text = f"len ({carried}) is larger than max len ({MAX_REQUEST})"
        _refuse(client, request, wire.Refusal(Errno.EINVAL, text))
        client.close(f"a payload of {carried} bytes is larger than {MAX_REQUEST}")
        return end
    refusal = None
    if request.type != Cmd.BLOCK_STATUS or carried > wire.max_status_filter(client.selected):
        refusal = client.check(request)
        if refusal is None and request.type != Cmd.WRITE:
            refusal = wire.Refusal(Errno.EINVAL, "this command takes no payload")
    if refusal is not None:
        _refuse(client, request, refusal)
    payload = Payload(request, carried, client.services.buffers.acquire(carried) if refusal is None else None)
    payload.have = min(carried, end - pos)
    if payload.buffer is not None:
        payload.buffer.view[: payload.have] = data[pos : pos + payload.have]
    if payload.have < carried:
        client.payload = payload
    else:
        with_whole_payload(client, payload, tried=True)
    return pos + payload.have


def with_whole_payload(client: NbdClient, payload: Payload, *, tried: bool = False) -> None:
    """Execute a request all of whose payload has come; `tried` says that it could not be done within the turn."""
    request, buffer = payload.request, payload.buffer
    if buffer is None:
        return
    if request.type == Cmd.WRITE:
        if tried or not _write_now(client, request, buffer):
            _write(client, request, buffer)
        return
    parsed = wire.parse_status_filter(buffer.view[: payload.length], client.selected)
    buffer.release()
    if isinstance(parsed, wire.Refusal):
        _refuse(client, request, parsed)
        return
    request = request._replace(length=parsed.length, flags=request.flags & ~int(CmdFlag.PAYLOAD_LEN))
    refusal = client.check(request)
    if refusal is not None:
        _refuse(client, request, refusal)
    else:
        client.spawn(slow.execute(client, request, ids=parsed.ids), 0)


def _write_now(client: NbdClient, request: wire.Request, buffer: Buffer) -> bool:
    """Write from within the turn, if that can be done; tells whether it was, and then the buffer is released."""
    places, root = client.places, client.root
    whole = places.look()
    storage = whole[0].storage if whole is not None and whole[0] is not None else None
    pace = places.pace
    began = time.monotonic()
    if not places.may_write or request.flags & _FUA or root.writethrough or not pace.begin(began):
        return False
    view = buffer.view[: request.length]
    try:
        if whole is None or storage is None:
            if not access.write_now(root.node, request.offset, view):
                return False
        elif storage.direct:
            return False
        else:
            places.mark(request.offset, request.length)
            storage.write_now(view, request.offset + whole[1])
    except OSError as error:
        reply = failed(client, request, error)
    else:
        reply = wire.success_reply(client.mode, request)
    buffer.release()
    client.outbox.send(memoryview(reply))
    pace.end(began, 1)
    return True


def _write(client: NbdClient, request: wire.Request, buffer: Buffer) -> None:
    """Write in place by the engine where that is all there is to do, else as a task."""
    length = request.length
    fua = bool(request.flags & _FUA) or client.root.writethrough
    spot = client.places.in_place(request.offset, length)
    if spot is None and not fua and later.write(client, request, buffer):
        return
    if spot is None or not client.places.is_plain_write(*spot, length, fua=fua):
        client.spawn(slow.write(client, request, buffer), length)
        return
    storage, place = spot
    client.begin(length)

    def written(result: int) -> None:
        buffer.release()
        client.finished(request, result, length)

    storage.fast_write(buffer, length, place, fua, written)


# --- Reads ----------------------------------------------------------------------------------------------------


def _read(client: NbdClient, request: wire.Request) -> None:
    """A read that is large, cold, unaligned, flagged, or of several pieces."""
    length = request.length
    stretches = None
    if length and not request.flags & _FUA:
        stretches = client.places.stretches(request.offset, length)
    if stretches is not None:
        if length >= SENDFILE_FROM:
            if _send_cached(client, request, stretches):
                return
        elif client.places.whole is None and _send_small(client, request, stretches):
            return
        if _gather(client, request, stretches):
            return
    elif later.read(client, request):
        return
    client.spawn(slow.execute(client, request), length)


def _send_small(client: NbdClient, request: wire.Request, stretches: list[Stretch]) -> bool:
    """Send a small read of several pieces from the page cache; False when it is not all there."""
    payload = bytearray(request.length)
    view = memoryview(payload)
    for lane, delta, start, end in stretches:
        if lane is None:
            continue
        storage = lane.storage
        if storage.inline_read_flags is None:
            return False
        part = view[start - request.offset : end - request.offset]
        try:
            count = os.preadv(storage.fd, (part,), start + delta, storage.inline_read_flags)
        except BlockingIOError:
            return False
        except OSError as error:
            client.outbox.send(memoryview(failed(client, request, error)))
            return True
        if count < len(part):
            return False
    client.outbox.send(memoryview(_small_reply(client, request, bytes(payload))))
    return True


def _gather(client: NbdClient, request: wire.Request, stretches: list[Stretch]) -> bool:
    """Read all pieces at once by the engine; False when they are too many or not aligned."""
    length = request.length

    def done(buffer: Buffer, result: int) -> None:
        if result == length:
            _answer_read(client, request, buffer)
            client.finished(None, 0, length)
            return
        buffer.release()
        if result < 0:
            client.finished(request, result, length)
        else:  # the end of the file: the task knows what may be zero there and what may not
            client.spawn(slow.execute(client, request), length)
            client.finished(None, 0, length)

    if not gather(client.services, stretches, MAX_ENGINE_PIECES, done):
        return False
    client.begin(length)
    return True


_Part = tuple[Storage | None, int, int]
"""(storage, place, length) of data in the page cache; zeroes where there is no storage."""


def _send_cached(client: NbdClient, request: wire.Request, stretches: list[Stretch]) -> bool:
    """Send a large read from the page cache, its holes as holes; False when it is not all there."""
    sparse = client.mode != Mode.SIMPLE and not request.flags & _DF
    turn = client.places.turn
    parts: list[_Part] = []
    for lane, delta, start, end in stretches:
        place, length = start + delta, end - start
        if lane is None:
            parts.append((None, 0, length))
        elif lane.is_hot(place, length, turn):
            parts.append((lane.storage, place, length))
        elif lane.storage.direct or not _add_cached(client, lane.storage, place, length, sparse, parts):
            return False
    chunks = _chunks(parts)
    if not sparse or len(chunks) > MAX_READ_PIECES:
        chunks = [parts]
        sparse = False
    offset, end = request.offset, request.offset + request.length
    for chunk in chunks:
        length = sum(part[2] for part in chunk)
        done = offset + length == end
        if sparse and chunk[0][0] is None:
            hole = wire.hole_chunk(client.mode, request, offset, length, done=done)
            client.outbox.send(memoryview(hole), more=not done)
        else:
            header = wire.data_header(client.mode, request, offset, length, done=done)
            client.outbox.send(memoryview(header), more=True)
            _send_parts(client, [chunk] if sparse else _chunks(chunk))
        offset += length
    return True


def _chunks(parts: list[_Part]) -> list[list[_Part]]:
    """Data and zeroes apart."""
    chunks: list[list[_Part]] = []
    for part in parts:
        if chunks and (chunks[-1][0][0] is None) == (part[0] is None):
            chunks[-1].append(part)
        else:
            chunks.append([part])
    return chunks


def _send_parts(client: NbdClient, chunks: list[list[_Part]]) -> None:
    lent = client.places.lent
    for chunk in chunks:
        if chunk[0][0] is not None:
            client.outbox.send_files(chunk, lent=lent)  # type: ignore[arg-type]  # there is a storage in all of them
            continue
        for _, _, length in chunk:
            for start in range(0, length, len(ZEROES)):
                client.outbox.queue(ZEROES[: length - start])
        client.outbox.flush()


def _add_cached(client: NbdClient, storage: Storage, place: int, length: int, sparse: bool, parts: list[_Part]) -> bool:
    """Add the data and holes of a piece of a file to `parts`; False when it is not all in the page cache."""
    if place + length > storage.refresh_size():  # sendfile ends where the file does: an odd tail, or it was cut off
        return False
    pieces = [(length, True)]
    if sparse and storage.seek_inline and not storage.known_data(place, length):
        pieces = storage.allocation(place, length, MAX_READ_PIECES)
        if sum(piece for piece, _ in pieces) < length:
            return False  # too fragmented to be worth it: one chunk of data is
    at = place
    for piece, is_data in pieces:
        if is_data and not storage.in_memory and not client.services.cache.resident(storage.fd, at, piece):
            return False
        parts.append((storage if is_data else None, at, piece))
        at += piece
    window = storage.window()
    if window is not None and place + length <= window.size:
        window.touch(place >> REGION_BITS, client.services.cache)
        window.touch(place + length - 1 >> REGION_BITS, client.services.cache)
    return True


def _answer_read(client: NbdClient, request: wire.Request, buffer: Buffer) -> None:
    """Queue the bytes in `buffer` as the whole answer; small ones are copied so that the buffer is free at once."""
    length = request.length
    if length >= SENDFILE_FROM:
        client.queue(wire.data_header(client.mode, request, request.offset, length, done=True))
        client.queue(buffer.view[:length], buffer)
        return
    payload = buffer.view[:length].tobytes()
    buffer.release()
    client.queue(_small_reply(client, request, payload))


def _small_reply(client: NbdClient, request: wire.Request, payload: bytes) -> bytes:
    if not payload[0] and payload == ZEROES[: request.length]:
        return zeroes(client.mode, request)
    return wire.data_header(client.mode, request, request.offset, request.length, done=True) + payload
