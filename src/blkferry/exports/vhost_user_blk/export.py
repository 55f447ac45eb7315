"""The `vhost-user-blk` export type: one node as a disk that one front end at a time gives to its guest.

The listening socket is the main loop's, which accepts a front end when there is none: the next one waits in the
kernel's backlog, also for what is in flight for the one before. Everything else lives on the loop of the node.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from typing import ClassVar, Final

from blkferry.errors import Error, ErrorKind
from blkferry.exports.base import Export
from blkferry.exports.vhost_user_blk.connection import Connection
from blkferry.exports.vhost_user_blk.options import BlockExportOptionsVhostUserBlk
from blkferry.exports.virtio_blk.device import Device, check_block_size
from blkferry.schema.export import BlockExportClient, BlockExportOptions
from blkferry.schema.sockets import SocketAddress, SocketAddressFd, SocketAddressUnix
from blkferry.sockets.listener import Listener, listen
from blkferry.sockets.peer import describe_peer
from blkferry.wire.virtio_blk import ID_BYTES, Feature

log = logging.getLogger(__name__)

SERIAL: Final = "vhost_user_blk"
"""What QEMU's back end says where none is given."""

RETRY_SECONDS: Final = 1.0
"""How long to wait with accepting when the process is out of descriptors."""


class VhostUserBlkExport(Export):
    """A vhost-user back end for a virtio block device."""

    kind: ClassVar[str] = "vhost-user-blk"
    options_type: ClassVar[type[BlockExportOptions]] = BlockExportOptionsVhostUserBlk
    options: BlockExportOptionsVhostUserBlk

    _made = False  # the device, before which the node has nothing to tell
    _listener: Listener | None = None
    _connection: Connection | None = None
    _accepting = False
    _standing_still = False

    async def start(self) -> None:
        options = self.options
        check_block_size(options.logical_block_size)
        serial = SERIAL if options.serial is None else options.serial
        if len(serial.encode()) > ID_BYTES:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"serial '{serial}' too long", hint=f"At most {ID_BYTES} bytes.")
        self.device = Device(
            self.root,
            name=f"export '{options.id}'",
            writable=options.writable,
            serial=serial,
            logical_block_size=options.logical_block_size,
            queues=options.num_queues,
            also=Feature.SIZE_MAX | Feature.CONFIG_WCE | Feature.MQ,
        )
        self._made = True
        if not isinstance(options.addr, SocketAddressUnix | SocketAddressFd):
            raise Error(
                ErrorKind.UNSUPPORTED,
                "Only socket address types 'unix' and 'fd' are supported",
                hint="Memory is shared over it, which takes a unix socket: addr.type=unix,addr.path=PATH.",
            )
        self._loop = asyncio.get_running_loop()
        listener = await listen(options.addr)
        if any(sock.family != socket.AF_UNIX for sock in listener.sockets):
            listener.close()
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "vhost-user needs a unix socket",
                hint=f"Descriptor '{options.addr.fd if isinstance(options.addr, SocketAddressFd) else ''}' is of "
                "another family.",
            )
        self._listener = listener
        self._accept()

    @property
    def addresses(self) -> Sequence[SocketAddress]:
        """Where front ends connect; nowhere any more when it is being removed."""
        return self._listener.addresses if self._listener is not None else ()

    # Front ends, on the main loop ------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Wait for a front end, if there is none."""
        if self._accepting or self._listener is None or self._connection is not None or self._standing_still:
            return
        self._accepting = True
        for sock in self._listener.sockets:
            self._loop.add_reader(sock.fileno(), self._arrived, sock)

    def _ignore(self) -> None:
        if self._accepting and self._listener is not None:
            for sock in self._listener.sockets:
                self._loop.remove_reader(sock.fileno())
        self._accepting = False

    def _arrived(self, listening: socket.socket) -> None:
        if not self._accepting:
            return
        try:
            sock, address = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log.warning("cannot accept front ends for a while: %s", error.strerror)
                self._ignore()
                self._loop.call_later(RETRY_SECONDS, self._accept)
            return
        self._ignore()
        self._connection = Connection(self.device, sock, describe_peer(sock, address), self._closed)
        self.root.services.loop.call_soon_threadsafe(self._connection.resume)

    def _closed(self, connection: Connection) -> None:
        self._loop.call_soon_threadsafe(self._forget, connection)

    def _forget(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._accept()

    @property
    def in_use(self) -> Error | None:
        if self._connection is None:
            return None
        return Error(
            ErrorKind.BUSY,
            f"export '{self.options.id}' still in use",
            hint=f"Use mode='hard' to force client disconnect. Connected: {self._connection.peer}.",
        )

    def connected(self) -> Sequence[BlockExportClient]:
        connection = self._connection
        if connection is None:
            return ()
        return (
            BlockExportClient(
                peer=connection.peer,
                requests=connection.requests,
                received=connection.received,
                sent=connection.sent,
            ),
        )

    def withdraw(self) -> None:
        self._ignore()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def pause(self) -> None:
        self._standing_still = True
        self._ignore()
        if self._connection is not None:
            await self.root.services.run(self._connection.pause())
        self.device.drop()

    async def resume(self) -> None:
        self._standing_still = False
        if self._connection is not None:
            self.root.services.loop.call_soon_threadsafe(self._connection.resume)
        self._accept()

    # On the loop of the node -----------------------------------------------------------------------------------------

    def retired(self, start: int, end: int | None) -> None:
        if not self._made:
            return
        self.device.retired(start, end)
        if self.device.resized() and self._connection is not None:
            self._connection.session.config_changed()

    async def drain(self) -> None:
        if self._connection is not None:
            await self._connection.drain()

    async def stop(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.close("the export is being removed")
            await connection.gone()
