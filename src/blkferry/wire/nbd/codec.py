"""Requests and replies for the hot loop: the same bytes as `transmission`, eight at a time.

Magic, flags and type stand side by side at the head of a request and of a reply, so that one comparison, or one number
to pack, does for all three. Cookies stay bytes: they are only handed back. A property test shows that this agrees with
`transmission`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from blkferry.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Mode,
    ReplyFlag,
)
from blkferry.wire.nbd.transmission import Request

_COMPACT: Final = struct.Struct(">Q8sQI")  # head, cookie, offset, length
_EXTENDED: Final = struct.Struct(">Q8sQQ")
_SIMPLE_DATA: Final = struct.Struct(">Q8s")  # prefix, cookie
_STRUCTURED_DATA: Final = struct.Struct(">Q8sIQ")  # prefix, cookie, payload length, offset of the data
_EXTENDED_DATA: Final = struct.Struct(">Q8sQQQ")  # prefix, cookie, request offset, payload length, offset of the data
_EXTENDED_DONE: Final = struct.Struct(">Q8sQQ")  # prefix, cookie, request offset, payload length


def _head(magic: int, flags: int, kind: int) -> int:
    return magic << 32 | flags << 16 | kind


_SIMPLE_PREFIX: Final = _head(SIMPLE_REPLY_MAGIC, 0, 0)
_EXTENDED_NONE: Final = _head(EXTENDED_REPLY_MAGIC, ReplyFlag.DONE, Chunk.NONE)
_NEVER: Final = -1


class Fast(NamedTuple):
    """What the hot loop needs to know about a mode."""

    read_head: int
    read_df_head: int
    write_head: int
    unpack: Callable[..., tuple[Any, ...]]  # head, cookie (bytes), offset, length
    header: int
    data_prefix: int
    pack_data: Callable[..., None]
    data_header: int


FAST: Final = {
    Mode.SIMPLE: Fast(
        _head(REQUEST_MAGIC, 0, Cmd.READ),
        _NEVER,
        _head(REQUEST_MAGIC, 0, Cmd.WRITE),
        _COMPACT.unpack_from,
        _COMPACT.size,
        _SIMPLE_PREFIX,
        _SIMPLE_DATA.pack_into,
        _SIMPLE_DATA.size,
    ),
    Mode.STRUCTURED: Fast(
        _head(REQUEST_MAGIC, 0, Cmd.READ),
        _head(REQUEST_MAGIC, CmdFlag.DF, Cmd.READ),
        _head(REQUEST_MAGIC, 0, Cmd.WRITE),
        _COMPACT.unpack_from,
        _COMPACT.size,
        _head(STRUCTURED_REPLY_MAGIC, ReplyFlag.DONE, Chunk.OFFSET_DATA),
        _STRUCTURED_DATA.pack_into,
        _STRUCTURED_DATA.size,
    ),
    Mode.EXTENDED: Fast(
        _head(EXTENDED_REQUEST_MAGIC, 0, Cmd.READ),
        _head(EXTENDED_REQUEST_MAGIC, CmdFlag.DF, Cmd.READ),
        _head(EXTENDED_REQUEST_MAGIC, CmdFlag.PAYLOAD_LEN, Cmd.WRITE),
        _EXTENDED.unpack_from,
        _EXTENDED.size,
        _head(EXTENDED_REPLY_MAGIC, ReplyFlag.DONE, Chunk.OFFSET_DATA),
        _EXTENDED_DATA.pack_into,
        _EXTENDED_DATA.size,
    ),
}


def is_request(mode: Mode, head: int) -> bool:
    """Whether a head begins with the magic of the mode's requests."""
    return head >> 32 == FAST[mode].read_head >> 32


def request(head: int, cookie: bytes, offset: int, length: int) -> Request:
    """The request that a head and what follows it say, for everybody but the hot loop."""
    return Request(head >> 16 & 0xFFFF, head & 0xFFFF, int.from_bytes(cookie, "big"), offset, length)


def head(mode: Mode, request: Request) -> int:
    """What a request begins with."""
    return FAST[mode].read_head | request.flags << 16 | request.type


def data_reply(mode: Mode, cookie: bytes, offset: int, length: int) -> bytearray:
    """The whole reply to a read, its `length` bytes at the end still to be filled in."""
    header = FAST[mode].data_header
    reply = bytearray(header + length)
    if mode is Mode.SIMPLE:
        _SIMPLE_DATA.pack_into(reply, 0, _SIMPLE_PREFIX, cookie)
    elif mode is Mode.STRUCTURED:
        _STRUCTURED_DATA.pack_into(reply, 0, FAST[mode].data_prefix, cookie, length + 8, offset)
    else:
        _EXTENDED_DATA.pack_into(reply, 0, FAST[mode].data_prefix, cookie, offset, length + 8, offset)
    return reply


def write_reply(mode: Mode, cookie: bytes, offset: int) -> bytes:
    """The whole reply to a write that succeeded."""
    if mode == Mode.EXTENDED:
        return _EXTENDED_DONE.pack(_EXTENDED_NONE, cookie, offset, 0)
    return _SIMPLE_DATA.pack(_SIMPLE_PREFIX, cookie)
