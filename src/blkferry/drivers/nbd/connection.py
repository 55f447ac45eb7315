"""One connection in its transmission phase: many requests in flight, one send for those of a turn, one reader.

Whoever calls gives the memory that is read into or written from, and waits. A caller that is cancelled costs the
connection: its memory must not be touched any more, and half a request cannot be taken back.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from blkferry.plane.loops import ended_unseen
from blkferry.plane.tls import TlsSocket
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode
from blkferry.wire.nbd.replies import Data, Failure, Hole, Replies, Status
from blkferry.wire.nbd.transmission import ProtocolError, Request

if TYPE_CHECKING:
    from blkferry.drivers.nbd.haggling import Session
    from blkferry.plane.services import Services
    from blkferry.wire.nbd.transmission import Buffer

log = logging.getLogger(__name__)

_PIECES: Final = 512  # of one gathered send; the kernel takes 1024
_RECEIVES: Final = 8  # of one turn, so that no server starves others on the loop
_ERRNOS: Final = frozenset(Errno)


class ConnectionLost(Exception):  # noqa: N818 - an outcome that callers expect
    """The connection ended before this request was answered."""


class _Call:
    """A request in flight."""

    __slots__ = ("error", "extents", "future", "request", "view")

    def __init__(self, request: Request, view: memoryview | None, future: asyncio.Future[None]) -> None:
        self.request = request
        self.view = view
        self.future = future
        self.error = 0
        self.extents: tuple[tuple[int, int], ...] = ()


class Connection:
    """`call` is for the loop of `services`; between calls `detach` frees it for another loop."""

    def __init__(self, session: Session, services: Services) -> None:
        self.session = session
        self.services = services
        self.lost = False
        self._sock = session.sock
        self._replies = Replies(session.mode)
        self._calls: dict[int, _Call] = {}
        self._cookie = 0
        self._out: list[bytes | memoryview] = []
        self._attached = False
        self._pushing = False
        self._writing = False

    @property
    def in_flight(self) -> int:
        """How many requests have not been answered yet."""
        return len(self._calls)

    # Requests ---------------------------------------------------------------------------------------------------

    async def call(
        self, command: Cmd, start: int, length: int, *, flags: int = 0, view: memoryview | None = None
    ) -> tuple[tuple[int, int], ...]:
        """Send a request and wait for its reply; the extents of a BLOCK_STATUS are returned.

        `view` is filled by a READ and sent by a WRITE. Raises OSError as the server says, or ConnectionLost.
        """
        if self.lost:
            raise ConnectionLost
        self._attach()
        if command == Cmd.WRITE and self.session.mode is Mode.EXTENDED:
            flags |= CmdFlag.PAYLOAD_LEN
        self._cookie += 1
        request = Request(flags, command, self._cookie, start, length)
        call = _Call(request, view, self.services.loop.create_future())
        self._replies.expect(request)
        self._calls[request.cookie] = call
        self._out.append(request.build(self.session.mode))
        if command == Cmd.WRITE and view is not None:
            self._out.append(view)
        if not self._pushing:
            self._pushing = True
            self.services.loop.call_soon(self._push)
        try:
            await call.future
        except asyncio.CancelledError:
            self.end("a request was cancelled")
            raise
        if call.error:
            raise OSError(call.error, f"the NBD server answered with error {call.error}")
        return call.extents

    def _push(self) -> None:
        self._pushing = False
        try:
            while self._out and not self.lost:
                sent = self._sock.sendmsg(self._out[:_PIECES])
                self._drop(sent)
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self.services.loop.add_writer(self._sock.fileno(), self._push)
            return
        except OSError as error:
            self.end(str(error))
            return
        if self._writing and not self.lost:
            self._writing = False
            self.services.loop.remove_writer(self._sock.fileno())

    def _drop(self, sent: int) -> None:
        """Forget what has been sent."""
        whole = 0
        for piece in self._out:
            if sent < len(piece):
                break
            sent -= len(piece)
            whole += 1
        del self._out[:whole]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]

    # Replies ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        scratch = self.services.scratch_in
        try:
            for _ in range(_RECEIVES):
                count = self._sock.recv_into(scratch)
                if not count:
                    self.end("the server closed the connection")
                    return
                self._take(scratch[:count])
                if count < len(scratch):
                    break
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self.end(str(error))
            return
        if ended_unseen(self._sock):
            self.end("the server closed the connection")
        elif isinstance(self._sock, TlsSocket) and self._sock.ready:
            self.services.loop.call_soon(self._more)

    def _more(self) -> None:
        """Go on with what TLS has decrypted already, of which the loop knows nothing."""
        if self._attached:
            self._readable()

    def _take(self, data: Buffer) -> None:
        for request, done, content in self._replies.receive(data):
            call = self._calls[request.cookie]
            match content:
                case Data(offset, received) if call.view is not None:
                    at = offset - request.offset
                    call.view[at : at + len(received)] = received
                case Hole(offset, length) if call.view is not None:
                    at = offset - request.offset
                    call.view[at : at + length] = bytes(length)
                case Status(context, extents) if context == self.session.context:
                    call.extents = extents
                case Failure(error, _):
                    call.error = error if error in _ERRNOS else Errno.EINVAL
            if done:
                del self._calls[request.cookie]
                if not call.future.done():
                    call.future.set_result(None)

    # Life -------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        if not self._attached:
            self._attached = True
            self.services.loop.add_reader(self._sock.fileno(), self._readable)

    def detach(self) -> None:
        """Leave the loop; nothing is in flight."""
        if self._attached:
            self._attached = False
            self.services.loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._writing = False
            self.services.loop.remove_writer(self._sock.fileno())

    def end(self, why: str) -> None:
        """Close the connection; all that is in flight raises ConnectionLost."""
        if self.lost:
            return
        self.lost = True
        log.warning("The connection to an NBD server has ended: %s", why)
        self._close()

    def leave(self) -> None:
        """Say goodbye and close; nothing is in flight."""
        if not self.lost:
            self.lost = True
            try:
                self._sock.send(Request(0, Cmd.DISC, 0, 0, 0).build(self.session.mode))
            except OSError:
                log.debug("The NBD server is gone already")
            self._close()

    def _close(self) -> None:
        self.detach()
        self._sock.close()
        self._out.clear()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_exception(ConnectionLost())
