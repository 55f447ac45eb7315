"""A socket with TLS on it, for those who read and write when they may and never wait.

It stands where a non-blocking socket stands: what cannot be done now raises BlockingIOError. Bytes go through OpenSSL
in memory, so that one system call carries many records. What was encrypted cannot be taken back: when the socket does
not take all of it, `send` raises BlockingIOError all the same, and whoever called it must send the same bytes again, as
it would anyway; they are then counted as sent without being looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterable
from typing import Final

_RECEIVE: Final = 256 << 10
_PIECE: Final = 256 << 10
"""What is encrypted and sent in one go, so that little of it waits here when the socket takes no more."""


class TlsSocket:
    """The one owner of a connected non-blocking socket; `shake_hands` comes before everything else.

    `ready`: the last receive found more than it could return, and the socket will not say so again.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_hostname: str | None = None) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=context.protocol is ssl.PROTOCOL_TLS_SERVER,
            server_hostname=server_hostname,
        )
        self.family = sock.family
        self.ready = False
        self._ciphertext = memoryview(b"")  # what the socket did not take
        self._accepted = 0  # bytes of what will be sent again that are in it
        self._scratch: memoryview | None = None
        self._is_secure = False

    async def shake_hands(self) -> None:
        """Agree on keys. OpenSSL's work is done in a thread, so that nobody else waits for it. Raises OSError.

        What the context is asked for meanwhile, a key say, it is asked within this task's context variables.
        """
        loop = asyncio.get_running_loop()
        while True:
            wants = False
            try:
                await asyncio.to_thread(self.tls.do_handshake)
            except ssl.SSLWantReadError:
                wants = True
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self._send_outgoing(loop)  # the alert that says why
                raise
            await self._send_outgoing(loop)
            if not wants:
                self._is_secure = True
                return
            data = await loop.sock_recv(self._sock, _RECEIVE)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the peer went away during the TLS handshake")
            self._incoming.write(data)

    async def _send_outgoing(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._outgoing.pending:
            await loop.sock_sendall(self._sock, self._outgoing.read())

    # Receiving -------------------------------------------------------------------------------------------------

    def recv_into(self, view: memoryview) -> int:
        """Fill as much of `view` as there is; 0 at the end of the stream. Raises OSError."""
        total = 0
        self.ready = False
        while total < len(view):
            try:
                # With a buffer to read into the answer is how many bytes that was.
                count: int = self.tls.read(len(view) - total, view[total:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if not self._receive(nothing_yet=not total):
                    return total
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return total
            if not count:
                return total
            total += count
        self.ready = True
        return total

    def recv(self, most: int) -> bytes:
        """At most `most` bytes; none at the end of the stream. Raises OSError."""
        data = bytearray(most)
        return bytes(data[: self.recv_into(memoryview(data))])

    def _receive(self, *, nothing_yet: bool) -> bool:
        """Take ciphertext from the socket; False when there is none now and that need not be said."""
        try:
            data = self._sock.recv(_RECEIVE)
        except BlockingIOError:
            if nothing_yet:
                raise
            return False
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    # Sending ---------------------------------------------------------------------------------------------------

    def send(self, view: bytes | memoryview, flags: int = 0) -> int:
        """Send; with MSG_MORE it may stay here until the next call. Raises OSError."""
        if done := self._sent_before(len(view)):
            return done
        view = view[:_PIECE]
        if view:
            self.tls.write(view)
        if not flags & socket.MSG_MORE:
            self._push(len(view))
        return len(view)

    def sendmsg(self, pieces: Iterable[bytes | memoryview], _ancillary: object = (), flags: int = 0) -> int:
        """`send` of several pieces, or of the first few of them."""
        chosen: list[bytes | memoryview] = []
        size = 0
        for piece in pieces:
            chosen.append(piece)
            size += len(piece)
            if size >= _PIECE:
                break
        return self.send(chosen[0] if len(chosen) == 1 else b"".join(chosen), flags)

    def send_file(self, descriptor: int, offset: int, length: int) -> int:
        """Send a piece of a file; how many bytes that was, 0 at its end. Raises OSError."""
        if done := self._sent_before(length):
            return done
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_PIECE))
        view = self._scratch[: min(length, _PIECE)]
        count = os.preadv(descriptor, (view,), offset)
        if count:
            self.tls.write(view[:count])
            self._push(count)
        return count

    def _sent_before(self, length: int) -> int:
        """Get rid of old ciphertext first; how many of the next `length` bytes were in it."""
        if self._ciphertext:
            self._drain()
        done = min(self._accepted, length)
        self._accepted -= done
        return done

    def _push(self, count: int) -> None:
        self._ciphertext = memoryview(self._outgoing.read())
        try:
            self._drain()
        except BlockingIOError:
            self._accepted = count
            raise

    def _drain(self) -> None:
        while self._ciphertext:
            self._ciphertext = self._ciphertext[self._sock.send(self._ciphertext, socket.MSG_NOSIGNAL) :]

    # The socket ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Its descriptor, -1 when it is closed."""
        return self._sock.fileno()

    def getsockopt(self, level: int, option: int) -> int:
        """An option of the socket."""
        return self._sock.getsockopt(level, option)

    def close(self) -> None:
        """Say goodbye if that is possible at once, and close.

        Before the handshake is over a thread may be at work on it, and OpenSSL's objects are not for two at a time.
        """
        if self._is_secure and self._sock.fileno() >= 0:
            with contextlib.suppress(OSError, ValueError):
                self.tls.unwrap()
            with contextlib.suppress(OSError):
                if not self._ciphertext:
                    self._sock.send(self._outgoing.read(), socket.MSG_NOSIGNAL)
        self._sock.close()


def reason(error: OSError | ValueError) -> str:
    """What OpenSSL or the kernel complains of, in a few words and without source lines."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
