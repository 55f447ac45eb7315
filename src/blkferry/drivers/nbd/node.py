"""`nbd`: a disk that is another server's export.

When a connection ends, the next request makes another one. What was in flight is sent again: every NBD request may be
repeated until it is answered. How long requests wait for that is `reconnect-delay`; after it they fail.

Several connections are one disk only where the server promises so (CAN_MULTI_CONN): then a request may go to any of
them, and a flush on one covers what was answered on all. What is lost with one of them goes to those that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ssl
from typing import Annotated, ClassVar, Literal

from blkferry.drivers.nbd.dial import Target, dial, shown
from blkferry.drivers.nbd.haggling import Session
from blkferry.drivers.nbd.line import persist
from blkferry.drivers.nbd.lines import Lines
from blkferry.errors import Error, ErrorKind
from blkferry.extent import MAX_EXTENTS, Content, Effort, Extent
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.graph.root import Root
from blkferry.plane.drain import InFlight
from blkferry.plane.engine import Done
from blkferry.plane.services import Services
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.qapi import EXTENSION, Doc, Uint8, Uint32, branch
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix
from blkferry.units import GIB, align_down, align_up
from blkferry.wire.nbd.constants import MAX_STRING, Cmd, CmdFlag, StatusFlag, TransmissionFlag
from blkferry.wire.nbd.uri import tcp_uri, unix_uri

ALLOCATION_DEPTH = "qemu:allocation-depth"
_DEEP = (
    2  # what is below the uppermost layer, however deep, reads as zeroes in terms of base:allocation: as QEMU has it
)

_READ, _WRITE, _FLUSH = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.FLUSH)  # to pack an IntEnum takes longer
MAX_CONNECTIONS = 16
"""As many as a server may be asked to serve one disk by, like others do."""


@branch
class BlockdevOptionsNbd(BlockdevOptions):
    """A disk that another NBD server exports."""

    driver: Literal["nbd"] = "nbd"
    server: Annotated[SocketAddress, Doc("where the server listens", since="2.9")]
    export: Annotated[str | None, Doc("name of the export (default: the empty one)", since="2.9")] = None
    tls_creds: Annotated[str | None, Doc("the TLS credentials to connect with (default: no TLS)", since="2.9")] = None
    tls_hostname: Annotated[
        str | None, Doc("the name that the server's certificate must have (default: the host)", since="7.0")
    ] = None
    x_dirty_bitmap: Annotated[
        str | None,
        Doc(
            "the metadata context to ask for block status instead of base:allocation, like qemu:dirty-bitmap:NAME: "
            "what is dirty is told as not allocated",
            since="3.0",
        ),
    ] = None
    reconnect_delay: Annotated[
        Uint32, Doc("seconds that requests wait for a lost connection before they fail", since="4.2")
    ] = 0
    open_timeout: Annotated[Uint32, Doc("seconds to go on trying when the first connection fails", since="7.0")] = 0
    connections: Annotated[
        Uint8,
        Doc("connections to spread requests over, 1 to 16, if the server allows several", features=(EXTENSION,)),
    ] = 1


class Nbd(Node):
    """A node over one or several connections, which may be replaced."""

    driver: ClassVar[str] = "nbd"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsNbd
    options: BlockdevOptionsNbd

    async def open(self, opening: Opening) -> None:
        self._lines = Lines(self.services, self._dial_again, self.options.reconnect_delay)
        if len((self.options.export or "").encode()) > MAX_STRING:
            raise Error(ErrorKind.INVALID_ARGUMENT, "export name too long to send to server")
        if len((self.options.x_dirty_bitmap or "").encode()) > MAX_STRING:
            raise Error(ErrorKind.INVALID_ARGUMENT, "x-dirty-bitmap query too long to send to server")
        if not 1 <= self.options.connections <= MAX_CONNECTIONS:
            text = f"Parameter 'connections' expects a number between 1 and {MAX_CONNECTIONS}"
            raise Error(ErrorKind.INVALID_ARGUMENT, text)
        self._target = self._aim(opening.graph)
        session = await persist(lambda: dial(self._target), self.options.open_timeout)
        self._flags = session.flags
        self._minimum, self._maximum = session.minimum, session.maximum
        self.length = session.size
        self.alignment = self.remap_alignment = session.minimum
        self._edges = asyncio.Lock()  # held by who reads an edge and writes it back: no change may come between
        self._writes = InFlight()  # of whole blocks, by callbacks
        self._changes = 0
        self._answers: dict[int, list[Extent]] = {}
        self._has_context = session.context is not None
        self._lines.add(session)
        if self._flags & TransmissionFlag.READ_ONLY and not self.read_only:
            if not opening.auto_read_only:
                raise Error(ErrorKind.DENIED, "request on write denied without write permission")
            self.read_only = True
        if self._flags & TransmissionFlag.CAN_MULTI_CONN:
            for _ in range(1, self.options.connections):
                self._lines.add(await self._dial_again())

    def _aim(self, graph: Graph) -> Target:
        options = self.options
        credentials, hostname = options.tls_creds, options.tls_hostname
        if credentials is None:
            if hostname is not None:
                raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'tls-hostname' requires 'tls-creds'")
            return Target(options.server, options.export or "", options.x_dirty_bitmap)
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

        return Target(options.server, options.export or "", options.x_dirty_bitmap, context, hostname)

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
        if self._has_context:
            first = align_down(start, self._minimum)
            most = min(align_up(start + length, self._minimum), self.length, first + GIB) - first
            extents = await self._lines.call(Cmd.BLOCK_STATUS, first, most)
            if changes == self._changes and extents:  # else it may be of before a write: data is always right
                if self.options.x_dirty_bitmap == ALLOCATION_DEPTH:
                    extents = tuple((each, min(depth, _DEEP)) for each, depth in extents)
                answer = _translate(extents, first, start, start + length)
        self._answers[start] = answer
        self.services.loop.call_soon(self._answers.pop, start, None)

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
            await self._lines.call(Cmd.READ, start + at, len(part), view=part)

    def read_later(self, start: int, view: memoryview, done: Done) -> bool:
        length = len(view)
        return (
            length <= self._maximum
            and not (self._minimum > 1 and (start | length) & (self._minimum - 1))
            and self._lines.begin(_READ, start, length, view, done)
        )

    async def write(self, start: int, view: memoryview) -> None:
        if self._minimum == 1:
            await self._write(start, view)
            return
        end = start + len(view)
        first, last = align_down(start, self._minimum), min(align_up(end, self._minimum), self.length)
        async with self._edges:
            await self._writes.idle()
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

    def write_later(self, start: int, view: memoryview, done: Done) -> bool:
        if len(view) > self._maximum:
            return False
        if self._minimum > 1 and ((start | len(view)) & (self._minimum - 1) or self._edges.locked()):
            return False

        def written(result: int) -> None:
            self._changed()
            self._writes.end()
            done(result)

        if not self._lines.begin(_WRITE, start, len(view), view, written):
            return False
        self._changed()
        self._writes.begin()
        return True

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        wanted = TransmissionFlag.SEND_WRITE_ZEROES | (TransmissionFlag.SEND_FAST_ZERO if fast else 0)
        if self._flags & wanted != wanted:
            raise OSError(errno.ENOTSUP, "the NBD server cannot do that")
        flags = (0 if unmap and self.unmaps else CmdFlag.NO_HOLE) | (CmdFlag.FAST_ZERO if fast else 0)
        async with self._whole_blocks():
            for at in range(start, start + length, GIB):
                await self._change(Cmd.WRITE_ZEROES, at, min(GIB, start + length - at), flags=flags)

    async def discard(self, start: int, length: int) -> None:
        if self.unmaps and self._flags & TransmissionFlag.SEND_TRIM:
            async with self._whole_blocks():
                for at in range(start, start + length, GIB):
                    await self._change(Cmd.TRIM, at, min(GIB, start + length - at))

    async def prefetch(self, start: int, length: int) -> None:
        if self._flags & TransmissionFlag.SEND_CACHE:
            first = align_down(start, self._minimum)
            end = min(align_up(start + length, self._minimum), self.length)
            for at in range(first, end, self._maximum):
                await self._lines.call(Cmd.CACHE, at, min(self._maximum, end - at))

    async def flush(self) -> None:
        if self._flags & TransmissionFlag.SEND_FLUSH:
            await self._lines.call(Cmd.FLUSH, 0, 0)

    def flush_later(self, done: Done) -> bool:
        return bool(self._flags & TransmissionFlag.SEND_FLUSH) and self._lines.begin(_FLUSH, 0, 0, None, done)

    def _whole_blocks(self) -> contextlib.AbstractAsyncContextManager[None]:
        """For a change of whole blocks: it comes between nobody's reading and writing of an edge."""
        return self._edges if self._minimum > 1 else contextlib.nullcontext()

    async def _change(
        self, command: Cmd, start: int, length: int, *, flags: int = 0, view: memoryview | None = None
    ) -> None:
        self._changed()
        try:
            await self._lines.call(command, start, length, flags=flags, view=view)
        finally:
            self._changed()

    def _changed(self) -> None:
        self._changes += 1
        self._answers.clear()

    # Connections ------------------------------------------------------------------------------------------------

    async def _dial_again(self) -> Session:
        """Another connection to the same disk. Raises Error."""
        session = await dial(self._target)
        missing = self._flags & ~session.flags or (self._has_context and session.context is None)
        writable = self.read_only or not session.flags & TransmissionFlag.READ_ONLY
        same = session.size == self.length and session.minimum <= self._minimum and session.maximum >= self._maximum
        if missing or not writable or not same:
            session.sock.close()
            raise Error(ErrorKind.IO, f"'{self.filename()}' is not the export any more that it was")
        return session

    # Life -------------------------------------------------------------------------------------------------------

    def filename(self) -> str:
        """A URI, which does not tell of TLS. QEMU's is the same but for what has to be escaped."""
        match self.options.server:
            case SocketAddressInet(host=host, port=port) if port.isdecimal():
                return tcp_uri(host, int(port), self.options.export, full=True)
            case SocketAddressUnix(path=path):
                return unix_uri(path, self.options.export)
        return f"nbd:{shown(self.options.server)}"

    def cancel_in_flight(self, user: Root | None = None) -> None:
        self._lines.give_up(user)

    async def pause(self) -> None:
        self._lines.pause()

    def move(self, services: Services) -> None:
        super().move(services)
        self._edges = asyncio.Lock()
        self._lines.move(services)

    async def close(self) -> None:
        self._lines.leave()


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
