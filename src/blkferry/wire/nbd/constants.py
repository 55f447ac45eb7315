"""The numbers of the NBD protocol: options, replies, flags, commands, magics, and our own limits.

Names are the specification's, without their NBD_ prefixes. This module knows no layouts and no behaviour.
Values that arrive on the wire may be outside these enums: compare, do not convert, what a peer sent.
"""

from __future__ import annotations

import enum
from typing import Final

# Handshake.
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

# Transmission.
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C


class Mode(enum.IntEnum):
    """Which headers the transmission phase uses. Ordered: each mode can do what the one before it can."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class HandshakeFlag(enum.IntFlag):
    """What the server's greeting offers (16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """What the client takes of it (32 bits). Any other bit ends the connection."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """What an export can do (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STAT_PAYLOAD = 1 << 12


class Opt(enum.IntEnum):
    """Options a client may send while haggling. 4 was PEEK_EXPORT, withdrawn."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(enum.IntEnum):
    """Replies to an option that are not errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4


REP_ERROR_BIT: Final = 1 << 31


class RepError(enum.IntEnum):
    """Replies to an option that refuse it; the payload is a text for people."""

    UNSUP = REP_ERROR_BIT + 1
    POLICY = REP_ERROR_BIT + 2
    INVALID = REP_ERROR_BIT + 3
    PLATFORM = REP_ERROR_BIT + 4
    TLS_REQD = REP_ERROR_BIT + 5
    UNKNOWN = REP_ERROR_BIT + 6
    SHUTDOWN = REP_ERROR_BIT + 7
    BLOCK_SIZE_REQD = REP_ERROR_BIT + 8
    TOO_BIG = REP_ERROR_BIT + 9
    EXT_HEADER_REQD = REP_ERROR_BIT + 10


class Info(enum.IntEnum):
    """Kinds of information in a REP_INFO reply, and what a client may ask for with INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Cmd(enum.IntEnum):
    """Request types of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(enum.IntFlag):
    """Request flags (16 bits). transmission.VALID_FLAGS says which a command accepts."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(enum.IntFlag):
    """Flags of a reply chunk (16 bits)."""

    DONE = 1 << 0


CHUNK_ERROR_BIT: Final = 1 << 15


class Chunk(enum.IntEnum):
    """Types of reply chunks, the same in structured and extended mode."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR_BIT + 1
    ERROR_OFFSET = CHUNK_ERROR_BIT + 2


class Errno(enum.IntEnum):
    """The only error values allowed on the wire; they do not depend on the platform."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class StatusFlag(enum.IntFlag):
    """Status bits of the base:allocation context."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class DirtyFlag(enum.IntFlag):
    """Status bits of the qemu:dirty-bitmap contexts."""

    DIRTY = 1 << 0


# Context ids: part of the wire contract with clients that expect the daemon we stand in for.
CONTEXT_BASE_ALLOCATION: Final = 0
CONTEXT_ALLOCATION_DEPTH: Final = 1
CONTEXT_DIRTY_BITMAP: Final = 2  # plus the bitmap's index in the export's list

# The specification's bound for names, descriptions, queries and error texts, in bytes.
MAX_STRING: Final = 4096

# READ, WRITE and CACHE: what every client may count on, and what one request may make us buffer.
MAX_REQUEST: Final = 32 * 1024 * 1024

# An option that claims more than this is an attack or a stream out of step: the connection ends.
MAX_OPTION: Final = 32 * 1024 * 1024

# The longest INFO or GO that can be well-formed: a name and as many requests as their 16-bit count can say.
MAX_INFO_OPTION: Final = 4 + MAX_STRING + 2 + 2 * 0xFFFF

# The longest LIST_META_CONTEXT or SET_META_CONTEXT that is read rather than skipped. The client is not
# authenticated and there may be a hundred of it, so each gets room for some 240 queries of the longest
# bitmap names (1023 bytes), not for 32 MiB.
MAX_META_OPTION: Final = 256 * 1024

# One payload of a reply we read as a client: the largest READ with its offset, or the 2**20 extents of 16
# bytes that the specification lets a server put into one status chunk, whichever is more.
MAX_REPLY_PAYLOAD: Final = MAX_REQUEST + 8

# One option reply we read as a client: name and description of an export, at the longest.
MAX_OPTION_REPLY: Final = 4 + 2 * MAX_STRING
