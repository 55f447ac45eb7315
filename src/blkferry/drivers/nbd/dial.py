"""Reaching an NBD server: the connection and the handshake, up to the first request. Blocking: call it in a thread."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field

from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix, SocketAddressVsock
from blkferry.wire.nbd import client as wire
from blkferry.wire.nbd.constants import (
    MAX_REQUEST,
    ClientFlag,
    HandshakeFlag,
    Info,
    Mode,
    Opt,
    Rep,
    TransmissionFlag,
)
from blkferry.wire.nbd.transmission import ProtocolError

HANDSHAKE_SECONDS = 30.0
"""How long a server may take from the connection to the end of the handshake."""

MAX_REPLIES = 64
"""Replies to one option that are looked at: each kind of information that we ask for comes once."""

BASE_ALLOCATION = "base:allocation"


@dataclass(slots=True)
class Session:
    """What was agreed. `context` is the id of base:allocation if the server has it; sizes are bytes.

    `maximum` is the longest READ, WRITE or CACHE that the server takes; `rest` what it has sent already.
    """

    sock: socket.socket
    mode: Mode = Mode.SIMPLE
    size: int = 0
    flags: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    minimum: int = 1
    maximum: int = MAX_REQUEST
    context: int | None = None
    rest: bytearray = field(default_factory=bytearray)


def dial(address: SocketAddress, export: str) -> Session:
    """Connect, and haggle for the best that the server offers. Raises Error."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    try:
        sock = _connect(address)
    except OSError as error:
        doing = f"Failed to connect to '{shown(address)}'"
        raise Error.from_oserror(doing, OSError(error.errno, error.strerror or str(error))) from error
    try:
        session = _Haggling(sock, deadline).agree(export)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise Error(ErrorKind.IO, f"Failed to read initial magic or option reply: {error}") from error
    except BaseException:
        sock.close()
        raise
    return session


def shown(address: SocketAddress) -> str:
    """The address as error texts show it."""
    match address:
        case SocketAddressInet():
            return f"{address.host}:{address.port}"
        case SocketAddressUnix():
            return address.path
        case SocketAddressVsock():
            return f"vsock:{address.cid}:{address.port}"
    return address.type


def _connect(address: SocketAddress) -> socket.socket:
    match address:
        case SocketAddressInet():
            sock = socket.create_connection((address.host or "localhost", address.port), HANDSHAKE_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.keep_alive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        case SocketAddressUnix():
            if address.abstract:
                name = b"\0" + os.fsencode(address.path)
                return _open(socket.AF_UNIX, name if address.tight else name.ljust(108, b"\0"))
            return _open(socket.AF_UNIX, address.path)
        case SocketAddressVsock() if address.cid.isdecimal() and address.port.isdecimal():
            return _open(socket.AF_VSOCK, (int(address.cid), int(address.port)))
    raise Error(ErrorKind.INVALID_ARGUMENT, f"Cannot connect to a socket address of type '{address.type}'")


def _open(family: socket.AddressFamily, where: str | bytes | tuple[int, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(HANDSHAKE_SECONDS)
        sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


class _Haggling:
    """One handshake on a blocking socket; what takes longer than until `deadline` fails."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.incoming = bytearray()

    def agree(self, export: str) -> Session:
        session = Session(self.sock, rest=self.incoming)
        while (offered := wire.take_greeting(self.incoming)) is None:
            self._receive()
        if not offered & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the server does not offer the fixed newstyle handshake")
        taken = ClientFlag.FIXED_NEWSTYLE | (ClientFlag.NO_ZEROES if offered & HandshakeFlag.NO_ZEROES else 0)
        self.sock.sendall(wire.build_flags(taken))
        for option, mode in ((Opt.EXTENDED_HEADERS, Mode.EXTENDED), (Opt.STRUCTURED_REPLY, Mode.STRUCTURED)):
            if not self._option(option)[-1].failed:
                session.mode = mode
                break
        if session.mode is not Mode.SIMPLE:
            replies = self._option(Opt.SET_META_CONTEXT, wire.build_queries(export, (BASE_ALLOCATION,)))
            for reply in replies[:-1]:
                number, name = wire.parse_meta_context(reply.payload)
                if name == BASE_ALLOCATION and not replies[-1].failed:
                    session.context = number
        self._go(session, export)
        return session

    def _go(self, session: Session, export: str) -> None:
        replies = self._option(Opt.GO, wire.build_info(export, (Info.BLOCK_SIZE,)))
        if replies[-1].failed:
            text = replies[-1].text or f"error {replies[-1].kind:#x}"
            raise Error(ErrorKind.NOT_FOUND, f"Requested export not available: {text}", export=export)
        told = False
        for reply in replies[:-1]:
            match wire.parse_info(reply.payload):
                case wire.ExportSize(size, flags):
                    session.size, session.flags, told = size, flags, True
                case wire.BlockSize(minimum, _, maximum):
                    session.minimum = minimum
                    session.maximum = min(maximum, MAX_REQUEST) // minimum * minimum
        if not told:
            raise ProtocolError("the server did not tell the size of the export")
        if session.size >= 1 << 63 or not session.maximum:
            raise ProtocolError(f"an export of {session.size} bytes in blocks of {session.minimum} is too large")

    def _option(self, option: Opt, payload: bytes = b"") -> list[wire.OptionReply]:
        self.sock.sendall(wire.build_option(option, payload))
        replies: list[wire.OptionReply] = []
        while not replies or not (replies[-1].kind == Rep.ACK or replies[-1].failed):
            if len(replies) == MAX_REPLIES:
                raise ProtocolError(f"more than {MAX_REPLIES} replies to {option.name}")
            while (reply := wire.take_option_reply(self.incoming)) is None:
                self._receive()
            if reply.option != option:
                raise ProtocolError(f"reply to option {reply.option} where {option.name} was sent")
            replies.append(reply)
        return replies

    def _receive(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the handshake took longer than {HANDSHAKE_SECONDS:.0f} seconds")
        self.sock.settimeout(left)
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self.incoming += data
