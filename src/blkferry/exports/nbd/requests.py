"""Requests off the straight line: by sendfile, by the engine, or as a task.

Each function takes the client whose turn it is. What it starts and does not finish is counted by `client.begin`, and
ends with exactly one `client.finished`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from blkferry.exports.nbd import slow
from blkferry.exports.nbd.limits import MAX_READ_PIECES, SENDFILE_FROM, STALL_PENALTY_SECONDS, STALL_SECONDS, ZEROES
from blkferry.plane.buffers import Buffer
from blkferry.plane.storage import Storage
from blkferry.plane.window import REGION_BITS
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import MAX_REQUEST, Cmd, CmdFlag, Errno, Mode

if TYPE_CHECKING:
    from blkferry.exports.nbd.client import NbdClient


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
    elif request.type == Cmd.FLUSH and (shortcut := client.shortcut()) is not None and shortcut.write_end:
        client.begin(0)
        shortcut.storage.flush(lambda result: client.finished(request, result, 0))
    else:
        client.spawn(slow.execute(client, request), 0)
    return pos


def failed(client: NbdClient, request: wire.Request, error: OSError) -> bytes:
    """The reply to a request that the storage failed."""
    return slow.error_reply(client, request, error)


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
        with_whole_payload(client, payload)
    return pos + payload.have


def with_whole_payload(client: NbdClient, payload: Payload) -> None:
    """Execute a request all of whose payload has come."""
    request, buffer = payload.request, payload.buffer
    if buffer is None:
        return
    if request.type == Cmd.WRITE:
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


def _write(client: NbdClient, request: wire.Request, buffer: Buffer) -> None:
    length = request.length
    shortcut = client.shortcut()
    if shortcut is None or request.offset + length > shortcut.write_end:
        client.spawn(slow.write(client, request, buffer), length)
        return
    storage = shortcut.storage
    place = request.offset + shortcut.offset
    fua = bool(request.flags & CmdFlag.FUA) or client.root.writethrough
    now = time.monotonic()
    if not fua and not storage.direct and now >= storage.inline_writes_from:
        _write_inline(client, storage, request, buffer, place)
        if time.monotonic() - now > STALL_SECONDS:
            storage.inline_writes_from = now + STALL_PENALTY_SECONDS
        return
    if storage.alignment > 1 and ((place | length) % storage.alignment or not storage.write_shortcut):
        client.spawn(slow.write(client, request, buffer), length)
        return
    client.begin(length)

    def written(result: int) -> None:
        buffer.release()
        client.finished(request, result, length)

    storage.fast_write(buffer, length, place, fua, written)


def _write_inline(client: NbdClient, storage: Storage, request: wire.Request, buffer: Buffer, place: int) -> None:
    done = 0
    storage.dirty += 1
    try:
        while done < request.length:
            done += os.pwritev(storage.fd, (buffer.view[done : request.length],), place + done)
    except OSError as error:
        reply = failed(client, request, error)
    else:
        reply = wire.success_reply(client.mode, request)
    finally:
        buffer.release()
    client.outbox.send(memoryview(reply))


# --- Reads ----------------------------------------------------------------------------------------------------


def _read(client: NbdClient, request: wire.Request) -> None:
    """A read that is large, cold, unaligned, flagged or outside of the shortcut."""
    shortcut = client.shortcut()
    length = request.length
    if shortcut is None or not length or request.flags & CmdFlag.FUA or request.offset + length > shortcut.end:
        client.spawn(slow.execute(client, request), length)
        return
    storage = shortcut.storage
    place = request.offset + shortcut.offset
    if storage.direct and (place | length) % storage.alignment:
        client.spawn(slow.execute(client, request), length)
        return
    if not storage.direct and length >= SENDFILE_FROM and _send_cached(client, storage, request, place):
        return
    buffer = client.services.buffers.acquire(length)
    client.begin(length)

    def have_read(result: int) -> None:
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

    storage.read(buffer, 0, length, place, have_read)


def _send_cached(client: NbdClient, storage: Storage, request: wire.Request, place: int) -> bool:
    """Send a large read from the page cache, its holes as holes; False when it is not all there."""
    length = request.length
    if place + length > storage.refresh_size():  # sendfile ends where the file does: an odd tail, or it was cut off
        return False
    pieces = [(length, True)]
    sparse = client.mode != Mode.SIMPLE and not request.flags & CmdFlag.DF
    if sparse and storage.seek_inline and not storage.known_data(place, length):
        pieces = storage.allocation(place, length, MAX_READ_PIECES)
        if sum(piece for piece, _ in pieces) < length:
            return False  # too fragmented to be worth it: one chunk of data is
    if not storage.in_memory:
        at = place
        for piece, is_data in pieces:
            if is_data and not client.services.cache.resident(storage.fd, at, piece):
                return False
            at += piece
    window = storage.window()
    if window is not None and place + length <= window.size:
        window.touch(place >> REGION_BITS, client.services.cache)
        window.touch(place + length - 1 >> REGION_BITS, client.services.cache)
    offset = request.offset
    for piece, is_data in pieces:
        done = offset + piece == request.offset + length
        if is_data:
            header = wire.data_header(client.mode, request, offset, piece, done=done)
            client.outbox.send(memoryview(header), more=True)
            client.outbox.send_file(storage.fd, place + offset - request.offset, piece)
        else:
            chunk = wire.hole_chunk(client.mode, request, offset, piece, done=done)
            client.outbox.send(memoryview(chunk), more=not done)
        offset += piece
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
    sparse = client.mode != Mode.SIMPLE and not request.flags & CmdFlag.DF
    if sparse and not payload[0] and payload == ZEROES[:length]:
        client.queue(wire.hole_chunk(client.mode, request, request.offset, length, done=True))
    else:
        client.queue(wire.data_header(client.mode, request, request.offset, length, done=True) + payload)
