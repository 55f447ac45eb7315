"""The NBD server: listening sockets, clients that are still negotiating, and the exports they can choose from.

It lives on the main loop. A client that has finished its handshake is handed to its export, which may run on another
loop; here it only counts as a connection from then on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.plane.loops import ended_unseen
from blkferry.wire.nbd.handshake import ExportInfo, Handshake, State

if TYPE_CHECKING:
    from blkferry.exports.nbd.export import NbdExport

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 64
"""So that a flood of connections does not starve those who are served."""

MAX_NEGOTIATING = 256
"""Clients that have not chosen an export yet. Beyond it the oldest makes room: whoever is served keeps being served."""

RETRY_SECONDS = 1.0
"""How long to wait with accepting when the process is out of descriptors."""

_RECEIVE = 64 << 10


class NbdServer:
    """Serves exports on sockets that listen already. 0 means unlimited `max_connections` and `handshake_seconds`.

    While it is `held`, clients wait in the kernel's backlog.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        max_connections: int = 0,
        handshake_seconds: int = 10,
        held: bool = False,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.sockets = list(sockets)
        self.max_connections = max_connections
        self._handshake_seconds = handshake_seconds
        self._exports: dict[str, NbdExport] = {}
        self._negotiating: dict[_Negotiation, None] = {}  # in the order they came
        self._connections = 0
        self._accepting = False
        self._closed = False
        self._held = held
        self._listen()

    # The directory that handshakes see -------------------------------------------------------------------------

    def list(self) -> Sequence[ExportInfo]:
        return [export.info for export in self._exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        export = self._exports.get(name)
        return None if export is None else export.info

    def add(self, export: NbdExport) -> None:
        """Offer an export under its name. Raises Error(EXISTS), Error(NOT_FOUND) while the server is being stopped."""
        if self._closed:
            raise Error(ErrorKind.NOT_FOUND, "NBD server not running", hint="It is being stopped.")
        if export.name in self._exports:
            raise Error(
                ErrorKind.EXISTS, f"NBD server already has export named '{export.name}'", hint="Give it another name."
            )
        self._exports[export.name] = export

    def remove(self, export: NbdExport) -> None:
        """Stop offering an export."""
        if self._exports.get(export.name) is export:
            del self._exports[export.name]

    @property
    def exports(self) -> Sequence[NbdExport]:
        """What is offered, oldest first."""
        return tuple(self._exports.values())

    # Connections -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if not self._accepting and not self._held and not self._closed and not self._full():
            self._accepting = True
            for listener in self.sockets:
                self.loop.add_reader(listener.fileno(), self._accept, listener)

    def admit(self) -> None:
        """Accept the clients that were held back."""
        self._held = False
        self._listen()

    def _ignore(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self.sockets:
                self.loop.remove_reader(listener.fileno())

    def _full(self) -> bool:
        return bool(self.max_connections) and self._connections >= self.max_connections

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self._full():
                self._ignore()  # further clients wait in the kernel's backlog, as QEMU's do
                return
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.warning("cannot accept clients for a while: %s", error.strerror)
                    self._ignore()
                    self.loop.call_later(RETRY_SECONDS, self._listen)
                    return
                continue  # that client is gone already
            self._connections += 1
            _Negotiation(self, sock, _describe(sock, address))

    def negotiation_begun(self, negotiation: _Negotiation) -> None:
        if len(self._negotiating) >= MAX_NEGOTIATING:
            next(iter(self._negotiating)).close("it made room for others before it had chosen an export")
        self._negotiating[negotiation] = None

    def negotiation_ended(self, negotiation: _Negotiation) -> None:
        self._negotiating.pop(negotiation, None)

    def is_negotiating(self, negotiation: _Negotiation) -> bool:
        return negotiation in self._negotiating

    def connection_closed(self) -> None:
        """One connection less."""
        self._connections -= 1
        self._listen()

    def choose(self, name: str) -> NbdExport | None:
        return self._exports.get(name)

    @property
    def handshake_seconds(self) -> int:
        return self._handshake_seconds

    def stop_listening(self) -> None:
        """Take no new connections; the sockets are closed by whoever made them."""
        self._closed = True
        self._ignore()

    def close(self) -> None:
        """Stop listening and cut off those who negotiate; exports are removed by the daemon."""
        self.stop_listening()
        for negotiation in list(self._negotiating):
            negotiation.close("the server is stopping")


class _Negotiation:
    """One client before transmission."""

    def __init__(self, server: NbdServer, sock: socket.socket, peer: str) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self._machine = Handshake(server)
        self._unsent = memoryview(b"")
        self._timer: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            _widen(sock)
        server.negotiation_begun(self)
        if server.handshake_seconds:
            self._timer = server.loop.call_later(server.handshake_seconds, self._too_slow)
        server.loop.add_reader(sock.fileno(), self._readable)
        self._send()

    def _too_slow(self) -> None:
        self.close(f"no export chosen within {self._server.handshake_seconds} seconds")

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or "receive failed")
            return
        if not data:
            self.close("")
            return
        self._machine.receive(data)
        self._send()
        if self._server.is_negotiating(self) and ended_unseen(self._sock):
            self.close("")

    def _send(self) -> None:
        """Send what there is to send; read again, or go on to transmission, when all of it is gone."""
        loop, fd = self._server.loop, self._sock.fileno()
        while self._unsent or (pending := self._machine.outgoing()):
            if not self._unsent:
                self._unsent = memoryview(pending)
            try:
                sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                loop.remove_reader(fd)
                loop.add_writer(fd, self._writable)
                return
            except OSError:
                self.close("")
                return
            self._unsent = self._unsent[sent:]
        if self._machine.state is State.CLOSED:
            self.close(self._machine.closed_reason)
        elif self._machine.state is State.DONE:
            self._hand_over()

    def _writable(self) -> None:
        self._server.loop.remove_writer(self._sock.fileno())
        self._server.loop.add_reader(self._sock.fileno(), self._readable)
        self._send()

    def _hand_over(self) -> None:
        negotiated = self._machine.result
        assert negotiated is not None
        export = self._server.choose(negotiated.export)
        if export is None:
            self.close("the export it chose has been removed")
            return
        self._release()
        log.info("%s: export '%s': connected", self._peer, export.name)
        export.admit(self._sock, negotiated, bytes(self._machine.leftover), self._peer)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server.loop.remove_reader(self._sock.fileno())
        self._server.loop.remove_writer(self._sock.fileno())
        self._server.negotiation_ended(self)

    def close(self, why: str) -> None:
        """End this connection."""
        if self._sock.fileno() < 0:
            return
        if why:
            log.info("%s: disconnecting during the handshake: %s", self._peer, why)
        self._release()
        self._sock.close()
        self._server.connection_closed()


_SO_SNDBUFFORCE = 32
_UNIX_BUFFER = 2 << 20


def _widen(sock: socket.socket) -> None:
    """Room for a few large replies, so that one fits into the socket whole; the forced form works for root only."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNIX_BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)


def _describe(sock: socket.socket, address: object) -> str:
    """Who a client is, for the log: an address, or the process at the other end of a unix socket."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = int.from_bytes(credentials[:4], sys.byteorder)
        return f"pid {pid}"
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return os.fsdecode(address) if isinstance(address, bytes) else str(address)
