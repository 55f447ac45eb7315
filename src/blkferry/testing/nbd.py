"""A scripted NBD client on a blocking API: every option, command and flag is the caller's choice, also wrong ones.

Requests are queued by `submit` and leave together, so a test decides what arrives in one piece. While it sends, the
client takes replies: it never dead-locks with a server that stops reading until its replies are taken. It checks the
form of everything it receives (`wire.nbd.replies`) and nothing of what the server should have meant.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from blkferry.wire.nbd import client as wire
from blkferry.wire.nbd.constants import ClientFlag, Cmd, CmdFlag, Info, Mode, Opt, Rep
from blkferry.wire.nbd.replies import Content, Data, Failure, Replies, Status
from blkferry.wire.nbd.transmission import ProtocolError, Request

TIMEOUT = 20.0
"""Seconds after which a silent server is a failed test."""

_RECEIVE = 1 << 20
_POLL_IN, _POLL_OUT = select.POLLIN, select.POLLOUT


class ConnectionEnded(Exception):  # noqa: N818 - an outcome that tests expect
    """The server closed the connection."""


@dataclass(slots=True)
class Result:
    """The whole reply to one request: `error` is 0 or an NBD errno, `chunks` what it was made of, in order."""

    request: Request
    error: int = 0
    text: str = ""
    chunks: list[Content] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        """What a READ returned, holes filled in. Bytes that no chunk covered would be zero: `Replies` refuses those."""
        if len(self.chunks) == 1 and isinstance(self.chunks[0], Data):
            return self.chunks[0].data
        data = bytearray(self.request.length)
        for chunk in self.chunks:
            if isinstance(chunk, Data):
                start = chunk.offset - self.request.offset
                data[start : start + len(chunk.data)] = chunk.data
        return bytes(data)

    @property
    def status(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """What BLOCK_STATUS returned: (length, flags) pairs for each context id."""
        return {chunk.context: chunk.extents for chunk in self.chunks if isinstance(chunk, Status)}


class Client:
    """One connection. `connect` is the usual way in; `open` and `option` are for those who haggle by themselves."""

    def __init__(self, sock: socket.socket, *, timeout: float = TIMEOUT) -> None:
        self.sock = sock
        self.timeout = timeout
        self.mode = Mode.SIMPLE
        self.size = 0
        self.flags = 0
        self.block_size: wire.BlockSize | None = None
        self.description = ""
        self.contexts: dict[str, int] = {}
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._replies: Replies | None = None
        self._results: dict[int, Result] = {}
        self._finished: dict[int, Result] = {}
        self._cookie = 0
        self._poll = select.poll()
        sock.setblocking(False)

    # Handshake -------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, address: str | tuple[str, int], *, timeout: float = TIMEOUT) -> Self:
        """Connect to a unix socket's path or a (host, port); nothing is sent or awaited yet."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout)

    @classmethod
    def connect(
        cls,
        address: str | tuple[str, int],
        export: str = "",
        *,
        mode: Mode = Mode.EXTENDED,
        contexts: Iterable[str] = ("base:allocation",),
        timeout: float = TIMEOUT,
    ) -> Self:
        """Negotiate `mode` and `contexts` and choose `export`."""
        client = cls.open(address, timeout=timeout)
        try:
            client.greet()
            if mode is not Mode.SIMPLE:
                opt = Opt.STRUCTURED_REPLY if mode is Mode.STRUCTURED else Opt.EXTENDED_HEADERS
                client.expect_ack(opt, client.option(opt))
                client.mode = mode
                replies = client.option(Opt.SET_META_CONTEXT, wire.build_queries(export, contexts))
                client.expect_ack(Opt.SET_META_CONTEXT, replies)
                for reply in replies[:-1]:
                    number, name = wire.parse_meta_context(reply.payload)
                    client.contexts[name] = number
            client.go(export)
        except BaseException:
            client.close()
            raise
        return client

    def greet(self, flags: int = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES) -> None:
        """Take the server's greeting and send our flags."""
        while wire.take_greeting(self._incoming) is None:
            self._receive()
        self.send(wire.build_flags(flags))

    def option(self, option: int, payload: bytes = b"") -> list[wire.OptionReply]:
        """Send one option and return its replies, up to the one that ends them."""
        self.send(wire.build_option(option, payload))
        return self.option_replies()

    def option_replies(self) -> list[wire.OptionReply]:
        """The replies to an option that has been sent."""
        replies: list[wire.OptionReply] = []
        while not replies or not (replies[-1].kind == Rep.ACK or replies[-1].failed):
            while (reply := wire.take_option_reply(self._incoming)) is None:
                self._receive()
            replies.append(reply)
        return replies

    @staticmethod
    def expect_ack(option: Opt, replies: list[wire.OptionReply]) -> None:
        """Raise ProtocolError with the server's text unless the option was granted."""
        if replies[-1].failed:
            raise ProtocolError(f"{option.name} refused: {replies[-1].text}")

    def go(self, export: str) -> None:
        """Choose an export; requests may follow."""
        replies = self.option(Opt.GO, wire.build_info(export, (Info.BLOCK_SIZE,)))
        self.expect_ack(Opt.GO, replies)
        for reply in replies[:-1]:
            info = wire.parse_info(reply.payload)
            match info:
                case wire.ExportSize(size, flags):
                    self.size, self.flags = size, flags
                case wire.BlockSize():
                    self.block_size = info
                case wire.InfoText(Info.DESCRIPTION, text):
                    self.description = text
        self.transmit()

    def transmit(self, sent: Iterable[Request] = ()) -> None:
        """Treat what comes from now on as replies to requests, of which some may have been `sent` already."""
        self._replies = Replies(self.mode)
        for request in sent:
            self.expect(request)
        data = bytes(self._incoming)
        self._incoming.clear()
        self._take(data)

    # Requests --------------------------------------------------------------------------------------------------

    def submit(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Queue a request and return its cookie. Nothing is sent before `push` or a wait."""
        if command == Cmd.WRITE and self.mode is Mode.EXTENDED:
            flags |= CmdFlag.PAYLOAD_LEN
        self._cookie += 1
        request = Request(flags, command, self._cookie, offset, length)
        self.expect(request)
        self._outgoing += request.build(self.mode)
        self._outgoing += payload
        return self._cookie

    def expect(self, request: Request) -> None:
        """Announce a request that the caller sends by itself."""
        assert self._replies is not None, "no export has been chosen"
        self._replies.expect(request)
        self._results[request.cookie] = Result(request)

    @property
    def in_flight(self) -> int:
        """Requests without a whole reply."""
        return len(self._results)

    def push(self) -> None:
        """Send everything that is queued."""
        while self._outgoing:
            self._move()

    def wait(self, cookie: int) -> Result:
        """The reply to one request."""
        while cookie not in self._finished:
            self._move()
        return self._finished.pop(cookie)

    def wait_any(self) -> Result:
        """The next reply that is whole, whichever it answers."""
        while not self._finished:
            self._move()
        return self._finished.pop(next(iter(self._finished)))

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Result:
        """One request and its reply."""
        return self.wait(self.submit(command, offset, length, flags, payload))

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """Read; a refusal raises OSError with the NBD errno."""
        return _checked(self.call(Cmd.READ, offset, length, flags)).data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write; a refusal raises OSError with the NBD errno, as in all that follow."""
        _checked(self.call(Cmd.WRITE, offset, len(data), flags, data))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        _checked(self.call(Cmd.WRITE_ZEROES, offset, length, flags))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        _checked(self.call(Cmd.TRIM, offset, length, flags))

    def flush(self) -> None:
        _checked(self.call(Cmd.FLUSH))

    def block_status(self, offset: int, length: int, flags: int = 0) -> dict[int, tuple[tuple[int, int], ...]]:
        return _checked(self.call(Cmd.BLOCK_STATUS, offset, length, flags)).status

    # Bytes -----------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send any bytes, after what is queued."""
        self._outgoing += data
        self.push()

    def ended(self) -> bool:
        """Wait until the server closes the connection; False when it does not within the timeout."""
        try:
            while True:
                self._receive()
                self._incoming.clear()
        except ConnectionEnded:
            return True
        except TimeoutError:
            return False

    def _move(self) -> None:
        """Wait until bytes can go out or come in, and let them."""
        self._poll.register(self.sock, _POLL_IN | (_POLL_OUT if self._outgoing else 0))
        ready = self._poll.poll(self.timeout * 1000)
        if not ready:
            raise TimeoutError(f"nothing happened for {self.timeout} s with {self.in_flight} requests in flight")
        events = ready[0][1]
        try:
            if self._outgoing and events & _POLL_OUT:
                sent = self.sock.send(self._outgoing)
                del self._outgoing[:sent]
            if events & ~_POLL_OUT:
                data = self.sock.recv(_RECEIVE)
                if not data:
                    raise ConnectionEnded("the server closed the connection")
                if self._replies is None:
                    self._incoming += data
                else:
                    self._take(data)
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionEnded(str(error)) from None

    def _receive(self) -> None:
        """Wait for bytes, whatever they are."""
        deadline = time.monotonic() + self.timeout
        have = len(self._incoming)
        while len(self._incoming) == have:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server sent nothing for {self.timeout} s")
            replies, self._replies = self._replies, None
            try:
                self._move()
            finally:
                self._replies = replies

    def _take(self, data: bytes) -> None:
        assert self._replies is not None
        for reply in self._replies.receive(data):
            result = self._results[reply.request.cookie]
            if isinstance(reply.content, Failure):
                result.error = result.error or reply.content.error
                result.text = reply.content.text
            elif reply.content is not None:
                result.chunks.append(reply.content)
            if reply.done:
                self._finished[reply.request.cookie] = self._results.pop(reply.request.cookie)

    def disconnect(self) -> None:
        """Say goodbye and close."""
        try:
            self.send(Request(0, Cmd.DISC, 0, 0, 0).build(self.mode))
        except ConnectionEnded:
            pass
        self.close()

    def close(self) -> None:
        """Close without a word, as a client that died would."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _checked(result: Result) -> Result:
    if result.error:
        raise OSError(result.error, result.text or f"error {result.error}")
    return result
