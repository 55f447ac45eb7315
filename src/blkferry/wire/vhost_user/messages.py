"""Headers and payloads: what each message carries, how many descriptors come with it, and whether it is answered.

`FORMS` is the whole protocol in one table; `Receiver` reads a stream by it. What is not in the table, or does not have
its form, is a ProtocolError, which costs the peer its connection. What a well-formed message means, and whether its
numbers make sense for a device, is not known here.

All numbers are in the machine's own byte order ("Message Specification").
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from blkferry.errors import Error, ErrorKind
from blkferry.wire.vhost_user.constants import (
    MAX_FDS,
    MAX_PAYLOAD,
    MAX_TABLE_REGIONS,
    MAX_VRINGS,
    VERSION,
    BackendRequest,
    HeaderFlag,
    Request,
    VringFlag,
)

END: Final = 1 << 64
"""Addresses are below this."""

HEADER: Final = struct.Struct("=III")
NUMBER: Final = struct.Struct("=Q")
STATE: Final = struct.Struct("=II")
ADDRESSES: Final = struct.Struct("=IIQQQQ")
REGION: Final = struct.Struct("=QQQQ")
TABLE: Final = struct.Struct("=II")
SINGLE: Final = struct.Struct("=QQQQQ")  # padding first
LOG: Final = struct.Struct("=QQ")
CONFIG: Final = struct.Struct("=III")
INFLIGHT: Final = struct.Struct("=QQHH")
INFLIGHT_PADDED: Final = INFLIGHT.size + 4  # as compilers have it; the specification has 20 bytes
NO_FD: Final = 1 << 8


class ProtocolError(Error):
    """The peer sent what no vhost-user front end may send: its connection must end."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.CORRUPT, message)


class Header(NamedTuple):
    """What each message begins with; `size` is the payload's, in bytes."""

    request: int
    flags: int
    size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises ProtocolError for what is not the header of a request."""
        header = cls(*HEADER.unpack(data))
        if header.flags & HeaderFlag.VERSION_MASK != VERSION:
            raise ProtocolError(f"a message has version {header.flags & HeaderFlag.VERSION_MASK} instead of {VERSION}")
        if header.flags & HeaderFlag.REPLY:
            raise ProtocolError(f"a message ({header.request}) is a reply, which nobody asked for")
        if header.size > MAX_PAYLOAD:
            raise ProtocolError(f"a message ({header.request}) announces {header.size} bytes, above {MAX_PAYLOAD}")
        return header

    def build(self) -> bytes:
        return HEADER.pack(*self)


class U64(NamedTuple):
    """A single 64-bit integer."""

    value: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*NUMBER.unpack(data))

    def build(self) -> bytes:
        return NUMBER.pack(*self)


class VringFd(NamedTuple):
    """The u64 of SET_VRING_KICK, _CALL and _ERR: which vring, and whether a descriptor comes with it."""

    vring: int
    has_fd: bool

    @classmethod
    def parse(cls, data: bytes) -> Self:
        (value,) = NUMBER.unpack(data)
        if value & ~(NO_FD | (MAX_VRINGS - 1)):
            raise ProtocolError(f"{value:#x} is no vring's index and flag")
        return cls(value & (MAX_VRINGS - 1), not value & NO_FD)

    def build(self) -> bytes:
        return NUMBER.pack(self.vring | (0 if self.has_fd else NO_FD))


class VringState(NamedTuple):
    """A vring state description: the number is a size, an index or a switch, as the message has it."""

    vring: int
    num: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*STATE.unpack(data))

    def build(self) -> bytes:
        return STATE.pack(*self)


class VringAddr(NamedTuple):
    """A vring address description: user addresses, and the guest address under which the used ring is logged."""

    vring: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        found = cls(*ADDRESSES.unpack(data))
        if found.flags & ~int(VringFlag.LOG):
            raise ProtocolError(f"vring {found.vring} has flags {found.flags:#x}")
        return found

    def build(self) -> bytes:
        return ADDRESSES.pack(*self)


class MemoryRegion(NamedTuple):
    """One region: where the guest has it, where the front end has it, and where it is in its descriptor. In bytes."""

    guest_start: int
    length: int
    user_start: int
    mmap_offset: int

    def check(self) -> Self:
        """Raises ProtocolError when it is empty, or ends beyond what an address can say."""
        if not self.length:
            raise ProtocolError(f"the memory region at {self.guest_start:#x} is empty")
        if max(self.guest_start, self.user_start, self.mmap_offset) + self.length > END:
            raise ProtocolError(f"the memory region at {self.guest_start:#x} of {self.length:#x} bytes overflows")
        return self


class MemoryTable(NamedTuple):
    """Memory regions description: all regions there are. One descriptor comes for each."""

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < TABLE.size:
            raise ProtocolError(f"a memory table has {len(data)} bytes")
        count, _padding = TABLE.unpack_from(data)
        if count > MAX_TABLE_REGIONS:
            raise ProtocolError(f"a memory table has {count} regions, more than {MAX_TABLE_REGIONS}")
        size = REGION.size
        if len(data) != TABLE.size + count * size:
            raise ProtocolError(f"a memory table of {count} regions has {len(data)} bytes")
        rest = data[TABLE.size :]
        return cls(tuple(MemoryRegion(*fields).check() for fields in REGION.iter_unpack(rest)))

    def build(self) -> bytes:
        regions = b"".join(REGION.pack(*region) for region in self.regions)
        return TABLE.pack(len(self.regions), 0) + regions


class SingleRegion(NamedTuple):
    """Single memory region description."""

    region: MemoryRegion

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _padding, *fields = SINGLE.unpack(data)
        return cls(MemoryRegion(*fields).check())

    def build(self) -> bytes:
        return SINGLE.pack(0, *self.region)


class Log(NamedTuple):
    """Log description: bytes of the log, and where it begins in its descriptor."""

    size: int
    offset: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        found = cls(*LOG.unpack(data))
        if found.size + found.offset > END:
            raise ProtocolError(f"a log of {found.size:#x} bytes at {found.offset:#x} overflows")
        return found

    def build(self) -> bytes:
        return LOG.pack(*self)


class Config(NamedTuple):
    """Virtio device config space: a part of it. `data` is as long as that part, also in a request to read it."""

    offset: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < CONFIG.size:
            raise ProtocolError(f"a request about the configuration space has {len(data)} bytes")
        offset, size, flags = CONFIG.unpack_from(data)
        if len(data) != CONFIG.size + size:
            raise ProtocolError(f"{len(data) - CONFIG.size} bytes come for {size} of the configuration space")
        return cls(offset, flags, data[CONFIG.size :])

    def build(self) -> bytes:
        return CONFIG.pack(self.offset, len(self.data), self.flags) + self.data


class Inflight(NamedTuple):
    """Inflight description: the shared buffer that remembers what is in flight, and for how many rings of what size."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) not in {INFLIGHT.size, INFLIGHT_PADDED}:
            raise ProtocolError(f"a description of what is in flight has {len(data)} bytes")
        found = cls(*INFLIGHT.unpack_from(data))
        if found.mmap_size + found.mmap_offset > END:
            raise ProtocolError(f"a buffer of {found.mmap_size:#x} bytes at {found.mmap_offset:#x} overflows")
        return found

    def build(self) -> bytes:
        return INFLIGHT.pack(*self).ljust(INFLIGHT_PADDED, b"\0")


Payload = U64 | VringFd | VringState | VringAddr | MemoryTable | SingleRegion | Log | Config | Inflight | None


class Answer(enum.Enum):
    """How a request is answered."""

    VALUE = enum.auto()
    """With what it asked for, always."""
    ACK = enum.auto()
    """With a u64, 0 for success, if the front end wants that (REPLY_ACK)."""


class Form(NamedTuple):
    """What a message looks like: its payload, how few and how many descriptors come with it, and its answer.

    Where the payload itself says how many come (`MemoryTable`, `VringFd`), it must be that many.
    """

    payload: (
        type[U64 | VringFd | VringState | VringAddr | MemoryTable | SingleRegion | Log | Config | Inflight] | None
    ) = None
    fewest: int = 0
    most: int = 0
    answer: Answer = Answer.ACK


FORMS: Final = {
    Request.GET_FEATURES: Form(answer=Answer.VALUE),
    Request.SET_FEATURES: Form(U64),
    Request.SET_OWNER: Form(),
    Request.RESET_OWNER: Form(),
    Request.SET_MEM_TABLE: Form(MemoryTable, 0, MAX_FDS),
    Request.SET_LOG_BASE: Form(Log, 1, 1, Answer.VALUE),
    Request.SET_LOG_FD: Form(None, 1, 1),
    Request.SET_VRING_NUM: Form(VringState),
    Request.SET_VRING_ADDR: Form(VringAddr),
    Request.SET_VRING_BASE: Form(VringState),
    Request.GET_VRING_BASE: Form(VringState, answer=Answer.VALUE),
    Request.SET_VRING_KICK: Form(VringFd, 0, 1),
    Request.SET_VRING_CALL: Form(VringFd, 0, 1),
    Request.SET_VRING_ERR: Form(VringFd, 0, 1),
    Request.GET_PROTOCOL_FEATURES: Form(answer=Answer.VALUE),
    Request.SET_PROTOCOL_FEATURES: Form(U64),
    Request.GET_QUEUE_NUM: Form(answer=Answer.VALUE),
    Request.SET_VRING_ENABLE: Form(VringState),
    Request.SET_BACKEND_REQ_FD: Form(None, 1, 1),
    Request.GET_CONFIG: Form(Config, answer=Answer.VALUE),
    Request.SET_CONFIG: Form(Config),
    Request.GET_INFLIGHT_FD: Form(Inflight, answer=Answer.VALUE),
    Request.SET_INFLIGHT_FD: Form(Inflight, 1, 1),
    Request.RESET_DEVICE: Form(),
    Request.GET_MAX_MEM_SLOTS: Form(answer=Answer.VALUE),
    Request.ADD_MEM_REG: Form(SingleRegion, 1, 1),
    Request.REM_MEM_REG: Form(SingleRegion, 0, 1),  # "the back-end MAY accept messages with one file descriptor"
    Request.SET_STATUS: Form(U64),
    Request.GET_STATUS: Form(answer=Answer.VALUE),
}


@dataclass(frozen=True, slots=True)
class Message:
    """A request that is whole and has its form. Its descriptors are the receiver's to close."""

    request: Request
    payload: Payload
    fds: tuple[int, ...]
    need_reply: bool


class Receiver:
    """Cuts a stream into messages. The caller receives `wanted` bytes at most each time: descriptors come with the
    bytes of their message, and must not get to another's.

    `fds` are those of the message that is not whole yet, which the caller closes if there will be no more.
    """

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._data = b""
        self._header: Header | None = None

    @property
    def wanted(self) -> int:
        """How many bytes are missing before anything can be said; never 0."""
        return (self._header.size if self._header is not None else HEADER.size) - len(self._data)

    @property
    def empty(self) -> bool:
        """Whether it is between two messages."""
        return self._header is None and not self._data

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take what was received, and return the message that it completes. Raises ProtocolError."""
        self._data += data
        self.fds += fds
        if len(self.fds) > MAX_FDS:
            raise ProtocolError(f"{len(self.fds)} descriptors come with one message")
        if self.wanted:
            return None
        if self._header is None:
            self._header = Header.parse(self._data)
            self._data = b""
            if self._header.size:
                return None
        header, payload = self._header, self._data
        message = _message(header, payload, tuple(self.fds))
        self._header, self._data, self.fds = None, b"", []
        return message


def _message(header: Header, data: bytes, fds: tuple[int, ...]) -> Message:
    form = FORMS.get(header.request)  # type: ignore[call-overload]
    if form is None:
        raise ProtocolError(f"request {header.request} is unknown")
    request = Request(header.request)
    payload = _payload(request, form, data)
    fewest, most = form.fewest, form.most
    match payload:
        case MemoryTable(regions):
            fewest = most = len(regions)
        case VringFd(_, has_fd):
            fewest = most = int(has_fd)
    if not fewest <= len(fds) <= most:
        raise ProtocolError(f"{len(fds)} descriptors come with {request.name}")
    return Message(request, payload, fds, bool(header.flags & HeaderFlag.NEED_REPLY))


def _payload(request: Request, form: Form, data: bytes) -> Payload:
    if form.payload is None:
        if data:
            raise ProtocolError(f"{request.name} has {len(data)} bytes of payload instead of none")
        return None
    try:
        return form.payload.parse(data)
    except struct.error:
        raise ProtocolError(f"{request.name} has {len(data)} bytes of payload") from None


def build(message: Request, payload: Payload = None, *, need_reply: bool = False) -> bytes:
    """A request, as front ends send it."""
    data = b"" if payload is None else payload.build()
    flags = VERSION | (HeaderFlag.NEED_REPLY if need_reply else 0)
    return Header(message, flags, len(data)).build() + data


def build_reply(request: Request, payload: Payload = None) -> bytes:
    """An answer."""
    data = b"" if payload is None else payload.build()
    return Header(request, VERSION | HeaderFlag.REPLY, len(data)).build() + data


def build_backend_request(request: BackendRequest) -> bytes:
    """A request of ours that has no payload and wants no reply."""
    return Header(request, VERSION, 0).build()
