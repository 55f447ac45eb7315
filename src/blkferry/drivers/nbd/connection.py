"""One connection in its transmission phase: many requests in flight, one send for those of a turn, one reader.

Whoever calls lends the memory that is read into or written from until he is answered. He may be told before the server
has answered that he waits in vain: then his memory is left alone, and the call is `forsaken` until the answer comes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from blkferry.drivers.nbd.answers import Answers, Call
from blkferry.plane.drain import InFlight
from blkferry.plane.engine import Done
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

_WRITE, _PAYLOAD_LEN = int(Cmd.WRITE), int(CmdFlag.PAYLOAD_LEN)

LOST: Final = 1
"""The result of a call whose connection ended before it was answered; all others are 0 or negative."""


class ConnectionLost(Exception):  # noqa: N818 - an outcome that callers expect
    """The connection ended before this request was answered."""


class Connection:
    """`call` and `begin` are for the loop of `services`; between calls `detach` frees it for another loop.

    `forsaken` counts what a server may still do although nobody waits for it any more.
    """

    def __init__(self, session: Session, services: Services, forsaken: InFlight) -> None:
        self.session = session
        self.services = services
        self.lost = False
        self.forsaken = forsaken
        self._sock = session.sock
        self._answers = Answers(session.mode, session.context)
        self._tail = b""  # received, but of no use before what follows it
        self._magic, self._layout = REQUEST_LAYOUT[session.mode]
        self._is_extended = session.mode is Mode.EXTENDED
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
        self,
        command: Cmd,
        start: int,
        length: int,
        *,
        flags: int = 0,
        view: memoryview | None = None,
        user: object = None,
    ) -> tuple[tuple[int, int], ...]:
        """`begin` and wait for the reply; the extents of a BLOCK_STATUS are returned.

        Raises OSError as the server says, or ConnectionLost.
        """
        if self.lost:
            raise ConnectionLost
        future: asyncio.Future[int] = self.services.loop.create_future()
        call = self.begin(command, start, length, partial(_settle, future), flags=flags, view=view, user=user)
        try:
            result = await future
        except asyncio.CancelledError:
            self._forsake(call)
            raise
        if result == LOST:
            raise ConnectionLost
        if result:
            raise OSError(-result, f"the NBD server answered with error {-result}")
        return call.extents

    def begin(
        self,
        command: int,
        start: int,
        length: int,
        done: Done,
        *,
        flags: int = 0,
        view: memoryview | None = None,
        user: object = None,
    ) -> Call:
        """Send a request for `user` at the end of this turn, on a connection that is not lost.

        `view` is filled by a READ and sent by a WRITE. `done` is called once, later, with 0, a negated errno or LOST.
        """
        if not self._attached:
            self._attached = True
            self.services.loop.add_reader(self._sock.fileno(), self._readable)
        if command == _WRITE and self._is_extended:
            flags |= _PAYLOAD_LEN
        self._cookie = cookie = self._cookie + 1
        self._answers.calls[cookie] = call = Call(command, start, length, view, done, user)
        self._out.append(self._layout.pack(self._magic, flags, command, cookie, start, length))
        if command == _WRITE and view is not None:
            self._out.append(view)
        if not self._pushing:
            self._pushing = True
            self.services.loop.call_soon(self._push)
        return call

    def give_up(self, user: object) -> None:
        """Tell those who wait for the sake of `user` that they do so in vain."""
        for call in [each for each in self._answers.calls.values() if each.user is user]:
            done = call.done
            self._forsake(call)
            done(-errno.EIO)

    def _forsake(self, call: Call) -> None:
        """Leave its memory alone from now on, and its `done`, unless it has been answered."""
        if call not in self._answers.calls.values():
            return
        view, call.view = call.view, None
        for number, piece in enumerate(self._out):
            if view is not None and isinstance(piece, memoryview) and piece.obj is view.obj:
                self._out[number] = bytes(piece)  # of this call, or of another: a copy does no harm
        call.user, call.done = None, self._answered_late
        self.forsaken.begin()

    def _answered_late(self, result: int) -> None:
        del result
        self.forsaken.end()

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

    def detach(self) -> None:
        """Leave the loop; nothing is in flight."""
        if self._attached:
            self._attached = False
            self.services.loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._writing = False
            self.services.loop.remove_writer(self._sock.fileno())

    def end(self, why: str) -> None:
        """Close the connection; all that is in flight is LOST."""
        if self.lost:
            return
        self.lost = True
        log.warning("The connection to an NBD server has ended: %s", why)
        self._close()

    def leave(self) -> None:
        """Say goodbye and close; nobody waits for anything."""
        if not self.lost:
            self.lost = True
            try:
                if not self._out:
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
            call.done(LOST)


def _settle(future: asyncio.Future[int], result: int) -> None:
    if not future.done():
        future.set_result(result)
