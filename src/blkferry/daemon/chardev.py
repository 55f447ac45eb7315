"""Character devices: where monitors get their clients from, one at a time.

A `Chardev` is a place (a listening socket, standard input and output) that yields a `Channel` per client.
Neither knows what is said over it. All of it belongs to the daemon's loop.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import os
import socket
import sys

from blkferry.daemon.channel import Channel
from blkferry.errors import Error, ErrorKind
from blkferry.schema.char import ChardevBackend, ChardevNull, ChardevSocket, ChardevStdio
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)
from blkferry.sockets.connect import connect
from blkferry.sockets.listener import Listener, listen

ACCEPT_PAUSE_S = 1.0  # after "too many open files" and its like, which no retry cures at once
STDIN, STDOUT = 0, 1

_log = logging.getLogger(__name__)


class Chardev(abc.ABC):
    """A source of channels for one user, the one between `claim` and `release`."""

    def __init__(self, chardev_id: str) -> None:
        self.id = chardev_id
        self.claimed = False

    def claim(self) -> None:
        if self.claimed:
            raise Error(
                ErrorKind.BUSY,
                f"Device '{self.id}' is in use",
                hint="each monitor needs a character device of its own",
            )
        self.claimed = True

    def release(self) -> None:
        self.claimed = False

    @property
    @abc.abstractmethod
    def filename(self) -> str:
        """The channel, readable, as query-chardev shows it."""

    async def start(self) -> None:  # noqa: B027 - most have nothing to do
        """Become reachable. Doing so twice is harmless, as is stopping twice."""

    @abc.abstractmethod
    async def accept(self) -> Channel:
        """Wait for the next client. Not to be called again before the previous one has ended."""

    def stop(self) -> None:  # noqa: B027
        """Be reachable no longer. Channels live on."""


class SocketChardev(Chardev):
    """Clients connect to a listening socket; the kernel keeps them in its backlog until it is their turn."""

    def __init__(self, chardev_id: str, address: SocketAddress) -> None:
        super().__init__(chardev_id)
        self._address = address
        self._listener: Listener | None = None
        self._channel: Channel | None = None

    @property
    def addresses(self) -> list[SocketAddress]:
        """Where it listens, with the ports that the kernel chose."""
        return self._listener.addresses if self._listener else []

    @property
    def filename(self) -> str:
        connected = self._channel is not None and not self._channel.ended.is_set()
        where = (self.addresses or [self._address])[0]
        return f"{'' if connected else 'disconnected:'}{_spell(where)},server=on"

    async def start(self) -> None:
        if self._listener is None:
            self._listener = await listen(self._address)

    def stop(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    async def accept(self) -> Channel:
        assert self._listener is not None
        while True:
            try:
                peer = await _accept_any(self._listener.sockets)
            except OSError as error:
                _log.warning("chardev '%s' cannot accept a client: %s", self.id, error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_S)
            else:
                peer.setblocking(False)
                self._channel = _channel(peer)
                return self._channel


class ConnectingChardev(Chardev):
    """The one client is who listens at an address; when it hangs up there is no other."""

    def __init__(self, chardev_id: str, address: SocketAddress) -> None:
        super().__init__(chardev_id)
        self._address = address
        self._peer: socket.socket | None = None
        self._channel: Channel | None = None

    @property
    def filename(self) -> str:
        connected = self._peer is not None or (self._channel is not None and not self._channel.ended.is_set())
        return f"{'' if connected else 'disconnected:'}{_spell(self._address)}"

    async def start(self) -> None:
        if self._peer is None and self._channel is None:
            self._peer = await connect(self._address)

    def stop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    async def accept(self) -> Channel:
        if self._peer is None:
            await asyncio.Event().wait()  # there is no second client
        assert self._peer is not None
        peer, self._peer = self._peer, None
        self._channel = _channel(peer)
        return self._channel


class StdioChardev(Chardev):
    """The one client is whoever started the daemon."""

    filename = "stdio"

    def __init__(self, chardev_id: str) -> None:
        super().__init__(chardev_id)
        self._taken = False

    async def start(self) -> None:
        try:
            for fd in (STDIN, STDOUT):
                os.fstat(fd)
        except OSError as error:
            raise Error.from_oserror("Standard input or output is closed", error) from error

    async def accept(self) -> Channel:
        if self._taken:
            await asyncio.Event().wait()  # there is no second client
        self._taken = True
        # These descriptors are shared with the parent process, which may not expect them to be non-blocking.
        was_blocking = [(fd, os.get_blocking(fd)) for fd in (STDIN, STDOUT)]

        def restore() -> None:
            for fd, blocking in was_blocking:
                os.set_blocking(fd, blocking)

        sys.stdout.flush()
        for fd, _ in was_blocking:
            os.set_blocking(fd, False)
        return Channel(STDIN, STDOUT, restore)


class NullChardev(Chardev):
    """Nobody ever comes."""

    filename = "null"

    async def accept(self) -> Channel:
        await asyncio.Event().wait()
        raise AssertionError


def make(chardev_id: str, backend: ChardevBackend) -> Chardev:
    """Build the chardev that `backend` describes; it still has to be started."""
    match backend:
        case ChardevSocket(server=True):
            return SocketChardev(chardev_id, backend.addr)
        case ChardevSocket(wait=True):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "'wait' option is incompatible with socket in client connect mode",
                hint="leave out wait, or say server=on",
            )
        case ChardevSocket():
            return ConnectingChardev(chardev_id, backend.addr)
        case ChardevStdio():
            return StdioChardev(chardev_id)
        case ChardevNull():
            return NullChardev(chardev_id)
    raise Error(ErrorKind.UNSUPPORTED, f"Chardev backend '{backend.type}' is not supported")


def _spell(address: SocketAddress) -> str:
    match address:
        case SocketAddressUnix():
            return f"unix:{address.path}" + (",abstract=on" if address.abstract else "")
        case SocketAddressInet():
            host = f"[{address.host}]" if ":" in address.host else address.host
            return f"tcp:{host}:{address.port}"
        case SocketAddressVsock():
            return f"vsock:{address.cid}:{address.port}"
        case SocketAddressFd():
            return f"fd:{address.fd}"
    return address.type


def _channel(peer: socket.socket) -> Channel:
    passing = peer if peer.family == socket.AF_UNIX else None
    return Channel(peer.fileno(), peer.fileno(), peer.close, passing)


def _accept(sock: socket.socket) -> socket.socket:
    peer, _ = sock.accept()
    if peer.family in (socket.AF_INET, socket.AF_INET6):
        try:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine vanished would keep all others waiting for ever.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError:
            peer.close()
            raise
    return peer


async def _accept_any(sockets: tuple[socket.socket, ...]) -> socket.socket:
    """Accept one client from whichever socket has one; leave all others in the backlog."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[socket.socket] = loop.create_future()

    def on_readable(sock: socket.socket) -> None:
        if accepted.done():
            return
        try:
            accepted.set_result(_accept(sock))
        except (BlockingIOError, ConnectionAbortedError):
            pass  # the client changed its mind
        except OSError as error:
            accepted.set_exception(error)

    for sock in sockets:
        loop.add_reader(sock.fileno(), on_readable, sock)
    try:
        return await accepted
    except asyncio.CancelledError:
        if accepted.done() and not accepted.cancelled() and not accepted.exception():
            accepted.result().close()
        raise
    finally:
        for sock in sockets:
            loop.remove_reader(sock.fileno())
