"""The client's handshake over a non-blocking socket: which options are tried, and what they lead to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blkferry.errors import Error, ErrorKind
from blkferry.wire.nbd import client as wire
from blkferry.wire.nbd.constants import (
    MAX_REQUEST,
    ClientFlag,
    HandshakeFlag,
    Info,
    Mode,
    Opt,
    Rep,
    RepError,
    TransmissionFlag,
)
from blkferry.wire.nbd.transmission import ProtocolError

if TYPE_CHECKING:
    import socket

    from blkferry.plane.tls import TlsSocket

MAX_REPLIES: Final = 64
"""Replies to one option that are looked at: each kind of information that we ask for comes once."""

BASE_ALLOCATION: Final = "base:allocation"

_RECEIVE: Final = 1 << 16


@dataclass(slots=True)
class Session:
    """What was agreed. `context` is the id of what tells block status, if the server has it; sizes are bytes.

    `maximum` is the longest READ, WRITE or CACHE that the server takes.
    """

    sock: socket.socket | TlsSocket
    mode: Mode = Mode.SIMPLE
    size: int = 0
    flags: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    minimum: int = 1
    maximum: int = MAX_REQUEST
    context: int | None = None


class Haggling:
    """One handshake: `greet`, then `agree`, or between them `start_tls`, after which `sock` is to be replaced.

    Raises Error for what the server says, OSError for what the socket does. It has no time limit and closes nothing.
    """

    def __init__(self, sock: socket.socket | TlsSocket) -> None:
        self.sock = sock
        self._incoming = bytearray()

    async def greet(self) -> None:
        """Hear who the server is and answer."""
        while (offered := wire.take_greeting(self._incoming)) is None:
            await self._receive()
        if not offered & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the server does not offer the fixed newstyle handshake")
        taken = ClientFlag.FIXED_NEWSTYLE | (ClientFlag.NO_ZEROES if offered & HandshakeFlag.NO_ZEROES else 0)
        await self._send(wire.build_flags(taken))

    async def start_tls(self) -> None:
        """Have the server expect a TLS handshake next."""
        answer = (await self._option(Opt.STARTTLS))[-1]
        if answer.failed:
            text = answer.text or f"error {answer.kind:#x}"
            raise Error(ErrorKind.DENIED, f"Server rejected request to start TLS: {text}", hint="Leave out tls-creds?")
        if self._incoming:
            raise ProtocolError("the server went on without TLS after it had agreed to it")

    async def agree(self, export: str, context: str | None) -> Session:
        """Choose an export, with the best that the server offers for it.

        Block status is told by base:allocation, or by `context`, which the export must have then.
        """
        session = Session(self.sock)
        for option, mode in ((Opt.EXTENDED_HEADERS, Mode.EXTENDED), (Opt.STRUCTURED_REPLY, Mode.STRUCTURED)):
            answer = (await self._option(option))[-1]
            if answer.kind == RepError.TLS_REQD:
                text = f"TLS negotiation required before option {option} ({option.name.lower().replace('_', ' ')})"
                raise Error(ErrorKind.DENIED, text, hint="Did you forget a valid tls-creds?")
            if not answer.failed:
                session.mode = mode
                break
        if session.mode is not Mode.SIMPLE:
            wanted = context or BASE_ALLOCATION
            replies = await self._option(Opt.SET_META_CONTEXT, wire.build_queries(export, (wanted,)))
            for reply in replies[:-1]:
                number, name = wire.parse_meta_context(reply.payload)
                if name == wanted and not replies[-1].failed:
                    session.context = number
        await self._go(session, export)
        if context is not None and session.context is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"requested x-dirty-bitmap {context} not found")
        if self._incoming:
            raise ProtocolError("the server answers requests that it has not got")
        return session

    async def _go(self, session: Session, export: str) -> None:
        replies = await self._option(Opt.GO, wire.build_info(export, (Info.BLOCK_SIZE,)))
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

    async def _option(self, option: Opt, payload: bytes = b"") -> list[wire.OptionReply]:
        """The replies to an option; the last one is the acknowledgement or an error."""
        await self._send(wire.build_option(option, payload))
        replies: list[wire.OptionReply] = []
        while not replies or not (replies[-1].kind == Rep.ACK or replies[-1].failed):
            if len(replies) == MAX_REPLIES:
                raise ProtocolError(f"more than {MAX_REPLIES} replies to {option.name}")
            while (reply := wire.take_option_reply(self._incoming)) is None:
                await self._receive()
            if reply.option != option:
                raise ProtocolError(f"reply to option {reply.option} where {option.name} was sent")
            replies.append(reply)
        return replies

    # The socket -------------------------------------------------------------------------------------------------

    async def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                await self._until(writable=True)

    async def _receive(self) -> None:
        while True:  # with TLS there may be more than the loop knows of, so ask before waiting
            try:
                data = self.sock.recv(_RECEIVE)
                break
            except BlockingIOError:
                await self._until(writable=False)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._incoming += data

    async def _until(self, *, writable: bool) -> None:
        loop = asyncio.get_running_loop()
        add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        ready = asyncio.Event()
        add(self.sock.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            remove(self.sock.fileno())
