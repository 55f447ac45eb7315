"""Character devices: where monitors get their clients from, one at a time.

A `Chardev` is a place (a listening socket, standard input and output) that yields a `Channel` per client.
Neither knows what is said over it. All of it belongs to the daemon's loop.

A channel works on plain descriptors rather than on the loop's transports, because one piece of code then
serves sockets, pipes, terminals and files on every loop. Descriptors that the loop cannot watch (files,
/dev/null) are always ready, and so need no watching.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

from blkferry.daemon.listener import Listener, listen
from blkferry.errors import Error, ErrorKind
from blkferry.schema.char import ChardevBackend, ChardevNull, ChardevSocket, ChardevStdio
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)

if TYPE_CHECKING:
    from collections.abc import Callable

READ_AHEAD = 64 << 10  # bytes kept for a busy reader; beyond that the kernel keeps them and the peer waits
CHUNK = 64 << 10
MAX_FDS = 16  # descriptors with one message; QEMU's limit, too
INT = struct.Struct("i")
ACCEPT_PAUSE_S = 1.0  # after "too many open files" and its like, which no retry cures at once
STDIN, STDOUT = 0, 1

_log = logging.getLogger(__name__)


class Channel:
    """A byte stream to and from one client, and descriptors that come with bytes of a unix socket (SCM_RIGHTS).

    Reading is bounded by READ_AHEAD, and stops at descriptors that are not taken. Writing never waits and is
    not bounded here: who sends looks at `unsent`, or awaits `drained`. Once the peer is lost, what is sent goes
    nowhere.
    """

    def __init__(
        self, reader: int, writer: int, release: Callable[[], None], passing: socket.socket | None = None
    ) -> None:
        """Take over two non-blocking descriptors (or one twice); `release` is called once, to close them.

        `passing` is the unix socket that both are, if descriptors are to be received.
        """
        self.ended = asyncio.Event()
        """The peer sends nothing more. It may still read: `printf ... | nc -N` does."""
        self.lost = False
        self._loop = asyncio.get_running_loop()
        self._reader = reader
        self._writer = writer
        self._release: Callable[[], None] | None = release
        self._inbox = bytearray()
        self._passing = passing
        self._passed: list[int] = []
        self._outbox = bytearray()
        self._arrived = asyncio.Event()
        self._emptied = asyncio.Event()
        self._reading = False
        self._writing = False
        self._watch_reader()

    @property
    def unsent(self) -> int:
        return len(self._outbox)

    async def receive(self) -> bytes:
        """Return what has arrived, at least one byte; nothing once the peer has ended."""
        while not self._inbox:
            if self.ended.is_set():
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._inbox)
        self._inbox.clear()
        self._watch_reader()
        return data

    def take_descriptors(self) -> list[int]:
        """Return those that came with what `receive` has just returned; they are the caller's to close."""
        taken, self._passed = self._passed, []
        self._watch_reader()
        return taken

    def send(self, data: bytes) -> None:
        if not self.lost:
            self._outbox += data
            if not self._writing:
                self._flush()

    async def drained(self) -> None:
        """Wait until everything sent is with the kernel, or the peer is lost."""
        while self._outbox:
            self._emptied.clear()
            await self._emptied.wait()

    def close(self) -> None:
        """Drop the peer, and what it has not yet taken."""
        self._lose()
        for fd in self.take_descriptors():
            os.close(fd)
        if self._release:
            release, self._release = self._release, None
            release()

    def _watch_reader(self) -> None:
        if self._reading or self._passed or self.ended.is_set():
            return
        self._reading = True
        try:
            self._loop.add_reader(self._reader, self._on_readable)
        except PermissionError:  # epoll's answer for a file
            self._reading = False
            self._loop.call_soon(self._on_readable)

    def _unwatch_reader(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._reader)

    def _on_readable(self) -> None:
        if self.ended.is_set():
            return
        try:
            data = os.read(self._reader, CHUNK) if self._passing is None else self._receive(self._passing)
        except BlockingIOError:
            return
        except OSError:
            self._lose()
            return
        if not data:
            self._end()
            return
        self._inbox += data
        self._arrived.set()
        self._unwatch_reader()
        if len(self._inbox) < READ_AHEAD:
            self._watch_reader()  # anew: see plane.loops.ended_unseen

    def _receive(self, sock: socket.socket) -> bytes:
        """Read bytes and what comes with them: the kernel ends a read there, and closes what MAX_FDS leaves out."""
        room = socket.CMSG_SPACE(MAX_FDS * INT.size)
        data, messages, _, _ = sock.recvmsg(CHUNK, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in messages:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % INT.size
                self._passed += (fd for (fd,) in INT.iter_unpack(content[:whole]))
        return data

    def _flush(self) -> None:
        try:
            while self._outbox:
                with memoryview(self._outbox) as view:
                    written = os.write(self._writer, view[:CHUNK])
                del self._outbox[:written]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._writer, self._flush)
            return
        except OSError:
            self._lose()
            return
        self._unwatch_writer()
        self._emptied.set()

    def _unwatch_writer(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._writer)

    def _end(self) -> None:
        self._unwatch_reader()
        self.ended.set()
        self._arrived.set()

    def _lose(self) -> None:
        self.lost = True
        self._inbox.clear()
        self._outbox.clear()
        self._unwatch_writer()
        self._emptied.set()
        self._end()


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
                passing = peer if peer.family == socket.AF_UNIX else None
                self._channel = Channel(peer.fileno(), peer.fileno(), peer.close, passing)
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
        case ChardevSocket():
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"Chardev '{chardev_id}' cannot connect to a server, only listen",
                hint="say server=on",
            )
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
