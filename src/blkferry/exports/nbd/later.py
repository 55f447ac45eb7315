"""Requests that one driver begins within the turn and answers later, by a callback: no task, no future.

That is what another server's disk is made of (`Node.read_later` and the like). Each function tells whether the request
was begun; where it was not, it takes a task (`slow`). Requests have been checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.exports.nbd.limits import MAX_PLAIN_READ
from blkferry.wire.nbd import codec
from blkferry.wire.nbd.constants import CmdFlag, Mode

if TYPE_CHECKING:
    from blkferry.exports.nbd.client import NbdClient
    from blkferry.plane.buffers import Buffer
    from blkferry.wire.nbd.transmission import Request

_DF, _FUA = int(CmdFlag.DF), int(CmdFlag.FUA)


def read_plain(client: NbdClient, head: int, cookie: bytes, offset: int, length: int) -> bool:
    """Begin a read that is sent as one piece."""
    reply = memoryview(codec.data_reply(client.mode, cookie, offset, length))

    def have_read(result: int) -> None:
        if result < 0:
            client.finished(codec.request(head, cookie, offset, length), result, length)
            return
        client.queue(reply)
        client.finished(None, 0, length)

    if not client.root.read_later(offset, reply[-length:], have_read):
        return False
    client.begin(length)
    return True


def read(client: NbdClient, request: Request) -> bool:
    """Begin a read, unless more is to be told than its bytes."""
    length, mode = request.length, client.mode
    if not length or request.flags & _FUA:
        return False
    if length > MAX_PLAIN_READ and mode is not Mode.SIMPLE and not request.flags & _DF:
        return False  # it would be told of holes
    return read_plain(client, codec.head(mode, request), request.cookie.to_bytes(8, "big"), request.offset, length)


def write_plain(client: NbdClient, head: int, cookie: bytes, offset: int, payload: memoryview) -> bool:
    """Begin a write without flags of what lies in the scratch memory of the turn."""
    length = len(payload)
    buffer = client.services.buffers.acquire(length)
    buffer.view[:length] = payload
    if _write(client, head, cookie, offset, length, buffer):
        return True
    buffer.release()
    return False


def write(client: NbdClient, request: Request, buffer: Buffer) -> bool:
    """Begin a write without FUA; `buffer` holds its bytes, and is released at its end."""
    head = codec.head(client.mode, request)
    return _write(client, head, request.cookie.to_bytes(8, "big"), request.offset, request.length, buffer)


def _write(client: NbdClient, head: int, cookie: bytes, offset: int, length: int, buffer: Buffer) -> bool:
    def written(result: int) -> None:
        buffer.release()
        if result < 0:
            client.finished(codec.request(head, cookie, offset, length), result, length)
            return
        client.queue(codec.write_reply(client.mode, cookie, offset))
        client.finished(None, 0, length)

    if not client.root.write_later(offset, buffer.view[:length], written):
        return False
    client.begin(length)
    return True


def flush(client: NbdClient, request: Request) -> bool:
    """Begin a flush."""
    if not client.root.flush_later(lambda result: client.finished(request, result, 0)):
        return False
    client.begin(0)
    return True
