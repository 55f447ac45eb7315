"""One NBD client after its handshake: its life, what it sends, what waits, and who is told when.

Theory of operation. A turn starts when the socket is readable. One recv fills the loop's shared scratch memory; every
whole request in it is executed in order and the replies are gathered and sent with one call (`turn`). A request takes
one of four roads:

- inline: reads that cannot sleep, and buffered writes, right in the turn (R3); large reads go by sendfile (R4);
- engine: what may sleep (cold reads, O_DIRECT, FUA, flush), finished by a callback; its replies are queued and leave
  together at the end of a batch of completions;
- later: what one driver alone can do and begins at once (another server's disk), finished likewise by its callback;
- task: everything that needs more than one step (`slow`): zeroes, discards, unaligned or split ranges.

The first two need to know where the bytes are (`places`); what only a driver knows takes the others. What does not fit
into a turn waits: an incomplete request in the stash, the payload of a large write in a buffer of its own, replies in
the outbox. While replies wait for the socket, or too much is in flight, nothing new is read.

Invariants: every request gets exactly one final reply unless the connection ends; the stream stays in step or the
connection ends; nothing of a request is executed before its payload is complete.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from blkferry.exports.complaints import Complaints
from blkferry.exports.limits import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES
from blkferry.exports.nbd import slow, turn
from blkferry.exports.nbd.limits import (
    FEW,
    GATHER_SECONDS,
    MAX_RECEIVES,
)
from blkferry.exports.nbd.requests import Payload, with_whole_payload
from blkferry.plane.buffers import Buffer
from blkferry.plane.drain import InFlight
from blkferry.plane.loops import ended_unseen
from blkferry.plane.outbox import Outbox
from blkferry.plane.syscalls import queued_bytes
from blkferry.plane.tls import TlsSocket
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import Errno
from blkferry.wire.nbd.handshake import Negotiated

if TYPE_CHECKING:
    from blkferry.exports.nbd.export import NbdExport

log = logging.getLogger(__name__)


class NbdClient:
    """One connection in its transmission phase; owned by the loop of the export's node.

    `on_closed` is called once, on that loop, when the socket is closed and nothing is in flight any more. `identity` is
    who the client is by TLS. `requests` and `received` (bytes) count what came since the handshake, `outbox.sent` what
    went.
    """

    def __init__(
        self,
        export: NbdExport,
        sock: socket.socket | TlsSocket,
        negotiated: Negotiated,
        leftover: bytes,
        peer: str,
        on_closed: Callable[[NbdClient], None],
        identity: str = "",
    ) -> None:
        self.export = export
        self.root = export.root
        self.places = export.places
        self.mode = negotiated.mode
        self.contexts = negotiated.contexts
        self.peer = peer
        self.identity = identity
        self.requests = 0
        self.received = 0
        self.size = export.size
        self.read_only = not export.options.writable
        self.selected = tuple(number for number, _ in negotiated.contexts)
        self._sock = sock
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._fd = sock.fileno()
        self._on_closed = on_closed
        self._stash = bytes(leftover)
        self.payload: Payload | None = None
        self._peer_gone = False
        self._prompt = False
        self._polled_in_vain = False
        self._turn_ended = 0.0
        self._complaints = Complaints(log)
        self._moving: bytes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight_bytes = 0
        self._reading = False
        self._paused = True  # until resume()
        self.ending = False  # no more requests; the connection closes when what is in flight has been answered
        self.closed = False
        self._close_waiters: list[asyncio.Future[None]] = []
        self._flush_scheduled = False
        self.in_flight = InFlight()
        self.services = export.root.services
        self.replies = turn.Replies(self)
        self.outbox = Outbox(sock, self.services, self._go_on)

    # Life ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Serve, on the loop where the node lives now."""
        if self.closed:
            return
        if asyncio.get_running_loop() is not self.root.services.loop:  # the node moved while this call was on its way
            self.root.services.loop.call_soon_threadsafe(self.resume)
            return
        self.services = self.root.services
        self.outbox.attach(self.services)
        payload = self.payload
        if payload is not None and self._moving is not None:
            payload.buffer = self.services.buffers.acquire(payload.length)
            payload.buffer.view[: payload.have] = self._moving
            self._moving = None
        self._paused = False
        self._go_on()

    async def pause(self) -> None:
        """Stop serving; return when nothing is in flight. The connection stays."""
        self._paused = True
        self._stop_reading()
        await self.idle()
        while self._flush_scheduled:  # noqa: ASYNC110 - it is one turn of the loop away
            await asyncio.sleep(0)
        self.services.buffers.forget(self._go_on)
        self.outbox.detach()
        payload = self.payload
        if payload is not None and payload.buffer is not None:
            # Buffers belong to the loop: what has come of a write waits in plain memory while the client moves.
            self._moving = bytes(payload.buffer.view[: payload.have])
            payload.buffer.release()
            payload.buffer = None

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self.in_flight.idle()

    async def ended(self) -> None:
        """Wait until the connection is closed and nothing is in flight."""
        while not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._close_waiters.append(waiter)
            await waiter
        await self.idle()

    def end(self) -> None:
        """Take no more requests; close when what is in flight has been answered."""
        self.ending = True
        self._stop_reading()
        if not self.in_flight.count and not self.outbox.blocked:
            self.close()

    def close(self, why: str = "") -> None:
        """Close the socket at once. What is in flight runs to its end; its replies are dropped."""
        if self.closed:
            return
        self.closed = self.ending = True
        if why:
            log.info("%s: export '%s': disconnecting: %s", self.peer, self.export.name, why)
        log.info(
            "%s: export '%s': gone after %d requests, %d bytes received and %d sent",
            *(self.peer, self.export.name, self.requests, self.received, self.outbox.sent),
        )
        self._stop_reading()
        self.outbox.broken = True
        self.outbox.discard()
        if self.payload is not None and self.payload.buffer is not None:
            self.payload.buffer.release()
        self.payload = None
        self._sock.close()
        for waiter in self._close_waiters:
            if not waiter.done():
                waiter.set_result(None)
        if not self.in_flight.count:
            self._on_closed(self)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.services.loop.remove_reader(self._fd)

    def _go_on(self) -> None:
        """Serve what waits in the stash, then read again; called when a reason not to has gone."""
        if self.closed:
            return
        if self.outbox.broken:
            self.close("the client went away")
            return
        if self.ending:
            if not self.in_flight.count and not self.outbox.blocked:
                self.close()
            return
        if self._paused or self.must_wait():
            return
        if self._stash and self.payload is None:
            stash, self._stash = self._stash, b""
            turn.serve(self, memoryview(stash), len(stash))
            if self.closed or self.ending or self._paused or self.must_wait():
                return
        if not self._reading:
            self._reading = True
            self.services.loop.add_reader(self._fd, self._readable)
            if self._has_more():
                self.services.loop.call_soon(self._readable_still)

    def must_wait(self) -> bool:
        if self.outbox.blocked or self.in_flight.count >= MAX_IN_FLIGHT or self._in_flight_bytes >= MAX_IN_FLIGHT_BYTES:
            return True
        if self.services.buffers.exhausted and self.in_flight.count:  # others' payloads may never come: one of ours may
            self.services.buffers.wait(self._go_on)
            return True
        return False

    # Receiving -------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._flush_scheduled:  # else replies that were queued a moment ago would look like those of a slow client
            self.outbox.flush()
        if self.services.poll_seconds:
            # A client that we slept through looks late by the time it takes to wake up.
            patience = self.services.poll_seconds * (1 if self._polled_in_vain else 2)
            self._prompt = time.monotonic() - self._turn_ended < patience
        try:
            for _ in range(MAX_RECEIVES):
                if not self._receive():
                    return
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or "receive failed")
            return
        self._look_again()

    def _receive(self) -> bool:
        """Receive once and execute what is whole; whether more is on its way, as far as that can be told."""
        payload = self.payload
        if payload is not None:
            return self._receive_payload(payload)
        scratch = self.services.scratch_in
        have = len(self._stash)
        if have:
            scratch[:have] = self._stash
        count = self._sock.recv_into(scratch[have:])
        self._stash = b""
        if not count:
            self._hang_up(have)
            return False
        self.received += count
        self._moderate(turn.serve(self, scratch, have + count))
        return self._reading and (bool(self._stash) or self.payload is not None or self._has_more())

    def _moderate(self, requests: int) -> None:
        """Let a client that streams small requests gather some more of them, and wait for one that is prompt.

        When we are faster than the client, turns get so small that waking up costs more than the requests. A pause
        shorter than what the client needs for the next few makes turns several times as large and takes nobody's time:
        it is made only when more is queued already, and nobody else was served since.
        """
        services = self.services
        alone, services.last_served = services.last_served is self, self
        if not alone or not self._reading:
            return
        if 1 < requests < FEW and queued_bytes(self._fd):
            time.sleep(GATHER_SECONDS)
        elif requests == 1 and services.poll_seconds:
            self._poll(services.poll_seconds)

    def _poll(self, longest: float) -> None:
        """Wait for the next request without sleeping, if the last one came as soon as that (poll-max-ns)."""
        self._turn_ended = now = time.monotonic()
        self._polled_in_vain = False
        if self._prompt:
            while not queued_bytes(self._fd) and not self._polled_in_vain:
                self._polled_in_vain = time.monotonic() - now > longest

    def _has_more(self) -> bool:
        """Whether there are bytes that the socket will not tell of."""
        return self._tls is not None and self._tls.ready

    def _hang_up(self, unparsed: int) -> None:
        """The client closed its side: requests in flight run to their end, there is nobody to answer."""
        self.close("the client went away in the middle of a request" if unparsed else "the client went away")

    def _look_again(self) -> None:
        """More is needed: make sure that the end is seen if this was the last the loop will tell us."""
        self._peer_gone = self._peer_gone or ended_unseen(self._sock)
        if self._peer_gone or self._has_more():
            self.services.loop.call_soon(self._readable_still)

    def _readable_still(self) -> None:
        if self._reading:
            self._readable()

    def _receive_payload(self, payload: Payload) -> bool:
        """Straight into the write's own buffer, without a copy; whether it is worth receiving once more."""
        if payload.buffer is None:
            room = min(payload.length - payload.have, len(self.services.scratch_in))
            count = self._sock.recv_into(self.services.scratch_in[:room])
        else:
            count = self._sock.recv_into(payload.buffer.view[payload.have : payload.length])
        if not count:
            self._hang_up(1)
            return False
        self.received += count
        payload.have += count
        if payload.have == payload.length:
            self.payload = None
            if payload.buffer is not None:  # else it was refused when it began: there is nothing to answer now
                with_whole_payload(self, payload)
                self.turn_over(memoryview(b""), more=False)
        return self._reading

    def turn_over(self, rest: memoryview, *, more: bool) -> None:
        """A turn has ended: `rest` is what it did not get to, `more` says that there are whole requests in it."""
        if self.in_flight.count:
            self.services.engine.kick()
        if self.closed:
            return
        if self.outbox.broken:
            self.close("the client went away")
            return
        if rest:
            self._stash = bytes(rest)
        if self.must_wait():
            self._stop_reading()
        elif more and self.payload is None:
            self._stop_reading()
            self.services.loop.call_soon(self._go_on)

    def lost_step(self, head: int, request: wire.Request) -> None:
        """A request does not begin with the magic: the stream is out of step, and nothing after this can be trusted."""
        reply = wire.error_reply(self.mode, request, Errno.EINVAL, f"invalid request magic {head >> 32:#010x}")
        self.outbox.send(memoryview(reply))
        self.close(f"a request begins with {head >> 32:#010x} instead of the magic")

    # Counting and answering ------------------------------------------------------------------------------------

    def check(self, request: wire.Request) -> wire.Refusal | None:
        """Why a request must be refused, None if it may run."""
        return wire.check(request, size=self.size, read_only=self.read_only, mode=self.mode, selected=self.selected)

    def complain(self, text: str) -> None:
        """A request failed: say so in the log, unless there is too much of it."""
        self._complaints.add(f"{self.peer}: export '{self.export.name}'", text)

    def queue(self, data: bytes | memoryview, buffer: Buffer | None = None) -> None:
        """Send a reply that is ready outside of a turn, together with the others of its batch."""
        self.outbox.queue(data, buffer)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self.services.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.closed:
            return
        self.outbox.flush()
        if self.outbox.broken:
            self.close("the client went away")
        elif not self.outbox.blocked:
            self._go_on()

    def begin(self, length: int) -> None:
        """Count an operation with `length` bytes of payload."""
        self.in_flight.begin()
        self._in_flight_bytes += length
        self.root.in_flight.begin()

    def finished(self, request: wire.Request | None, result: int, length: int) -> None:
        """An operation of `length` payload bytes is over; `request` is answered here unless it already was."""
        if request is not None and not self.closed:
            if result < 0:
                self.queue(slow.error_reply(self, request, OSError(-result, os.strerror(-result))))
            else:
                self.queue(wire.success_reply(self.mode, request))
        self.in_flight.end()
        self._in_flight_bytes -= length
        self.root.in_flight.end()
        self._schedule_flush()  # also resumes reading, once per batch
        if self.closed and not self.in_flight.count:
            self._on_closed(self)

    def spawn(self, work: Coroutine[Any, Any, bytes], length: int) -> None:
        """Execute a request as a task; `work` returns the reply."""
        self.begin(length)
        task = self.services.loop.create_task(self._perform(work, length))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, work: Coroutine[Any, Any, bytes], length: int) -> None:
        try:
            self.queue(await work)
        finally:
            self.finished(None, 0, length)
