"""What a server answers: bytes of the stream in, completed calls out.

Nearly all replies are a whole read in one chunk, or a bare success. Those are read here, straight from the memory they
were received in to where they belong. All others, and whatever is wrong, go through `wire.nbd.replies`, which knows
every rule.
"""

from __future__ import annotations

from typing import Final

from blkferry.plane.engine import Done
from blkferry.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Errno,
    Mode,
    ReplyFlag,
)
from blkferry.wire.nbd.replies import Data, Failure, Hole, Replies, Status
from blkferry.wire.nbd.transmission import EXTENDED_CHUNK, OFFSET, SIMPLE_REPLY, STRUCTURED_CHUNK, Request

MAX_TAIL: Final = 128 << 10
"""The longest piece of a message that is received again with its rest: about half of what a receive takes."""

_MAGIC: Final = {
    Mode.SIMPLE: SIMPLE_REPLY_MAGIC,
    Mode.STRUCTURED: STRUCTURED_REPLY_MAGIC,
    Mode.EXTENDED: EXTENDED_REPLY_MAGIC,
}
_ERRNOS: Final = frozenset(Errno)
_READ: Final = int(Cmd.READ)
_BLOCK_STATUS: Final = int(Cmd.BLOCK_STATUS)
_DONE: Final = int(ReplyFlag.DONE)
_NONE: Final = int(Chunk.NONE)
_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)


class Call:
    """A request in flight, for `user`. `view` is what a READ fills, `error` and `extents` what came of it.

    `done` is called once, with the negated error.
    """

    __slots__ = ("command", "done", "error", "extents", "known", "length", "start", "user", "view")

    def __init__(
        self, command: int, start: int, length: int, view: memoryview | None, done: Done, user: object = None
    ) -> None:
        self.command = command
        self.start = start
        self.length = length
        self.view = view
        self.done = done
        self.user = user
        self.error = 0
        self.extents: tuple[tuple[int, int], ...] = ()
        self.known = False  # to the Replies


class Answers:
    """The answers of one connection to `calls`, by cookie. `context` is the id of the one whose status is wanted."""

    def __init__(self, mode: Mode, context: int | None) -> None:
        self.calls: dict[int, Call] = {}
        self._mode = mode
        self._context = context
        self._replies = Replies(mode)
        self._layout = EXTENDED_CHUNK if mode is Mode.EXTENDED else STRUCTURED_CHUNK
        self._magic = _MAGIC[mode]

    def receive(self, data: memoryview) -> int:
        """Complete what is answered. Returns how many bytes at the end of `data` are to come again with what follows.

        They are MAX_TAIL at most. Raises ProtocolError.
        """
        if not self._replies.amid:
            at, is_piece = (self._take_simple if self._mode is Mode.SIMPLE else self._take_chunks)(data)
            data = data[at:]
            # A simple reply among chunks is shorter than the header of a chunk, so look at what there is of the magic.
            if is_piece and len(data) <= MAX_TAIL and self._magic.to_bytes(4).startswith(bytes(data[:4])):
                return len(data)
        self._take_any(data)
        return 0

    def _take_chunks(self, data: memoryview) -> tuple[int, bool]:
        """Complete what needs one plain chunk, or as little as a simple reply says.

        Returns how far that got, and whether only the rest of one is missing there.
        """
        unpack, size, magic = self._layout.unpack_from, self._layout.size, self._magic
        is_extended = self._mode is Mode.EXTENDED
        calls = self.calls
        at, end = 0, len(data)
        while True:
            if at + size > end or (fields := unpack(data, at))[0] != magic:
                if not self._take_success(data, at):
                    return at, at + size > end
                at += SIMPLE_REPLY.size
                continue
            call = calls.get(fields[3])
            if call is None or fields[1] != _DONE:
                return at, False
            if is_extended and fields[4] != call.start:
                return at, False
            kind, length = fields[2], fields[-1]
            stop = at + size + length
            if kind == _OFFSET_DATA and call.command == _READ and length == OFFSET.size + call.length:
                if stop > end:
                    return at, True
                if OFFSET.unpack_from(data, at + size)[0] != call.start or not self._settled(fields[3], call):
                    return at, False
                if call.view is not None:
                    call.view[:] = data[at + size + OFFSET.size : stop]
            elif (
                kind != _NONE or length or call.command in (_READ, _BLOCK_STATUS) or not self._settled(fields[3], call)
            ):
                return at, False
            call.done(0)
            at = stop

    def _take_success(self, data: memoryview, at: int) -> bool:
        """Complete what a simple reply without an error answers: most servers send it where no bytes are asked for.

        With extended headers there is no such thing.
        """
        if self._mode is Mode.EXTENDED or at + SIMPLE_REPLY.size > len(data):
            return False
        magic, error, cookie = SIMPLE_REPLY.unpack_from(data, at)
        call = self.calls.get(cookie)
        if magic != SIMPLE_REPLY_MAGIC or error or call is None or call.command in (_READ, _BLOCK_STATUS):
            return False
        if not self._settled(cookie, call):
            return False
        call.done(0)
        return True

    def _take_simple(self, data: memoryview) -> tuple[int, bool]:
        """The same for simple replies without an error."""
        calls = self.calls
        at, end = 0, len(data)
        while at + SIMPLE_REPLY.size <= end:
            magic, error, cookie = SIMPLE_REPLY.unpack_from(data, at)
            call = calls.get(cookie)
            if call is None or error or magic != SIMPLE_REPLY_MAGIC or call.command == _BLOCK_STATUS:
                return at, False
            first = stop = at + SIMPLE_REPLY.size
            if call.command == _READ:
                stop += call.length
            if stop > end:
                return at, True
            if not self._settled(cookie, call):
                return at, False
            if call.command == _READ and call.view is not None:
                call.view[:] = data[first:stop]
            call.done(0)
            at = stop
        return at, True

    def _settled(self, cookie: int, call: Call) -> bool:
        """Take a call from those in flight, unless a part of its reply came before: then more is to be checked."""
        if call.known and not self._replies.withdraw(cookie):
            return False
        del self.calls[cookie]
        return True

    def _take_any(self, data: memoryview) -> None:
        for cookie, call in self.calls.items():
            if not call.known:
                call.known = True
                self._replies.expect(Request(0, call.command, cookie, call.start, call.length))
        for request, done, content in self._replies.receive(data):
            call = self.calls[request.cookie]
            match content:
                case Data(offset, received) if call.view is not None:
                    at = offset - request.offset
                    call.view[at : at + len(received)] = received
                case Hole(offset, length) if call.view is not None:
                    at = offset - request.offset
                    call.view[at : at + length] = bytes(length)
                case Status(context, extents) if context == self._context:
                    call.extents = extents
                case Failure(error, _):
                    call.error = error if error in _ERRNOS else Errno.EINVAL
            if done:
                del self.calls[request.cookie]
                call.done(-call.error)
