"""Messages: what payload each has, how many descriptors come with it, and whether it is answered.

`FORMS` is the whole protocol in one table; `Receiver` reads a stream by it. What is not in the table, or does not have
its form, is a ProtocolError, which costs the peer its connection. What a well-formed message means, and whether its
numbers make sense for a device, is not known here.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from blkferry.wire.vhost_user.constants import MAX_FDS, MAX_PAYLOAD, VERSION, BackendRequest, HeaderFlag, Request
from blkferry.wire.vhost_user.payloads import (
    U64,
    Config,
    Inflight,
    Log,
    MemoryTable,
    Payload,
    ProtocolError,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)

HEADER: Final = struct.Struct("=III")


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
