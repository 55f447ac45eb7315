"""`nbd`: a disk that is another server's export.

When the connection ends, the next request makes another one. What was in flight is sent again: every NBD request may
be repeated until it is answered. How long requests wait for that is `reconnect-delay`; after it they fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
import time
from typing import Annotated, ClassVar, Literal

from blkferry.drivers.nbd.connection import Connection, ConnectionLost
from blkferry.drivers.nbd.dial import Target, dial, shown
from blkferry.drivers.nbd.haggling import Session
from blkferry.errors import Error, ErrorKind
from blkferry.extent import MAX_EXTENTS, Content, Effort, Extent
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.plane.services import Services
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.qapi import Doc, Uint32, branch
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix
from blkferry.units import GIB, align_down, align_up
from blkferry.wire.nbd.constants import MAX_STRING, Cmd, CmdFlag, StatusFlag, TransmissionFlag
from blkferry.wire.nbd.uri import tcp_uri, unix_uri

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.1  # seconds between two attempts to connect; doubled up to the last
_LAST_PAUSE = 4.0


@branch
class BlockdevOptionsNbd(BlockdevOptions):
    """A disk that another NBD server exports."""

    driver: Literal["nbd"] = "nbd"
    server: Annotated[SocketAddress, Doc("where the server listens", since="2.9")]
    export: Annotated[str, Doc("name of the export", since="2.9")] = ""
    tls_creds: Annotated[str | None, Doc("the TLS credentials to connect with (default: no TLS)", since="2.9")] = None
    tls_hostname: Annotated[
        str | None, Doc("the name that the server's certificate must have (default: the host)", since="7.0")
    ] = None
    reconnect_delay: Annotated[
        Uint32, Doc("seconds that requests wait for a lost connection before they fail", since="4.2")
    ] = 0
    open_timeout: Annotated[Uint32, Doc("seconds to go on trying when the first connection fails", since="7.0")] = 0


class Nbd(Node):
    """A node over one connection, which may be replaced."""

    driver: ClassVar[str] = "nbd"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsNbd
    options: BlockdevOptionsNbd

    _connection: Connection | None = None
    _reconnecting: asyncio.Task[Connection] | None = None

    async def open(self, opening: Opening) -> None:
        if len(self.options.export.encode()) > MAX_STRING:
            raise Error(ErrorKind.INVALID_ARGUMENT, "export name too long to send to server")
        self._target = self._aim(opening.graph)
        session = await self._first()
        self._flags = session.flags
        self._minimum, self._maximum = session.minimum, session.maximum
        self.length = session.size
        self.alignment = self.remap_alignment = session.minimum
        self._writes = asyncio.Lock()
        self._changes = 0
        self._answers: dict[int, list[Extent]] = {}
        self._connection = Connection(session, self.services)
        if self._flags & TransmissionFlag.READ_ONLY and not self.read_only:
            if not opening.auto_read_only:
                raise Error(ErrorKind.DENIED, "request on write denied without write permission")
            self.read_only = True

    def _aim(self, graph: Graph) -> Target:
        options = self.options
        credentials, hostname = options.tls_creds, options.tls_hostname
        if credentials is None:
            if hostname is not None:
                raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'tls-hostname' requires 'tls-creds'")
            return Target(options.server, options.export)
        if hostname is None and isinstance(options.server, SocketAddressInet):
            hostname = options.server.host
        named = hostname is not None
        latest = graph.client_tls(credentials, named=named)

        def context() -> ssl.SSLContext:
            """What the credentials make now; those that have been removed stay in use until there are others."""
            nonlocal latest
            with contextlib.suppress(Error):
                latest = graph.client_tls(credentials, named=named)
            return latest

        return Target(options.server, options.export, context, hostname)

    async def _first(self) -> Session:
        deadline = time.monotonic() + self.options.open_timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return await dial(self._target)
            except Error:
                if time.monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    # Where bytes are --------------------------------------------------------------------------------------------

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        if effort is Effort.PLACE:
            return [Extent(start, length, Content.OPAQUE, start)]
        answer = self._answers.pop(start, None)
        if answer is None:
            return None
        cut: list[Extent] = []
        for extent in answer:
            left = start + length - extent.start
            if left <= 0:
                break
            cut.append(extent._replace(length=min(extent.length, left)))
        return cut

    async def load(self, start: int, length: int) -> None:
        """Ask the server. What it says is kept for the lookup that follows within this turn of the loop."""
        changes = self._changes
        answer = [Extent(start, length, Content.OPAQUE, start)]
        if self._connected_session().context is not None:
            first = align_down(start, self._minimum)
            most = min(align_up(start + length, self._minimum), self.length, first + GIB) - first
            extents = await self._call(Cmd.BLOCK_STATUS, first, most)
            if changes == self._changes and extents:  # else it may be of before a write: data is always right
                answer = _translate(extents, first, start, start + length)
        self._answers[start] = answer
        self.services.loop.call_soon(self._answers.pop, start, None)

    def _connected_session(self) -> Session:
        assert self._connection is not None
        return self._connection.session

    # Bytes ------------------------------------------------------------------------------------------------------

    async def read(self, start: int, view: memoryview) -> None:
        end = start + len(view)
        first, last = align_down(start, self._minimum), min(align_up(end, self._minimum), self.length)
        if (first, last) != (start, end):
            whole = memoryview(bytearray(last - first))
            await self._read(first, whole)
            view[:] = whole[start - first : end - first]
        else:
            await self._read(start, view)

    async def _read(self, start: int, view: memoryview) -> None:
        for at in range(0, len(view), self._maximum):
            part = view[at : at + self._maximum]
            await self._call(Cmd.READ, start + at, len(part), view=part)

    async def write(self, start: int, view: memoryview) -> None:
        if self._minimum == 1:
            await self._write(start, view)
            return
        end = start + len(view)
        first, last = align_down(start, self._minimum), min(align_up(end, self._minimum), self.length)
        async with self._writes:  # no write may come between the reading of an edge and its writing
            if (first, last) != (start, end):
                whole = memoryview(bytearray(last - first))
                await self._read(first, whole)
                whole[start - first : end - first] = view
                start, view = first, whole
            await self._write(start, view)

    async def _write(self, start: int, view: memoryview) -> None:
        for at in range(0, len(view), self._maximum):
            part = view[at : at + self._maximum]
            await self._change(Cmd.WRITE, start + at, len(part), view=part)

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        wanted = TransmissionFlag.SEND_WRITE_ZEROES | (TransmissionFlag.SEND_FAST_ZERO if fast else 0)
        if self._flags & wanted != wanted:
            raise OSError(errno.ENOTSUP, "the NBD server cannot do that")
        flags = (0 if unmap and self.unmaps else CmdFlag.NO_HOLE) | (CmdFlag.FAST_ZERO if fast else 0)
        async with self._writes:
            for at in range(start, start + length, GIB):
                await self._change(Cmd.WRITE_ZEROES, at, min(GIB, start + length - at), flags=flags)

    async def discard(self, start: int, length: int) -> None:
        if self.unmaps and self._flags & TransmissionFlag.SEND_TRIM:
            async with self._writes:
                for at in range(start, start + length, GIB):
                    await self._change(Cmd.TRIM, at, min(GIB, start + length - at))

    async def prefetch(self, start: int, length: int) -> None:
        if self._flags & TransmissionFlag.SEND_CACHE:
            first = align_down(start, self._minimum)
            end = min(align_up(start + length, self._minimum), self.length)
            for at in range(first, end, self._maximum):
                await self._call(Cmd.CACHE, at, min(self._maximum, end - at))

    async def flush(self) -> None:
        if self._flags & TransmissionFlag.SEND_FLUSH:
            await self._call(Cmd.FLUSH, 0, 0)

    async def _change(
        self, command: Cmd, start: int, length: int, *, flags: int = 0, view: memoryview | None = None
    ) -> None:
        self._changes += 1
        self._answers.clear()
        try:
            await self._call(command, start, length, flags=flags, view=view)
        finally:
            self._changes += 1
            self._answers.clear()

    # The connection ---------------------------------------------------------------------------------------------

    async def _call(
        self, command: Cmd, start: int, length: int, *, flags: int = 0, view: memoryview | None = None
    ) -> tuple[tuple[int, int], ...]:
        deadline = None
        while True:
            connection = self._connection
            if connection is None or connection.lost:
                connection = await self._reconnected()
            try:
                return await connection.call(command, start, length, flags=flags, view=view)
            except ConnectionLost:
                if deadline is None:
                    deadline = time.monotonic() + self.options.reconnect_delay
                else:
                    await asyncio.sleep(_FIRST_PAUSE)  # it was lost again: a server that hangs up on every request
                if time.monotonic() >= deadline:
                    raise OSError(errno.EIO, "the connection to the NBD server has ended") from None

    async def _reconnected(self) -> Connection:
        """Wait for another connection, together with all others who do."""
        if self._reconnecting is None:
            self._reconnecting = self.services.loop.create_task(self._reconnect())
            self._reconnecting.add_done_callback(self._reconnect_ended)
        try:
            return await asyncio.shield(self._reconnecting)
        except (Error, TimeoutError) as error:
            raise OSError(errno.EIO, f"the connection to the NBD server has ended: {error}") from error

    def _reconnect_ended(self, task: asyncio.Task[Connection]) -> None:
        self._reconnecting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("Cannot reach the NBD server of %s: %s", self.describe(), error)

    async def _reconnect(self) -> Connection:
        deadline = time.monotonic() + self.options.reconnect_delay
        pause = _FIRST_PAUSE
        while True:
            try:
                session = await dial(self._target)
                self._accept(session)
            except Error:
                if time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
            else:
                self._connection = Connection(session, self.services)
                return self._connection

    def _accept(self, session: Session) -> None:
        """See whether the server still exports the same disk. Raises Error."""
        missing = self._flags & ~session.flags or (
            session.context is None and self._connected_session().context is not None
        )
        writable = self.read_only or not session.flags & TransmissionFlag.READ_ONLY
        same = session.size == self.length and session.minimum <= self._minimum and session.maximum >= self._maximum
        if missing or not writable or not same:
            session.sock.close()
            raise Error(ErrorKind.IO, f"'{self.filename()}' is not the export any more that it was")

    # Life -------------------------------------------------------------------------------------------------------

    def filename(self) -> str:
        match self.options.server:
            case SocketAddressInet(host=host, port=port) if port.isdecimal():
                return tcp_uri(host, int(port), self.options.export)
            case SocketAddressUnix(path=path):
                return unix_uri(path, self.options.export)
        return f"nbd:{shown(self.options.server)}"

    async def pause(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._connection is not None and not self._connection.lost:
            self._connection.detach()

    def move(self, services: Services) -> None:
        super().move(services)
        self._writes = asyncio.Lock()
        if self._connection is not None:
            self._connection.services = services

    async def close(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._connection is not None:
            self._connection.leave()


def _translate(extents: tuple[tuple[int, int], ...], at: int, start: int, end: int) -> list[Extent]:
    """The extents of a BLOCK_STATUS that began at `at`, as far as they lie between `start` and `end`."""
    answer: list[Extent] = []
    for length, flags in extents[:MAX_EXTENTS]:
        first, last = max(at, start), min(at + length, end)
        at += length
        if first < last:
            content = Content.ZERO if flags & StatusFlag.ZERO else Content.OPAQUE
            answer.append(Extent(first, last - first, content, first, allocated=not flags & StatusFlag.HOLE))
    return answer or [Extent(start, end - start, Content.OPAQUE, start)]
