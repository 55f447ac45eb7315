"""The `nbd` export type: one node under one name of the NBD server."""

from __future__ import annotations

import socket
from typing import ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.exports.base import Export, Host
from blkferry.exports.nbd.bitmaps import acquire_bitmaps, release_bitmaps
from blkferry.exports.nbd.client import NbdClient
from blkferry.exports.nbd.contexts import Contexts
from blkferry.exports.nbd.server import NbdServer
from blkferry.exports.places import Places
from blkferry.graph.bitmaps import DirtyBitmap
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.plane.tls import TlsSocket
from blkferry.schema.export import BlockExportClient, BlockExportOptions, BlockExportOptionsNbd
from blkferry.units import SECTOR, align_down
from blkferry.wire.nbd.constants import MAX_REQUEST, MAX_STRING, TransmissionFlag
from blkferry.wire.nbd.handshake import ExportInfo, Negotiated

PREFERRED_BLOCK = 4096

_ALWAYS = (
    TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_CACHE
)
_WRITABLE = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


class NbdExport(Export):
    """An export of the NBD server; its clients live on the node's loop, everything else on the main loop."""

    kind: ClassVar[str] = "nbd"
    options_type: ClassVar[type[BlockExportOptions]] = BlockExportOptionsNbd
    options: BlockExportOptionsNbd

    def __init__(self, host: Host, options: BlockExportOptions, root: Root) -> None:
        super().__init__(host, options, root)
        assert isinstance(options, BlockExportOptionsNbd)
        self.name = options.name if options.name is not None else options.node_name
        self.description = options.description or ""
        self.clients: set[NbdClient] = set()
        self.size = 0
        self.places = Places(root, writable=options.writable)
        self._bitmaps: list[DirtyBitmap] = []
        self._paused = False

    @classmethod
    def permissions(cls, options: BlockExportOptions) -> tuple[Permission, Permission]:
        used, _ = super().permissions(options)
        return used, ALL & ~Permission.RESIZE  # clients cannot be told of a new size

    async def start(self) -> None:
        assert isinstance(self.options, BlockExportOptionsNbd)
        server = self.host.service("nbd-server", self.options.server)
        assert isinstance(server, NbdServer)
        for what, text in (("export name", self.name), ("description", self.description)):
            if len(text.encode()) > MAX_STRING:
                raise Error(
                    ErrorKind.INVALID_ARGUMENT, f"{what} '{text}' too long", hint=f"At most {MAX_STRING} bytes."
                )
        self.server = server
        server.add(self)  # what it objects to comes before what is wrong with bitmaps
        options = self.options
        self._bitmaps = acquire_bitmaps(
            self.host.graph, self.root.node, options.bitmaps or (), self.root.describe(), writable=options.writable
        )
        self.contexts = Contexts(self.root, self._bitmaps, allocation_depth=options.allocation_depth)
        self.size = self.places.size = align_down(self.root.node.length, SECTOR)
        flags = _ALWAYS | (_WRITABLE if self.options.writable else TransmissionFlag.READ_ONLY)
        if server.max_connections != 1:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        minimum = self.root.node.alignment
        self.info = ExportInfo(
            name=self.name,
            description=self.description,
            size=self.size,
            flags=flags,
            minimum=minimum,
            preferred=max(PREFERRED_BLOCK, minimum),
            maximum=MAX_REQUEST,
            contexts=self.contexts.offered,
        )

    @property
    def in_use(self) -> Error | None:
        if not self.clients:
            return None
        peers = ", ".join(sorted(client.peer for client in self.clients))
        return Error(
            ErrorKind.BUSY,
            f"export '{self.options.id}' still in use",
            hint=f"Use mode='hard' to force client disconnect. Connected: {peers}.",
        )

    def retired(self, start: int, end: int | None) -> None:
        """The node says that earlier lookups are void."""
        self.places.retired(start, end)

    def admit(
        self, sock: socket.socket | TlsSocket, negotiated: Negotiated, leftover: bytes, peer: str, identity: str
    ) -> None:
        """Serve a client that finished its handshake. Called on the main loop, which counts the client from now on."""
        client = NbdClient(self, sock, negotiated, leftover, peer, self._client_closed, identity)
        self.clients.add(client)
        if not self._paused:
            self.root.services.loop.call_soon_threadsafe(client.resume)

    def _client_closed(self, client: NbdClient) -> None:
        self.server.loop.call_soon_threadsafe(self._forget, client)

    def _forget(self, client: NbdClient) -> None:
        self.clients.discard(client)
        self.server.connection_closed()

    def connected(self) -> list[BlockExportClient]:
        return [
            BlockExportClient(
                peer=client.peer,
                identity=client.identity or None,
                requests=client.requests,
                received=client.received,
                sent=client.outbox.sent,
            )
            for client in self.clients
        ]

    async def drain(self) -> None:
        """Let clients finish what they have asked for; cancel this to lose patience. Called on the node's loop."""
        clients = list(self.clients)
        for client in clients:
            client.end()
        for client in clients:
            await client.ended()

    async def stop(self) -> None:
        clients = list(self.clients)
        for client in clients:
            client.close("the export is being removed")
        for client in clients:
            await client.idle()
        release_bitmaps(self._bitmaps)

    def withdraw(self) -> None:
        """Be no longer found by new clients. Called on the main loop."""
        if hasattr(self, "server"):
            self.server.remove(self)

    async def pause(self) -> None:
        self._paused = True  # who comes now waits, too
        for client in list(self.clients):
            await self.root.services.run(client.pause())
        self.places.drop()

    async def resume(self) -> None:
        self._paused = False
        for client in list(self.clients):
            self.root.services.loop.call_soon_threadsafe(client.resume)
