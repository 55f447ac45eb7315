"""One NBD client before transmission: its bytes to the handshake and back, TLS in between, and a limit on its time."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import TYPE_CHECKING

from blkferry.errors import Error
from blkferry.plane.loops import ended_unseen
from blkferry.plane.tls import TlsSocket, reason
from blkferry.sockets.peer import describe_peer
from blkferry.wire.nbd.handshake import Handshake, State

if TYPE_CHECKING:
    from blkferry.exports.nbd.security import Security
    from blkferry.exports.nbd.server import NbdServer

log = logging.getLogger(__name__)

_RECEIVE = 64 << 10


class Negotiation:
    """A connection that has not chosen an export."""

    def __init__(self, server: NbdServer, sock: socket.socket, address: object) -> None:
        self._server = server
        self._loop = server.loop
        self._plain = sock
        self._sock: socket.socket | TlsSocket = sock
        self._peer = describe_peer(sock, address)
        self._identity = ""
        self._machine = Handshake(server, tls_required=server.security is not None)
        self._unsent = memoryview(b"")
        self._timer: asyncio.TimerHandle | None = None
        self._securing: asyncio.Task[None] | None = None
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif sock.family == socket.AF_UNIX:
            _widen(sock)

    def start(self) -> None:
        """Greet the client."""
        if self._server.handshake_seconds:
            self._timer = self._loop.call_later(self._server.handshake_seconds, self._too_slow)
        self._loop.add_reader(self._plain.fileno(), self._readable)
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
        self._server.spoke(self)
        self._machine.receive(data)
        self._send()
        if self._server.is_negotiating(self) and self._securing is None and ended_unseen(self._sock):
            self.close("")

    def _send(self) -> None:
        """Send what there is to send; read again, or go on to what comes next, when all of it is gone."""
        fd = self._plain.fileno()
        while self._unsent or (pending := self._machine.outgoing()):
            if not self._unsent:
                self._unsent = memoryview(pending)
            try:
                sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._loop.remove_reader(fd)
                self._loop.add_writer(fd, self._writable)
                return
            except OSError:
                self.close("")
                return
            self._unsent = self._unsent[sent:]
        match self._machine.state:
            case State.CLOSED:
                self.close(self._machine.closed_reason)
            case State.STARTTLS:
                self._loop.remove_reader(fd)
                self._securing = self._loop.create_task(self._secure())
            case State.DONE:
                self._hand_over()

    def _writable(self) -> None:
        self._loop.remove_writer(self._plain.fileno())
        self._loop.add_reader(self._plain.fileno(), self._readable)
        self._send()

    # TLS -------------------------------------------------------------------------------------------------------

    async def _secure(self) -> None:
        security = self._server.security
        assert security is not None
        failure, denial = None, ""
        try:
            denial = await self._start_tls(security)
        except (OSError, ssl.CertificateError) as error:
            failure = f"TLS: {_reason(error)}"
        except Error as error:
            failure = f"TLS: {error.message}"
        except Exception:
            log.exception("%s: TLS", self._peer)
            failure = "internal error"
        self._securing = None  # it is over, and not to be cancelled
        if failure is not None:
            self.close(failure)
            return
        self._machine.secured(denial)
        self._loop.add_reader(self._plain.fileno(), self._readable)
        self._readable()  # what came with the end of the TLS handshake is not seen by the loop

    async def _start_tls(self, security: Security) -> str:
        """Make the connection secure and find out who the client is. Returns why it may not go on, if so."""
        credentials = security.credentials()
        self._sock = secured = TlsSocket(self._plain, credentials.context())
        await secured.shake_hands()
        self._identity = credentials.identity(secured.tls)
        if security.authorize is None or await security.authorize(self._identity):
            return ""
        log.warning("%s: denied by %s: '%s'", self._peer, security.rule, self._identity)
        return f"'{self._identity}' is not allowed to use this server"

    # The end ---------------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        negotiated = self._machine.result
        assert negotiated is not None
        export = self._server.choose(negotiated.export)
        if export is None:
            self.close("the export it chose has been removed")
            return
        self._release()
        log.info("%s: export '%s': connected%s", self._peer, export.name, self._identity and f" as '{self._identity}'")
        export.admit(self._sock, negotiated, bytes(self._machine.leftover), self._peer, self._identity)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._securing is not None:
            self._securing.cancel()
        self._loop.remove_reader(self._plain.fileno())
        self._loop.remove_writer(self._plain.fileno())
        self._server.negotiation_ended(self)

    def close(self, why: str) -> None:
        """End this connection."""
        if self._plain.fileno() < 0:
            return
        if refused := self._machine.refused:
            why = f"{why or 'the client went away'}; it was refused: {refused}"
        if why:
            log.info("%s: disconnecting during the handshake: %s", self._peer, why)
        self._release()
        self._sock.close()
        self._server.connection_closed()


def _reason(error: OSError | ssl.CertificateError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate was refused: {error.verify_message}"
    if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError | ConnectionError):
        return "the client went away; it may not trust this server"
    return reason(error)


_SO_SNDBUFFORCE = 32
_UNIX_BUFFER = 2 << 20


def _widen(sock: socket.socket) -> None:
    """Room for a few large replies, so that one fits into the socket whole; the forced form works for root only."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNIX_BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
