"""One connection in its transmission phase: many requests in flight, one send for those of a turn, one reader.

Whoever calls gives the memory that is read into or written from, and waits. A caller that is cancelled costs the
connection: its memory must not be touched any more, and half a request cannot be taken back.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from blkferry.drivers.nbd.answers import Answers, Call
from blkferry.plane.loops import ended_unseen
from blkferry.plane.tls import TlsSocket
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Mode
from blkferry.wire.nbd.transmission import REQUEST_LAYOUT, ProtocolError, Request

if TYPE_CHECKING:
    from blkferry.drivers.nbd.haggling import Session
    from blkferry.plane.services import Services

log = logging.getLogger(__name__)

_PIECES: Final = 512  # of one gathered send; the kernel takes 1024
_RECEIVES: Final = 8  # of one turn, so that no server starves others on the loop


class ConnectionLost(Exception):  # noqa: N818 - an outcome that callers expect
    """The connection ended before this request was answered."""


class Connection:
    """`call` is for the loop of `services`; between calls `detach` frees it for another loop."""

    def __init__(self, session: Session, services: Services) -> None:
        self.session = session
        self.services = services
        self.lost = False
        self._sock = session.sock
        self._answers = Answers(session.mode, session.context)
        self._tail = b""  # received, but of no use before what follows it
        self._magic, self._layout = REQUEST_LAYOUT[session.mode]
        self._cookie = 0
        self._out: list[bytes | memoryview] = []
        self._attached = False
        self._pushing = False
        self._writing = False

    @property
    def in_flight(self) -> int:
        """How many requests have not been answered yet."""
        return len(self._answers.calls)

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
        call = Call(command, start, length, view, self.services.loop.create_future())
        self._answers.calls[self._cookie] = call
        self._out.append(self._layout.pack(self._magic, flags, command, self._cookie, start, length))
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
                before = len(self._tail)
                count = self._sock.recv_into(scratch[before:] if before else scratch)
                if not count:
                    self.end("the server closed the connection")
                    return
                scratch[:before] = self._tail
                have = before + count
                left = self._answers.receive(scratch[:have])
                self._tail = bytes(scratch[have - left : have])
                if have < len(scratch):
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
        calls, self._answers.calls = self._answers.calls, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_exception(ConnectionLost())
