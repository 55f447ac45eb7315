"""The NBD requests that take more than one step, as coroutines that return the whole reply.

They run on the loop of the exported node, as tasks: what matters here is being right.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from blkferry.errors import Error
from blkferry.exports.nbd.limits import MAX_PLAIN_READ, MAX_READ_PIECES, MAX_STATUS_EXTENTS
from blkferry.plane.buffers import Buffer
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Mode

if TYPE_CHECKING:
    from blkferry.exports.nbd.client import NbdClient

log = logging.getLogger(__name__)

_DOING = {
    Cmd.READ: "reading from file failed",
    Cmd.WRITE: "writing to file failed",
    Cmd.FLUSH: "flush failed",
    Cmd.TRIM: "discard failed",
    Cmd.CACHE: "caching data failed",
    Cmd.WRITE_ZEROES: "writing to file failed",
    Cmd.BLOCK_STATUS: "can't get block status",
}


def error_reply(client: NbdClient, request: wire.Request, error: OSError) -> bytes:
    """The reply for a request that the storage failed, and a line in the log."""
    doing = _DOING.get(Cmd(request.type), "request failed")
    client.complain(f"{doing} at offset {request.offset}, {request.length} bytes: {error.strerror}")
    code = error.errno or errno.EIO
    return wire.error_reply(client.mode, request, wire.wire_errno(code), f"{doing}: {error.strerror}")


async def execute(client: NbdClient, request: wire.Request, ids: tuple[int, ...] | None = None) -> bytes:
    """Execute any request but WRITE; it has been checked."""
    match request.type:
        case Cmd.READ:
            return await _read(client, request)
        case Cmd.BLOCK_STATUS:
            return await _answered(client, request, _block_status(client, request, ids))
        case _:
            return await _answered(client, request, _change(client, request))


async def write(client: NbdClient, request: wire.Request, buffer: Buffer) -> bytes:
    """Execute a WRITE whose payload is in `buffer`, and release that."""
    fua = bool(request.flags & CmdFlag.FUA)

    async def work() -> bytes:
        await client.root.write(request.offset, buffer.view[: request.length], fua=fua)
        return wire.success_reply(client.mode, request)

    try:
        return await _answered(client, request, work())
    finally:
        buffer.release()


async def _answered(client: NbdClient, request: wire.Request, work: Awaitable[bytes]) -> bytes:
    try:
        return await work
    except OSError as error:
        return error_reply(client, request, error)
    except Error as error:
        client.complain(error.message)
        return wire.error_reply(client.mode, request, wire.ERRNO_OF_KIND[error.kind], error.message)
    except Exception:  # our own bug must fail this request, not the connection of whoever sent it
        log.exception("%s: export '%s': request failed: %r", client.peer, client.export.name, request)
        return wire.error_reply(client.mode, request, wire.wire_errno(errno.EIO), "internal error")


async def _change(client: NbdClient, request: wire.Request) -> bytes:
    root = client.root
    fua = bool(request.flags & CmdFlag.FUA)
    match request.type:
        case Cmd.FLUSH:
            await root.flush()
        case Cmd.WRITE:  # only of length 0: others have a payload
            if fua:
                await root.flush()
        case Cmd.TRIM:
            await root.discard(request.offset, request.length, fua=fua)
        case Cmd.CACHE:
            await root.prefetch(request.offset, request.length)
        case Cmd.WRITE_ZEROES:
            if request.length:
                await root.write_zeroes(
                    request.offset,
                    request.length,
                    unmap=not request.flags & CmdFlag.NO_HOLE,
                    fast=bool(request.flags & CmdFlag.FAST_ZERO),
                    fua=fua,
                )
            elif fua:
                await root.flush()
    return wire.success_reply(client.mode, request)


async def _read(client: NbdClient, request: wire.Request) -> bytes:
    async def work() -> bytes:
        if request.flags & CmdFlag.FUA:
            await client.root.flush()
        if not request.length:
            return wire.success_reply(client.mode, request)
        if client.mode is Mode.SIMPLE or request.flags & CmdFlag.DF or request.length <= MAX_PLAIN_READ:
            return await _data(client, request, request.offset, request.length, done=True)
        return await _sparse(client, request)

    return await _answered(client, request, work())


async def _sparse(client: NbdClient, request: wire.Request) -> bytes:
    """Data and holes as separate chunks."""
    stretches: list[tuple[int, bool]] = []
    offset, end = request.offset, request.offset + request.length
    while offset < end and len(stretches) <= MAX_READ_PIECES:
        for stretch in await client.root.status(offset, end - offset):
            if stretches and stretches[-1][1] == stretch.zero:
                stretches[-1] = (stretches[-1][0] + stretch.length, stretch.zero)
            else:
                stretches.append((stretch.length, stretch.zero))
            offset += stretch.length
    if len(stretches) > MAX_READ_PIECES:
        return await _data(client, request, request.offset, request.length, done=True)
    parts: list[bytes] = []
    offset = request.offset
    for number, (length, zero) in enumerate(stretches, 1):
        last = number == len(stretches)
        if zero:
            parts.append(wire.hole_chunk(client.mode, request, offset, length, done=last))
        else:
            parts.append(await _data(client, request, offset, length, done=last))
        offset += length
    return b"".join(parts)


async def _data(client: NbdClient, request: wire.Request, offset: int, length: int, *, done: bool) -> bytes:
    data = bytearray(length)
    await client.root.read(offset, memoryview(data))
    return wire.data_header(client.mode, request, offset, length, done=done) + data


async def _block_status(client: NbdClient, request: wire.Request, ids: tuple[int, ...] | None) -> bytes:
    """One chunk for each selected context, in the order of their ids. What they say is bounded for all of them."""
    wanted = [number for number, _ in client.contexts if ids is None or number in ids]
    limit = 1 if request.flags & CmdFlag.REQ_ONE else max(1, MAX_STATUS_EXTENTS // len(wanted))
    contexts = client.export.contexts
    parts: list[bytes] = []
    for number in wanted:
        if parts:
            await asyncio.sleep(0)  # others of this loop come first: there may be a great many contexts
        extents = await contexts.extents(number, request.offset, request.length, limit)
        parts.append(wire.status_chunk(client.mode, request, number, extents, done=number == wanted[-1]))
    return b"".join(parts)
