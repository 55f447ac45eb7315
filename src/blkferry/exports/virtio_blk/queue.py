"""One virtqueue of a block device: its life, when it is served, and how its driver hears of what was done.

Theory of operation. A turn begins with a kick. It takes every chain that is available (`turn`); what cannot sleep is
done at once, the rest by the engine or as a task. What is done is put into the used ring and shown with one store and
at most one notification: at the end of the turn, or of the batch of completions. Then the driver is asked to kick
again, and the ring is looked at once more, for it may have missed that.

A driver that has one request at a time is polled for (`poll-max-ns`), if its last one came as soon as that.

Invariants: every chain that was taken is given back exactly once; nothing leaves here as an exception: what is wrong
with the ring stops this queue and is told by `failed`, once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from blkferry.errors import Error, ErrorKind
from blkferry.exports.virtio_blk import requests, turn
from blkferry.exports.virtio_blk.limits import TURN_SECONDS
from blkferry.plane.drain import InFlight
from blkferry.wire.virtio.chain import Chain, Inflight, Ring, RingError
from blkferry.wire.virtio.memory import GuestMemory
from blkferry.wire.virtio.split import SplitRing
from blkferry.wire.virtio_blk import Status, Type

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.device import Device
    from blkferry.exports.virtio_blk.request import Request

log = logging.getLogger(__name__)

_OK, _IN, _OUT = int(Status.OK), int(Type.IN), int(Type.OUT)  # an enum's member takes as long to find as a dict's

STATUS_OF_KIND = {
    kind: Status.UNSUPP if kind in (ErrorKind.UNSUPPORTED, ErrorKind.UNKNOWN_COMMAND) else Status.IOERR
    for kind in ErrorKind
}


class Queue:
    """Queue `index` of a device; owned by the loop of the node from `start` to the end of `stop`.

    `kick_fd` is an eventfd of which this queue is a reader; -1 if the transport calls `kick` instead. `notify` tells
    the driver that there are used buffers, and `failed` the transport that the queue has stopped for ever, and why;
    neither may raise or wait. `inflight` is told what is in flight. The descriptor stays the caller's.
    """

    def __init__(
        self,
        device: Device,
        index: int,
        ring: Ring,
        memory: GuestMemory,
        kick_fd: int,
        notify: Callable[[], None],
        failed: Callable[[str], None],
        inflight: Inflight | None = None,
    ) -> None:
        self.device = device
        self.index = index
        self.ring = ring
        self.memory = memory
        self.inflight = inflight
        self.requests = 0
        self.bytes_read = self.bytes_written = 0
        self.services = device.root.services
        self._kick_fd = kick_fd
        self._notify = notify
        self._failed = failed
        self.in_flight = InFlight()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False
        self.broken = False
        self.put_heads: list[int] = []  # and not yet shown; kept only for `inflight`
        self._serving = False
        self._prompt = False  # the driver's last request came as soon as one is waited for
        self._polled_in_vain = False
        self._quiet_since = 0.0
        self._publish_scheduled = False
        self._resubmitted = False

    # Life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve, on the loop of the node. What `inflight` says was in flight before comes first."""
        self.services = self.device.root.services
        self._running = True
        if self._kick_fd >= 0:
            self.services.loop.add_reader(self._kick_fd, self._kicked)
        if not self._resubmitted:
            self._resubmitted = True
            self._resubmit()
            self._notify()  # who had the ring before may have ended between showing something and telling of it
        self.kick()

    async def stop(self) -> tuple[int | None, ...]:
        """Take nothing more; return the ring's state when nothing is in flight and all that was done is shown."""
        if self._running:
            self._running = False
            if self._kick_fd >= 0:
                self.services.loop.remove_reader(self._kick_fd)
        await self.in_flight.idle()
        self._publish()
        return self.ring.state

    async def pause(self) -> None:
        """Let go of the node's loop; return when nothing is in flight."""
        await self.stop()

    def resume(self) -> None:
        """Go on, on the loop where the node lives now."""
        self.start()

    def replace(self, ring: Ring, memory: GuestMemory) -> None:
        """Have the driver's memory elsewhere, and the ring in it. Only while paused or stopped."""
        assert not self._running
        self.ring, self.memory = ring, memory

    def fail(self, why: str) -> None:
        """Stop for ever: the ring, or the memory it lies in, cannot be trusted."""
        if self.broken:
            return
        self.broken = True
        if self.memory.lost:  # whatever that led to
            why = "the driver's memory was cut off"
        log.warning("%s: queue %d stopped: %s", self.device.name, self.index, why)
        if self._running and self._kick_fd >= 0:
            self.services.loop.remove_reader(self._kick_fd)
        self._running = False
        self._failed(why)

    def _resubmit(self) -> None:
        if self.inflight is None:
            return
        inline_writes = not self.device.root.writethrough
        try:
            for head, descriptors in self.inflight.pending():
                turn.execute(self, self.ring.again(head, descriptors), inline_writes=inline_writes)
        except RingError as error:
            self.fail(str(error))

    # Serving ---------------------------------------------------------------------------------------------------

    def _kicked(self) -> None:
        try:
            os.eventfd_read(self._kick_fd)
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(f"the kick descriptor failed: {error.strerror}")
            return
        if self.services.poll_seconds:
            # A driver that we slept through looks late by the time it takes to wake up.
            patience = self.services.poll_seconds * (1 if self._polled_in_vain else 2)
            self._prompt = time.monotonic() - self._quiet_since < patience
        self.kick()

    def kick(self) -> None:
        """Serve what there is, and what comes meanwhile; within limits, as others of the loop wait."""
        if not self._running:
            return
        services, ring = self.services, self.ring
        alone, services.last_served = services.last_served is self, self
        until = time.monotonic() + TURN_SECONDS
        self._serving = True
        try:
            while time.monotonic() < until:
                count = turn.serve(self)
                if self.memory.lost:
                    raise RingError
                if count:
                    self.requests += count
                    self._publish()
                    if self.in_flight.count:
                        services.engine.kick()
                        self._publish()  # what was done at once
                    if not self._running:
                        return
                    if ring.available() or (alone and services.poll_seconds and self._poll(services.poll_seconds)):
                        continue
                if not ring.arm():
                    return
            services.loop.call_soon(self.kick)
        except RingError as error:
            self.fail(str(error))
        except Exception:  # our own bug must stop this queue, and nothing else
            log.exception("%s: queue %d", self.device.name, self.index)
            self.fail("internal error")
        finally:
            self._serving = False

    def _poll(self, longest: float) -> bool:
        """Wait for more without sleeping, if the last came as soon as that (poll-max-ns); whether it did."""
        self._quiet_since = now = time.monotonic()
        self._polled_in_vain = False
        if not self._prompt or self.in_flight.count:
            return False
        available = self.ring.available
        self.ring.disarm()
        while not available():
            if time.monotonic() - now > longest:
                self._polled_in_vain = True
                return False
        return True

    def execute_again(self, ring: SplitRing, head: int) -> None:
        """A request that could not be served without taking it apart."""
        try:
            turn.execute(self, ring.chain(head), inline_writes=False)
        except RingError as error:
            self.fail(str(error))

    # Finishing -------------------------------------------------------------------------------------------------

    def finish(self, request: Request, status: int) -> None:
        """A request is done; the driver sees it at the end of this turn, or of this batch of completions."""
        if self.broken:
            return
        request.status[0] = status
        if status == _OK:
            if request.type == _IN:
                self.bytes_read += request.length_in
            elif request.type == _OUT:
                self.bytes_written += request.length_out
        self._put(request.chain, request.written)

    def give_up(self, chain: Chain) -> None:
        """Give back a chain that is no request, saying so if it has a place for a status."""
        if chain.writable:
            chain.writable[-1][-1] = Status.IOERR
        self._put(chain, sum(map(len, chain.writable)))

    def put_head(self, ring: SplitRing, head: int, written: int) -> None:
        """A request that was not taken apart is done."""
        ring.put_head(head, written)
        self._was_put(head)

    def _put(self, chain: Chain, written: int) -> None:
        self.ring.put(chain, written)
        self._was_put(chain.head)

    def _was_put(self, head: int) -> None:
        if self.inflight is not None:
            self.put_heads.append(head)
        if not self._serving and not self._publish_scheduled:
            self._publish_scheduled = True
            self.services.loop.call_soon(self._publish)

    def _publish(self) -> None:
        """Show the driver what was put."""
        self._publish_scheduled = False
        if self.broken:
            return
        if self.memory.lost:
            self.fail("")
            return
        if self.inflight is not None and self.put_heads:
            self.inflight.end(self.put_heads)
        wanted = self.ring.publish(idle=not self.in_flight.count)
        if self.inflight is not None and self.put_heads:
            self.inflight.published(self.ring.next_used)
            self.put_heads.clear()
        if wanted:
            self._notify()

    def begin(self) -> None:
        """Count an operation that this turn does not finish."""
        self.in_flight.begin()
        self.device.root.in_flight.begin()

    def end(self) -> None:
        """It is over."""
        self.device.root.in_flight.end()
        self.in_flight.end()

    def spawn(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        """Execute a request as a task."""
        self.begin()
        task = self.services.loop.create_task(self._perform(request, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError as error:
            requests.failed(self, request, error)
        except Error as error:
            self.device.complain(error.message)
            self.finish(request, STATUS_OF_KIND[error.kind])
        except Exception:  # our own bug must fail this request, and nothing else
            log.exception("%s: queue %d: request failed", self.device.name, self.index)
            self.finish(request, Status.IOERR)
        else:
            self.finish(request, Status.OK)
        finally:
            self.end()
