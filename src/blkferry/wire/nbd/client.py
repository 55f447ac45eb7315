"""The client's side of the NBD handshake: options to send, and the replies they get.

It keeps no state and takes no decisions: which options to send, and what an answer means, is the caller's.
The `take_` functions remove one message from the front of a buffer, or return None until it is there whole.

Invariants: whatever a server sends, only `ProtocolError` is raised, and a message is refused by its header
when it is longer than any that this side can have asked for.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from blkferry.wire.nbd.constants import (
    INIT_MAGIC,
    MAX_OPTION_REPLY,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REP_ERROR_BIT,
    HandshakeFlag,
    Info,
    TransmissionFlag,
)
from blkferry.wire.nbd.options import (
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_COUNT,
    INFO_EXPORT,
    INFO_KIND,
    OPTION,
    OPTION_REPLY,
    QUERY_COUNT,
    STRING_LENGTH,
)
from blkferry.wire.nbd.transmission import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

# --- What to send ---------------------------------------------------------------------------------------


def build_flags(flags: int) -> bytes:
    return CLIENT_FLAGS.pack(flags)


def build_option(option: int, payload: bytes = b"") -> bytes:
    return OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def build_info(name: str, kinds: Iterable[int] = ()) -> bytes:
    """The payload of INFO and GO."""
    wanted = list(kinds)
    return _counted(name) + INFO_COUNT.pack(len(wanted)) + struct.pack(f">{len(wanted)}H", *wanted)


def build_queries(name: str, queries: Iterable[str] = ()) -> bytes:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    texts = [_counted(query) for query in queries]
    return _counted(name) + QUERY_COUNT.pack(len(texts)) + b"".join(texts)


def _counted(text: str) -> bytes:
    data = text.encode()
    return STRING_LENGTH.pack(len(data)) + data


# --- What comes back ------------------------------------------------------------------------------------


class OptionReply(NamedTuple):
    """One reply to one option; `kind` is a `Rep`, a `RepError`, or something this client does not know."""

    option: int
    kind: int
    payload: bytes

    @property
    def failed(self) -> bool:
        return bool(self.kind & REP_ERROR_BIT)

    @property
    def text(self) -> str:
        """What an error reply says. Only for people, so bytes that are not UTF-8 are replaced."""
        return self.payload.decode(errors="replace")


class ExportSize(NamedTuple):
    size: int
    flags: TransmissionFlag


class BlockSize(NamedTuple):
    minimum: int
    preferred: int
    maximum: int


class InfoText(NamedTuple):
    """The export's canonical NAME, or its DESCRIPTION."""

    kind: Info
    text: str


def take_greeting(buffer: bytearray) -> HandshakeFlag | None:
    if len(buffer) < GREETING.size:
        return None
    magic, option_magic, flags = GREETING.unpack_from(buffer)
    if magic != INIT_MAGIC:
        raise ProtocolError(f"greeting magic is {magic:#018x}: this is not an NBD server")
    if option_magic != OPTION_MAGIC:
        raise ProtocolError(f"option magic is {option_magic:#018x}: only newstyle servers are supported")
    del buffer[: GREETING.size]
    return HandshakeFlag(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))


def take_option_reply(buffer: bytearray) -> OptionReply | None:
    if len(buffer) < OPTION_REPLY.size:
        return None
    magic, option, kind, length = OPTION_REPLY.unpack_from(buffer)
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"option reply magic is {magic:#018x} instead of {OPTION_REPLY_MAGIC:#018x}")
    if length > MAX_OPTION_REPLY:
        raise ProtocolError(f"option reply of {length} bytes, at most {MAX_OPTION_REPLY} are possible")
    end = OPTION_REPLY.size + length
    if len(buffer) < end:
        return None
    reply = OptionReply(option, kind, bytes(buffer[OPTION_REPLY.size : end]))
    del buffer[:end]
    return reply


def take_export_name_reply(buffer: bytearray, *, no_zeroes: bool) -> ExportSize | None:
    """The answer to EXPORT_NAME, which is not an option reply. A server that refuses closes instead."""
    end = EXPORT_NAME_REPLY.size + (0 if no_zeroes else EXPORT_NAME_PADDING)
    if len(buffer) < end:
        return None
    size, flags = EXPORT_NAME_REPLY.unpack_from(buffer)
    del buffer[:end]
    return ExportSize(size, TransmissionFlag(flags))


def parse_server(payload: bytes) -> tuple[str, str]:
    """Name and description out of a SERVER reply."""
    if len(payload) < STRING_LENGTH.size:
        raise ProtocolError(f"SERVER reply of {len(payload)} bytes has no name length")
    (length,) = STRING_LENGTH.unpack_from(payload)
    end = STRING_LENGTH.size + length
    if end > len(payload):
        raise ProtocolError(f"SERVER reply of {len(payload)} bytes cannot hold a name of {length}")
    return _text(payload[STRING_LENGTH.size : end]), _text(payload[end:])


def parse_info(payload: bytes) -> ExportSize | BlockSize | InfoText | None:
    """One INFO reply. None for a kind this client does not know: the specification wants it ignored."""
    if len(payload) < INFO_KIND.size:
        raise ProtocolError(f"INFO reply of {len(payload)} bytes has no kind")
    (kind,) = INFO_KIND.unpack_from(payload)
    if kind == Info.EXPORT:
        if len(payload) != INFO_EXPORT.size:
            raise ProtocolError(f"INFO_EXPORT of {len(payload)} bytes instead of {INFO_EXPORT.size}")
        _, size, flags = INFO_EXPORT.unpack(payload)
        return ExportSize(size, TransmissionFlag(flags))
    if kind == Info.BLOCK_SIZE:
        if len(payload) != INFO_BLOCK_SIZE.size:
            raise ProtocolError(f"INFO_BLOCK_SIZE of {len(payload)} bytes instead of {INFO_BLOCK_SIZE.size}")
        sizes = BlockSize(*INFO_BLOCK_SIZE.unpack(payload)[1:])
        if sizes.minimum.bit_count() != 1 or sizes.preferred.bit_count() != 1:
            raise ProtocolError(f"block sizes {sizes.minimum} and {sizes.preferred} must be powers of two")
        if not sizes.minimum <= sizes.preferred <= sizes.maximum:
            raise ProtocolError(f"block sizes {tuple(sizes)} must not decrease")
        return sizes
    if kind in {Info.NAME, Info.DESCRIPTION}:
        return InfoText(Info(kind), _text(payload[INFO_KIND.size :]))
    return None


def parse_meta_context(payload: bytes) -> tuple[int, str]:
    """Id and name out of a META_CONTEXT reply."""
    if len(payload) < CONTEXT_ID.size:
        raise ProtocolError(f"META_CONTEXT reply of {len(payload)} bytes has no id")
    (context_id,) = CONTEXT_ID.unpack_from(payload)
    return context_id, _text(payload[CONTEXT_ID.size :])


def _text(data: bytes) -> str:
    if len(data) > MAX_STRING:
        raise ProtocolError(f"string of {len(data)} bytes, at most {MAX_STRING} are allowed")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"string {data[:32]!r} is not valid UTF-8") from None
