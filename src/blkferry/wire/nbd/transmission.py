"""Requests and replies of the NBD transmission phase: layouts, builders, and the rules a request must obey.

It does not know what a request does to a node, and keeps no state: the mode a connection negotiated is an
argument. The server's loop unpacks and packs the common cases with the `struct.Struct`s below by itself;
`check` is the plain statement of the rules, and what every other case goes through.

Invariants: no builder produces a chunk the specification forbids (texts are cut to MAX_STRING, simple replies
never appear in extended mode), and no parser raises anything but `ProtocolError` whatever the bytes.
"""

from __future__ import annotations

import errno
import itertools
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from blkferry.errors import Error, ErrorKind
from blkferry.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_REQUEST,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    ReplyFlag,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Buffer = bytes | bytearray | memoryview

COMPACT_REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, payload length
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, request offset, payload length
STRUCTURED_DATA: Final = struct.Struct(">IHHQIQ")  # a chunk header and the offset that opens OFFSET_DATA
EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
OFFSET: Final = struct.Struct(">Q")  # opens OFFSET_DATA; the data follow
HOLE: Final = struct.Struct(">QI")  # OFFSET_HOLE: offset, length
ERROR: Final = struct.Struct(">IH")  # ERROR: error, text length; the text follows
STATUS: Final = struct.Struct(">I")  # BLOCK_STATUS: context id; extents follow
STATUS_EXT: Final = struct.Struct(">II")  # BLOCK_STATUS_EXT: context id, count; extents follow
EXTENT: Final = struct.Struct(">II")  # length, status
EXTENT_EXT: Final = struct.Struct(">QQ")

REQUEST_LAYOUT: Final = {
    Mode.SIMPLE: (REQUEST_MAGIC, COMPACT_REQUEST),
    Mode.STRUCTURED: (REQUEST_MAGIC, COMPACT_REQUEST),
    Mode.EXTENDED: (EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST),
}

_EFFECT_LENGTH: Final = 8  # opens the payload of BLOCK_STATUS; four bytes for each wanted context follow


class ProtocolError(Error):
    """The peer sent what no NBD peer may send: the stream is out of step and the connection must end."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.CORRUPT, message)


class Refusal(NamedTuple):
    """Why a request is not executed: the error to report and the text that goes with it."""

    error: Errno
    text: str


class Request(NamedTuple):
    """A request's header without its magic. `flags` and `type` are what the peer sent, known to us or not."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int

    @classmethod
    def parse(cls, data: Buffer, mode: Mode) -> Request:
        """Read the header that opens `data`, which must be whole. Raises ProtocolError."""
        expected, layout = REQUEST_LAYOUT[mode]
        if len(data) < layout.size:
            raise ProtocolError(f"a request header is {layout.size} bytes long, not {len(data)}")
        magic, *fields = layout.unpack_from(data)
        if magic != expected:
            raise ProtocolError(f"request magic is {magic:#010x} instead of {expected:#010x}")
        return cls(*fields)

    def build(self, mode: Mode) -> bytes:
        magic, layout = REQUEST_LAYOUT[mode]
        return layout.pack(magic, *self)

    def payload_length(self, mode: Mode) -> int:
        """How many bytes follow the header. More than MAX_REQUEST of them end the connection unread.

        A WRITE always carries its data: some clients leave out the PAYLOAD_LEN that extended mode demands.
        """
        if self.type == Cmd.WRITE or (mode is Mode.EXTENDED and self.flags & CmdFlag.PAYLOAD_LEN):
            return self.length
        return 0


# --- What a request may ask ---------------------------------------------------------------------------------

_FUA: Final = int(CmdFlag.FUA)
_COMPACT_FLAGS: Final[dict[int, int]] = {
    Cmd.READ: _FUA,
    Cmd.WRITE: _FUA,
    Cmd.DISC: 0xFFFF,  # it has no reply to complain in
    Cmd.FLUSH: _FUA,
    Cmd.TRIM: _FUA,
    Cmd.CACHE: _FUA,
    Cmd.WRITE_ZEROES: _FUA | int(CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
    Cmd.BLOCK_STATUS: _FUA | int(CmdFlag.REQ_ONE),
}
_STRUCTURED_FLAGS: Final = _COMPACT_FLAGS | {Cmd.READ: _FUA | int(CmdFlag.DF)}
_EXTENDED_FLAGS: Final = _STRUCTURED_FLAGS | {
    Cmd.WRITE: _FUA | int(CmdFlag.PAYLOAD_LEN),
    Cmd.BLOCK_STATUS: _FUA | int(CmdFlag.REQ_ONE | CmdFlag.PAYLOAD_LEN),
}

# The flags each command accepts; a command that is not a key does not exist. Plain numbers, because the
# complement of an IntFlag has only the bits its class knows: `flags & ~CmdFlag.FUA` would let 0x8000 pass.
VALID_FLAGS: Final[dict[Mode, dict[int, int]]] = {
    Mode.SIMPLE: _COMPACT_FLAGS,
    Mode.STRUCTURED: _STRUCTURED_FLAGS,
    Mode.EXTENDED: _EXTENDED_FLAGS,
}

_SIZED: Final = frozenset({Cmd.READ, Cmd.WRITE, Cmd.CACHE})  # MAX_REQUEST bounds these, not TRIM and its like
_MODIFYING: Final = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
_GROWING: Final = frozenset({Cmd.WRITE, Cmd.WRITE_ZEROES})  # past the end these lack space, others are wrong


def check(request: Request, *, size: int, read_only: bool, mode: Mode, selected: Sequence[int] = ()) -> Refusal | None:
    """Say why `request` must be refused on an export of `size` bytes, or None if it may run.

    `selected` are the ids of the negotiated contexts. For a BLOCK_STATUS with a payload, `request.length`
    must already be the effect length that `parse_status_filter` found.
    """
    flags, command, _, offset, length = request
    valid_flags = VALID_FLAGS[mode].get(command)
    if valid_flags is None:
        return Refusal(Errno.EINVAL, f"invalid request type ({command}) received")
    if command == Cmd.DISC:
        return None
    if command in _SIZED and length > MAX_REQUEST:
        return Refusal(Errno.EINVAL, f"len ({length}) is larger than max len ({MAX_REQUEST})")
    if read_only and command in _MODIFYING:
        return Refusal(Errno.EPERM, "Export is read-only")
    if offset + length > size:
        error = Errno.ENOSPC if command in _GROWING else Errno.EINVAL
        return Refusal(error, f"operation past EOF; From: {offset}, Len: {length}, Size: {size}")
    if flags & ~valid_flags:
        name = Cmd(command).name.lower().replace("_", " ")
        return Refusal(Errno.EINVAL, f"unsupported flags for command {name} (got {flags:#x})")
    if command == Cmd.BLOCK_STATUS:
        if not length:
            return Refusal(Errno.EINVAL, "need non-zero length")
        if not selected:
            return Refusal(Errno.EINVAL, "CMD_BLOCK_STATUS not negotiated")
    return None


class StatusFilter(NamedTuple):
    """The payload of BLOCK_STATUS in extended mode: how far to look, and for which contexts."""

    length: int
    ids: tuple[int, ...]

    def build(self) -> bytes:
        return struct.pack(f">Q{len(self.ids)}I", self.length, *self.ids)


def max_status_filter(selected: Sequence[int]) -> int:
    """The longest payload of BLOCK_STATUS that can be valid. Skip a longer one instead of buffering it."""
    return _EFFECT_LENGTH + 4 * len(selected)


def parse_status_filter(payload: Buffer, selected: Sequence[int]) -> StatusFilter | Refusal:
    """Read the payload of BLOCK_STATUS: at least one id, each selected, none repeated.

    The ids come back in the order of `selected`, which is the order replies are sent in.
    """
    count, rest = divmod(len(payload) - _EFFECT_LENGTH, 4)
    if count >= 1 and not rest and len(payload) <= max_status_filter(selected):
        length, *ids = struct.unpack(f">Q{count}I", payload)
        wanted = frozenset(ids)
        if len(wanted) == count and wanted.issubset(selected):
            return StatusFilter(length, tuple(i for i in selected if i in wanted))
    return Refusal(Errno.EINVAL, "CMD_BLOCK_STATUS payload not valid")


# --- Replies ------------------------------------------------------------------------------------------------


def simple_reply(cookie: int, error: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk_header(mode: Mode, request: Request, kind: int, payload_length: int, *, done: bool) -> bytes:
    """The header of one chunk. `mode` is STRUCTURED or EXTENDED: simple replies have no chunks."""
    flags = ReplyFlag.DONE if done else 0
    if mode is Mode.EXTENDED:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, payload_length)
    return STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, payload_length)


def success_reply(mode: Mode, request: Request) -> bytes:
    """The whole reply to a request that succeeded and returns no payload, which may be a READ of length 0."""
    if mode is Mode.EXTENDED or (mode is Mode.STRUCTURED and request.type == Cmd.READ):
        return chunk_header(mode, request, Chunk.NONE, 0, done=True)
    return simple_reply(request.cookie)


def error_reply(mode: Mode, request: Request, error: Errno, text: str = "") -> bytes:
    """The final reply to a request that failed. Simple replies have no room for the text."""
    if mode is Mode.SIMPLE:
        return simple_reply(request.cookie, error)
    message = cut(text, MAX_STRING)
    header = chunk_header(mode, request, Chunk.ERROR, ERROR.size + len(message), done=True)
    return header + ERROR.pack(error, len(message)) + message


def data_header(mode: Mode, request: Request, offset: int, length: int, *, done: bool) -> bytes:
    """What precedes `length` bytes of data read at `offset`. A simple reply has one piece: the whole READ."""
    if mode is Mode.SIMPLE:
        return simple_reply(request.cookie)
    payload_length = OFFSET.size + length
    return chunk_header(mode, request, Chunk.OFFSET_DATA, payload_length, done=done) + OFFSET.pack(offset)


def hole_chunk(mode: Mode, request: Request, offset: int, length: int, *, done: bool) -> bytes:
    return chunk_header(mode, request, Chunk.OFFSET_HOLE, HOLE.size, done=done) + HOLE.pack(offset, length)


def status_chunk(
    mode: Mode, request: Request, context: int, extents: Sequence[tuple[int, int]], *, done: bool
) -> bytes:
    """One context's answer to BLOCK_STATUS; `extents` are (length, status), at least one."""
    flat = itertools.chain.from_iterable(extents)
    count = len(extents)
    if mode is Mode.EXTENDED:
        payload = STATUS_EXT.pack(context, count) + struct.pack(f">{2 * count}Q", *flat)
        kind = Chunk.BLOCK_STATUS_EXT
    else:
        payload = STATUS.pack(context) + struct.pack(f">{2 * count}I", *flat)
        kind = Chunk.BLOCK_STATUS
    return chunk_header(mode, request, kind, len(payload), done=done) + payload


def merge_extents(extents: Iterable[tuple[int, int]], *, length: int, limit: int) -> list[tuple[int, int]]:
    """Join equal neighbours and stop after `limit` extents or `length` bytes: never more than was asked.

    `extents` is consumed no further than that, so it may be a generator over the whole export.
    """
    merged: list[tuple[int, int]] = []
    for extent_length, status in extents:
        piece = min(extent_length, length)
        length -= piece
        if merged and merged[-1][1] == status:
            merged[-1] = (merged[-1][0] + piece, status)
        elif len(merged) == limit:
            break
        elif piece:
            merged.append((piece, status))
        if not length:
            break
    return merged


def cut(text: str, limit: int) -> bytes:
    """`text` in UTF-8, at most `limit` bytes long and ending with a whole character."""
    data = text.encode(errors="replace")
    return data if len(data) <= limit else data[:limit].decode(errors="ignore").encode()


# --- Errors -------------------------------------------------------------------------------------------------

_ERRNO_OF_HOST: Final = {
    errno.EPERM: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.EIO: Errno.EIO,
    errno.ENOMEM: Errno.ENOMEM,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.EOVERFLOW: Errno.EOVERFLOW,
    errno.ENOTSUP: Errno.ENOTSUP,
    errno.EOPNOTSUPP: Errno.ENOTSUP,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
}


def wire_errno(host_errno: int) -> Errno:
    """The value the protocol has for this machine's `host_errno`; whatever it has none for is EINVAL."""
    return _ERRNO_OF_HOST.get(host_errno, Errno.EINVAL)


# For slow paths that fail with an Error instead of an errno. Total over ErrorKind; a test keeps it so.
ERRNO_OF_KIND: Final = {
    ErrorKind.NOT_FOUND: Errno.EINVAL,
    ErrorKind.EXISTS: Errno.EINVAL,
    ErrorKind.BUSY: Errno.EIO,
    ErrorKind.DENIED: Errno.EPERM,
    ErrorKind.INVALID_ARGUMENT: Errno.EINVAL,
    ErrorKind.UNSUPPORTED: Errno.ENOTSUP,
    ErrorKind.CORRUPT: Errno.EIO,
    ErrorKind.IO: Errno.EIO,
    ErrorKind.NO_SPACE: Errno.ENOSPC,
    ErrorKind.GONE: Errno.ESHUTDOWN,
    ErrorKind.UNKNOWN_COMMAND: Errno.EINVAL,
}
