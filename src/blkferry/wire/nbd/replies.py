"""The client's side of NBD transmission: turns the bytes of replies into `Reply` values, in each mode.

It knows which requests are in flight, because a simple reply does not say how long it is, and nothing of what
they are for. Reassembly, timeouts and retries are the caller's.

Invariants: whatever a server sends, only `ProtocolError` is raised; no more than one message of bounded size
is buffered; content that is returned lies within the request it answers.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from blkferry.wire.nbd.constants import (
    CHUNK_ERROR_BIT,
    EXTENDED_REPLY_MAGIC,
    MAX_REPLY_PAYLOAD,
    MAX_REQUEST,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Mode,
    ReplyFlag,
)
from blkferry.wire.nbd.transmission import (
    ERROR,
    EXTENDED_CHUNK,
    EXTENT,
    EXTENT_EXT,
    HOLE,
    OFFSET,
    SIMPLE_REPLY,
    STATUS,
    STATUS_EXT,
    STRUCTURED_CHUNK,
    ProtocolError,
    Request,
)

if TYPE_CHECKING:
    from blkferry.wire.nbd.transmission import Buffer

_MAGIC_SIZE = 4

MAX_PARTS = MAX_REQUEST // 4096
"""Stretches of one READ with gaps between them, enough for the longest one in pages of any order. What is remembered of
a reply must not grow with the number of chunks that a server cuts it into.
"""

MAX_STATUS_EXTENTS = 1 << 16
"""Extents of one chunk that are looked at: the first are as good without the rest, and a chunk can hold millions."""


class Data(NamedTuple):
    offset: int
    data: bytes


class Hole(NamedTuple):
    offset: int
    length: int


class Status(NamedTuple):
    """One context's extents, as (length, status) pairs from the request's offset on."""

    context: int
    extents: tuple[tuple[int, int], ...]


class Failure(NamedTuple):
    """`error` is an `Errno`, or a number this client does not know and should treat as EINVAL."""

    error: int
    text: str


Content = Data | Hole | Status | Failure


class Reply(NamedTuple):
    """One message of a reply; `done` marks the last one for its request. Content None is plain success."""

    request: Request
    done: bool
    content: Content | None


@dataclass(slots=True)
class _Pending:
    request: Request
    unanswered: int  # bytes of a READ for which no content has come
    failed: bool = False
    parts: list[tuple[int, int]] = field(default_factory=list)  # start and end of what has come, in order, joined


class Replies:
    """The stream of replies in one mode. `expect` every request before its reply can arrive.

    A READ is complete when its content chunks, of which none may overlap another, add up to its length.
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._incoming = bytearray()
        self._pending: dict[int, _Pending] = {}

    def expect(self, request: Request) -> None:
        """Announce a request that is about to be sent. Its cookie must not be in flight already."""
        assert request.cookie not in self._pending, f"cookie {request.cookie} is in flight"
        self._pending[request.cookie] = _Pending(request, request.length if request.type == Cmd.READ else 0)

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def amid(self) -> bool:
        """Whether a part of a message has been received, so that its rest must come here too."""
        return bool(self._incoming)

    def withdraw(self, cookie: int) -> bool:
        """Forget a request whose reply the caller has read itself; False, and it stays, if a part of that came here."""
        pending = self._pending[cookie]
        if pending.parts or pending.failed:
            return False
        del self._pending[cookie]
        return True

    def receive(self, data: Buffer) -> list[Reply]:
        """Take bytes from the server and return the replies they complete. Raises ProtocolError."""
        self._incoming += data
        replies = []
        while (reply := self._next()) is not None:
            replies.append(reply)
        return replies

    def _next(self) -> Reply | None:
        buffer = self._incoming
        if len(buffer) < _MAGIC_SIZE:
            return None
        magic = int.from_bytes(buffer[:_MAGIC_SIZE])
        if magic == SIMPLE_REPLY_MAGIC and self._mode is not Mode.EXTENDED:
            return self._next_simple()
        if magic == STRUCTURED_REPLY_MAGIC and self._mode is Mode.STRUCTURED:
            layout = STRUCTURED_CHUNK
        elif magic == EXTENDED_REPLY_MAGIC and self._mode is Mode.EXTENDED:
            layout = EXTENDED_CHUNK
        else:
            raise ProtocolError(f"reply magic {magic:#010x} in {self._mode.name.lower()} mode")
        if len(buffer) < layout.size:
            return None
        _, flags, kind, cookie, *origin, length = layout.unpack_from(buffer)
        pending = self._find(cookie)
        if origin and origin[0] != pending.request.offset:
            raise ProtocolError(f"reply for offset {origin[0]} to a request for {pending.request.offset}")
        if length > MAX_REPLY_PAYLOAD:
            raise ProtocolError(f"chunk of {length} bytes, at most {MAX_REPLY_PAYLOAD} are possible")
        end = layout.size + length
        if len(buffer) < end:
            return None
        payload = bytes(buffer[layout.size : end])
        del buffer[:end]
        return self._finish(pending, self._parse_chunk(pending, kind, payload), done=bool(flags & ReplyFlag.DONE))

    def _next_simple(self) -> Reply | None:
        buffer = self._incoming
        if len(buffer) < SIMPLE_REPLY.size:
            return None
        _, error, cookie = SIMPLE_REPLY.unpack_from(buffer)
        pending = self._find(cookie)
        request = pending.request
        content: Data | Failure | None = Failure(error, "") if error else None
        end = SIMPLE_REPLY.size
        if request.type == Cmd.READ:
            if self._mode is not Mode.SIMPLE:
                raise ProtocolError("simple reply to a READ although structured replies were negotiated")
            if not error:
                end += request.length
                if len(buffer) < end:
                    return None
                content = Data(request.offset, bytes(buffer[SIMPLE_REPLY.size : end]))
                pending.unanswered = 0
        elif request.type == Cmd.BLOCK_STATUS and not error:
            raise ProtocolError("simple reply to a BLOCK_STATUS that carries no status")
        del buffer[:end]
        return self._finish(pending, content, done=True)

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError(f"reply with cookie {cookie:#x}, which no request in flight has")
        return pending

    def _finish(self, pending: _Pending, content: Content | None, *, done: bool) -> Reply:
        pending.failed = pending.failed or isinstance(content, Failure)
        if content is None and not done:
            raise ProtocolError("chunk NONE that is not the last of its reply")
        if done:
            if pending.unanswered and not pending.failed:
                raise ProtocolError(f"READ ended with {pending.unanswered} bytes missing")
            del self._pending[pending.request.cookie]
        return Reply(pending.request, done, content)

    def _parse_chunk(self, pending: _Pending, kind: int, payload: bytes) -> Content | None:
        command = pending.request.type
        if kind & CHUNK_ERROR_BIT:
            return _parse_error(payload)
        if kind == Chunk.NONE and not payload:
            return None
        if kind == Chunk.OFFSET_DATA and command == Cmd.READ and len(payload) > OFFSET.size:
            (offset,) = OFFSET.unpack_from(payload)
            _account(pending, offset, len(payload) - OFFSET.size)
            return Data(offset, payload[OFFSET.size :])
        if kind == Chunk.OFFSET_HOLE and command == Cmd.READ and len(payload) == HOLE.size:
            offset, length = HOLE.unpack(payload)
            _account(pending, offset, length)
            return Hole(offset, length)
        wanted = Chunk.BLOCK_STATUS_EXT if self._mode is Mode.EXTENDED else Chunk.BLOCK_STATUS
        if kind == wanted and command == Cmd.BLOCK_STATUS:
            return _parse_status(payload, extended=self._mode is Mode.EXTENDED)
        raise ProtocolError(f"chunk of type {kind} and {len(payload)} bytes in reply to command {command}")


def _account(pending: _Pending, offset: int, length: int) -> None:
    request = pending.request
    if not length or offset < request.offset or offset + length > request.offset + request.length:
        raise ProtocolError(f"content at {offset}, length {length}, lies outside the READ it answers")
    parts = pending.parts
    start, end = offset, offset + length
    place = bisect(parts, (start, end))
    first, last = place, place
    if place and parts[place - 1][1] >= start:
        first, start = place - 1, parts[place - 1][0]
    if place < len(parts) and parts[place][0] <= end:
        last, end = place + 1, parts[place][1]
    joined = sum(before[1] - before[0] for before in parts[first:last])
    if end - start != joined + length:
        raise ProtocolError(f"content at {offset}, length {length}, repeats what was sent before")
    parts[first:last] = [(start, end)]
    if len(parts) > MAX_PARTS:
        raise ProtocolError(f"the content of a READ comes in more than {MAX_PARTS} scattered parts")
    pending.unanswered -= length


def _parse_error(payload: bytes) -> Failure:
    """ERROR, or any type with the error bit: they all begin the same, and what follows may be ignored."""
    if len(payload) < ERROR.size:
        raise ProtocolError(f"error chunk of {len(payload)} bytes, at least {ERROR.size} are needed")
    error, length = ERROR.unpack_from(payload)
    if not error or ERROR.size + length > len(payload):
        raise ProtocolError(f"error chunk of {len(payload)} bytes with error {error} and a text of {length}")
    return Failure(error, payload[ERROR.size : ERROR.size + length].decode(errors="replace"))


def _parse_status(payload: bytes, *, extended: bool) -> Status:
    header, extent = (STATUS_EXT, EXTENT_EXT) if extended else (STATUS, EXTENT)
    count, rest = divmod(len(payload) - header.size, extent.size)
    if count < 1 or rest:
        raise ProtocolError(f"status chunk of {len(payload)} bytes does not hold whole extents")
    context, *claimed = header.unpack_from(payload)
    if claimed and claimed[0] != count:
        raise ProtocolError(f"status chunk claims {claimed[0]} extents and holds {count}")
    extents = tuple(islice(extent.iter_unpack(memoryview(payload)[header.size :]), MAX_STATUS_EXTENTS))
    if not all(length for length, _ in extents):
        raise ProtocolError("status chunk with an extent of length 0")
    return Status(context, extents)
