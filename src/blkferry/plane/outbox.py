"""What a connection still has to send: bytes, buffers and pieces of files, in order, without blocking.

The fast path sends straight from scratch memory; only what the socket did not take is kept here. A piece of a file that
waits for a slow client counts as a reader of its storage, so that nobody is given its place meanwhile, and the storage
stays open. A socket that is gone makes the outbox `broken`, and whatever comes after that is dropped; the owner looks
at the flag at its next turn.

sendfile does not copy: until the peer has taken the bytes from its socket it would see what is written over them, be
that another's. So a piece that is `lent`, whose place its node may use again, counts as being read until the peer of a
unix socket has it. No other kind of socket can tell (TCP over the loopback device shares pages, too): it gets a copy.
What is to be encrypted is copied anyway.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable

from blkferry.plane.buffers import Buffer
from blkferry.plane.services import Services
from blkferry.plane.storage import Storage
from blkferry.plane.syscalls import unread_bytes
from blkferry.plane.tls import TlsSocket

_IOV_MAX = 256
_COPY_BYTES = 256 << 10

_LENT_SECONDS = 0.01
_LENT_SECONDS_MOST = 1.0
"""How soon, and at last how often, a peer that sends no more requests is looked at."""

_MSG_MORE = socket.MSG_MORE | socket.MSG_NOSIGNAL


class _FilePiece:
    """A piece of a file, whose storage counts us as a reader until it is gone."""

    __slots__ = ("length", "lent", "offset", "storage", "use")

    def __init__(self, storage: Storage, offset: int, length: int, lent: bool) -> None:
        self.storage = storage
        self.offset = offset
        self.length = length
        self.lent = lent
        self.use = storage.readers.begin()


_Piece = tuple[memoryview, Buffer | None] | _FilePiece


class Outbox:
    """The sending half of one connection. `on_drained` is called when the socket has taken everything at last."""

    def __init__(self, sock: socket.socket | TlsSocket, services: Services, on_drained: Callable[[], None]) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._services = services
        self._on_drained = on_drained
        self._pieces: deque[_Piece] = deque()
        self._watching = False
        self.sent = 0  # bytes, ever
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._lends = sock.family == socket.AF_UNIX and self._tls is None
        self._lent: deque[tuple[int, Storage, int]] = deque()  # what `sent` was after it, and whose use it is
        self._timer: asyncio.TimerHandle | None = None
        self.broken = False

    @property
    def blocked(self) -> bool:
        """Whether something waits for the socket; then new work should wait too."""
        return bool(self._pieces)

    def send(self, view: memoryview, *, more: bool = False) -> None:
        """Send from scratch memory: what the socket does not take is copied."""
        if self.broken:
            return
        sent = 0
        if not self._pieces:
            try:
                sent = self._sock.send(view, _MSG_MORE if more else socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            except OSError:
                self._break()
                return
            self.sent += sent
            if sent == len(view):
                return
        self._keep((memoryview(bytes(view[sent:])), None))

    def send_mapped(
        self,
        pieces: list[memoryview],
        places: list[int],
        storages: list[tuple[int, Storage]],
        total: int,
        *,
        lent: bool = False,
    ) -> None:
        """Send pieces that come from scratch memory (even ones) and from mapped files (odd ones), in turns.

        `places` says where in its file each of the latter lies: what the socket does not take is sent from the file.
        `storages` says from which of them on (by index in `places`) it is which file, in order and from 0.
        """
        if self.broken:
            return
        sent = 0
        if not self._pieces:
            try:
                sent = self._sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            except OSError:
                self._break()
                return
            self.sent += sent
            if sent == total:
                return
        for number, piece in enumerate(pieces):
            length = len(piece)
            if sent >= length:
                sent -= length
                continue
            if number % 2:
                index = number // 2
                storage = next(each for begins, each in reversed(storages) if begins <= index)
                self._pieces.append(_FilePiece(storage, places[index] + sent, length - sent, lent))
            else:
                self._pieces.append((memoryview(bytes(piece[sent:])), None))
            sent = 0
        self._watch()

    def send_file(self, storage: Storage, offset: int, length: int, *, lent: bool = False) -> None:
        """Send a piece of a file that is in the page cache (rule R4)."""
        if lent or self._pieces:
            self.send_files([(storage, offset, length)], lent=lent)
            return
        try:
            while length and not self.broken:
                sent = self._transfer(storage, offset, length, lent)
                offset += sent
                length -= sent
        except BlockingIOError:
            self._keep(_FilePiece(storage, offset, length, lent))
        except OSError:
            self._break()

    def send_files(self, parts: Iterable[tuple[Storage, int, int]], *, lent: bool = False) -> None:
        """The same for several (storage, offset, length)."""
        lenders: set[Storage] = set()
        for storage, offset, length in parts:
            if self.broken:
                return
            while length and not self._pieces:
                try:
                    sent = self._transfer(storage, offset, length, lent)
                except BlockingIOError:
                    break
                except OSError:
                    self._break()
                    return
                offset += sent
                length -= sent
                lenders.add(storage)
            if length:
                self._keep(_FilePiece(storage, offset, length, lent))
        if lent and self._lends:
            for storage in lenders:
                self._lend(storage, storage.readers.begin())

    def _transfer(self, storage: Storage, offset: int, length: int, lent: bool) -> int:
        if self._tls is not None:
            sent = self._tls.send_file(storage.fd, offset, length)
        elif lent and not self._lends:
            sent = self._sock.send(os.pread(storage.fd, min(length, _COPY_BYTES), offset), socket.MSG_NOSIGNAL)
        else:
            sent = os.sendfile(self._fd, storage.fd, offset, length)
        if sent == 0:  # the file shrank after its header went out: only closing can tell the client
            raise BrokenPipeError
        self.sent += sent
        return sent

    def _lend(self, storage: Storage, use: int) -> None:
        """What has just been sent counts as being read until the peer has taken it."""
        self._lent.append((self.sent, storage, use))
        if self._timer is None:
            self._timer = self._services.loop.call_later(_LENT_SECONDS, self._look, _LENT_SECONDS)

    def settle(self) -> None:
        """See what the peer has taken of what was lent; call it now and then while there is something."""
        taken = self.sent - unread_bytes(self._fd)
        while self._lent and self._lent[0][0] <= taken:
            _, storage, use = self._lent.popleft()
            storage.readers.end(use)

    @property
    def lends(self) -> bool:
        """Whether the peer may still have to take something that was lent."""
        return bool(self._lent)

    def _look(self, interval: float) -> None:
        """The same for a peer that asks for nothing any more: less and less often if it does not take it, either."""
        self._timer = None
        self.settle()
        if self._lent:
            interval = min(interval * 2, _LENT_SECONDS_MOST)
            self._timer = self._services.loop.call_later(interval, self._look, interval)

    def _return_all(self) -> None:
        self._stop_timer()
        while self._lent:
            _, storage, use = self._lent.popleft()
            storage.readers.end(use)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def queue(self, data: bytes | memoryview, buffer: Buffer | None = None) -> None:
        """Send at the next `flush`; `buffer`, if given, holds the bytes and is released when they are gone."""
        if self.broken:
            if buffer is not None:
                buffer.release()
            return
        self._pieces.append((memoryview(data), buffer))

    def flush(self) -> None:
        """Send as much as the socket takes."""
        while self._pieces and not self.broken:
            first = self._pieces[0]
            try:
                if isinstance(first, _FilePiece):
                    self._flush_file(first)
                else:
                    self._flush_bytes()
            except BlockingIOError:
                self._watch()
                return
            except OSError:
                self._break()
                return
        self._unwatch()

    def _flush_file(self, piece: _FilePiece) -> None:
        sent = self._transfer(piece.storage, piece.offset, piece.length, piece.lent)
        piece.offset += sent
        piece.length -= sent
        if piece.length:
            return
        self._pieces.popleft()
        if piece.lent and self._lends:
            self._lend(piece.storage, piece.use)
        else:
            piece.storage.readers.end(piece.use)

    def _flush_bytes(self) -> None:
        batch: list[memoryview] = []
        more = 0
        for piece in self._pieces:
            if isinstance(piece, _FilePiece):
                more = socket.MSG_MORE
                break
            batch.append(piece[0])
            if len(batch) == _IOV_MAX:
                break
        sent = self._sock.sendmsg(batch, [], socket.MSG_NOSIGNAL | more)
        self.sent += sent
        while sent:
            view, buffer = self._pieces.popleft()  # type: ignore[misc]  # the batch held no file pieces
            if sent < len(view):
                self._pieces.appendleft((view[sent:], buffer))
                break
            sent -= len(view)
            if buffer is not None:
                buffer.release()

    def _keep(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        self._watch()

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._services.loop.add_writer(self._fd, self._writable)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._services.loop.remove_writer(self._fd)

    def _writable(self) -> None:
        self.flush()
        if not self._pieces:
            self._on_drained()

    def _break(self) -> None:
        self.broken = True
        self.discard()

    def discard(self) -> None:
        """Forget what is left, and stop watching the socket."""
        self._unwatch()
        self._return_all()
        while self._pieces:
            self._release(self._pieces.popleft())

    def _release(self, piece: _Piece) -> None:
        if isinstance(piece, _FilePiece):
            piece.storage.readers.end(piece.use)
        elif piece[1] is not None:
            piece[1].release()

    def detach(self) -> None:
        """Stop watching, on the old loop, and give its buffers back to it; `attach` goes on."""
        self._unwatch()
        self._stop_timer()
        for number, piece in enumerate(self._pieces):
            if not isinstance(piece, _FilePiece) and piece[1] is not None:
                self._pieces[number] = (memoryview(bytes(piece[0])), None)
                piece[1].release()

    def attach(self, services: Services) -> None:
        """Go on, on the new loop."""
        self._services = services
        if self._pieces:
            self._watch()
        if self._lent:
            self._look(_LENT_SECONDS)
