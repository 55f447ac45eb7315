"""What a connection still has to send: bytes, buffers and pieces of files, in order, without blocking.

The fast path sends straight from scratch memory; only what the socket did not take is kept here. A socket that is gone
makes the outbox `broken`, and whatever comes after that is dropped; the owner looks at the flag at its next turn.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

from blkferry.plane.buffers import Buffer
from blkferry.plane.services import Services

_IOV_MAX = 256
_MSG_MORE = socket.MSG_MORE | socket.MSG_NOSIGNAL


class _FilePiece:
    """A piece of the file that the outbox holds open."""

    __slots__ = ("length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length


_Piece = tuple[memoryview, Buffer | None] | _FilePiece


class Outbox:
    """The sending half of one connection. `on_drained` is called when the socket has taken everything at last."""

    def __init__(self, sock: socket.socket, services: Services, on_drained: Callable[[], None]) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._services = services
        self._on_drained = on_drained
        self._pieces: deque[_Piece] = deque()
        self._watching = False
        # A descriptor of our own for the file pieces that wait, however many. They outlive what happens to the node,
        # and a client that does not read cannot use up the descriptors of the process.
        self._file = -1
        self._file_pieces = 0
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
            if sent == len(view):
                return
        self._keep((memoryview(bytes(view[sent:])), None))

    def send_mapped(self, pieces: list[memoryview], places: list[int], total: int, fd: int) -> None:
        """Send pieces that come from scratch memory (even ones) and from a mapping of `fd` (odd ones), in turns.

        `places` says where in the file each of the latter lies: what the socket does not take is sent from the file.
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
            if sent == total:
                return
        for number, piece in enumerate(pieces):
            if self.broken:
                return
            length = len(piece)
            if sent >= length:
                sent -= length
                continue
            if number % 2:
                self._keep_file(fd, places[number // 2] + sent, length - sent)
            else:
                self._pieces.append((memoryview(bytes(piece[sent:])), None))
            sent = 0
        self._watch()

    def send_file(self, fd: int, offset: int, length: int) -> None:
        """Send a piece of a file that is in the page cache (rule R4)."""
        if self.broken:
            return
        if not self._pieces:
            while length:
                try:
                    sent = os.sendfile(self._fd, fd, offset, length)
                except BlockingIOError:
                    break
                except OSError:
                    self._break()
                    return
                if sent == 0:  # the file shrank after its header went out: only closing can tell the client
                    self._break()
                    return
                offset += sent
                length -= sent
            if not length:
                return
        self._keep_file(fd, offset, length)

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
        sent = os.sendfile(self._fd, self._file, piece.offset, piece.length)
        if sent == 0:
            raise BrokenPipeError
        piece.offset += sent
        piece.length -= sent
        if not piece.length:
            self._release(self._pieces.popleft())

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
        while sent:
            view, buffer = self._pieces.popleft()  # type: ignore[misc]  # the batch held no file pieces
            if sent < len(view):
                self._pieces.appendleft((view[sent:], buffer))
                break
            sent -= len(view)
            if buffer is not None:
                buffer.release()

    def _keep_file(self, fd: int, offset: int, length: int) -> None:
        """Keep a piece of a file; all that wait at a time are pieces of the same one."""
        if self.broken:
            return
        if not self._file_pieces:
            try:
                self._file = os.dup(fd)
            except OSError:  # out of descriptors: the header has gone out, so this reply cannot be taken back
                self._break()
                return
        self._file_pieces += 1
        self._keep(_FilePiece(offset, length))

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
        while self._pieces:
            self._release(self._pieces.popleft())

    def _release(self, piece: _Piece) -> None:
        if isinstance(piece, _FilePiece):
            self._file_pieces -= 1
            if not self._file_pieces:
                os.close(self._file)
                self._file = -1
        elif piece[1] is not None:
            piece[1].release()

    def detach(self) -> None:
        """Stop watching, on the old loop, and give its buffers back to it; `attach` goes on."""
        self._unwatch()
        for number, piece in enumerate(self._pieces):
            if not isinstance(piece, _FilePiece) and piece[1] is not None:
                self._pieces[number] = (memoryview(bytes(piece[0])), None)
                piece[1].release()

    def attach(self, services: Services) -> None:
        """Go on, on the new loop."""
        self._services = services
        if self._pieces:
            self._watch()
