"""A channel: the bytes to and from one client of a character device, whatever it is made of.

It works on plain descriptors rather than on the loop's transports, because one piece of code then serves sockets,
pipes, terminals and files on every loop. Descriptors that the loop cannot watch (files, /dev/null) are always ready,
and so need no watching.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_AHEAD = 64 << 10  # bytes kept for a busy reader; beyond that the kernel keeps them and the peer waits
CHUNK = 64 << 10
MAX_FDS = 16  # descriptors with one message; QEMU's limit, too
INT = struct.Struct("i")


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
