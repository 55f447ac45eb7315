"""One mounted file and the kernel at the other end of its device: its life, what is in flight, and what is answered.

Theory of operation. Each read of the device brings one request, each write answers one. A turn (`turn`) starts when the
device is readable, and serves one request after the other until there are none or others of the loop have to be served.
A request takes one of three roads, as one of an NBD client does:

- inline: reads that cannot sleep, and buffered writes, right in the turn;
- engine: what may sleep, finished by a callback (`transfers`);
- task: everything that needs more than one step (`transfers`, `operations`).

Requests are received into a buffer in which the data of a write begin at a page. What does not end within the turn
takes its data along, in a copy or with the whole buffer, so that nothing is ever received over data that are still
being written.

Invariants: every request gets exactly one reply unless its kind has none; as long as too much is in flight nothing is
read, and the kernel lets those who ask for more wait.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from blkferry.errors import Error
from blkferry.exports.complaints import Complaints
from blkferry.exports.fuse import turn
from blkferry.exports.fuse.limits import (
    COPY_BELOW,
    INTERRUPT_SECONDS,
)
from blkferry.exports.fuse.passthrough import Passthrough
from blkferry.exports.limits import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES
from blkferry.plane.buffers import Buffer
from blkferry.plane.drain import InFlight
from blkferry.wire.fuse import replies
from blkferry.wire.fuse.init import MAX_WRITE, Agreed
from blkferry.wire.fuse.replies import OUT_HEADER, WRITE_REPLY
from blkferry.wire.fuse.requests import READ_SIZE

if TYPE_CHECKING:
    from blkferry.exports.fuse.inode import Inode
    from blkferry.exports.places import Places
    from blkferry.graph.root import Root

log = logging.getLogger(__name__)

_DATA_AT = 4096
"""Where the data of a write begin in the buffer that messages are received into."""

_GONE = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET, errno.EBADF})
"""What the device says when it is mounted nowhere any more."""


class Handle(NamedTuple):
    """An open file: who opened it, and whether the kernel reads and writes the image by itself."""

    pid: int
    passes_through: bool


class Session:
    """The serving end of a device; owned by the loop of the export's node.

    `fd` is non-blocking and closed by `close`. `on_ended` is called when the file is mounted nowhere any more, unless
    we ended it ourselves. `requests`, `received` and `sent` (bytes of data) count what was served.
    """

    def __init__(
        self,
        fd: int,
        root: Root,
        places: Places,
        inode: Inode,
        *,
        writable: bool,
        growable: bool,
        passthrough: bool,
        on_ended: Callable[[], None],
    ) -> None:
        self.fd = fd
        self.root = root
        self.places = places
        self.inode = inode
        self.writable = writable
        self.growable = growable
        self.passthrough = Passthrough(fd, root, places) if passthrough else None
        self._on_ended = on_ended
        self.services = root.services
        self.agreed: Agreed | None = None
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self.resizing = asyncio.Lock()
        self.requests = self.received = self.sent = 0
        self.in_flight = InFlight()
        self._in_flight_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: set[int] = set()
        self._given_up: set[int] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._reading = False
        self._paused = True  # until resume()
        self._prompt = False
        self._polled_in_vain = False
        self._turn_ended = 0.0
        self._complaints = Complaints(log)
        self.closed = False
        self._unmounted = False
        self.answer = bytearray(OUT_HEADER.size)
        self.write_answer = bytearray(WRITE_REPLY.size)
        self._message: Buffer | None = None
        self.room: memoryview
        self.data: memoryview
        self.vector: tuple[memoryview]

    # Life ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Serve, on the loop where the node lives now."""
        if self.closed:
            return
        if asyncio.get_running_loop() is not self.root.services.loop:  # the node moved while this call was on its way
            self.root.services.loop.call_soon_threadsafe(self.resume)
            return
        self.services = self.root.services
        if self._message is None:
            self._take_message_buffer()
        self._paused = False
        self._go_on()

    async def pause(self) -> None:
        """Stop serving; return when nothing is in flight. The kernel keeps what is asked meanwhile."""
        self._paused = True
        self._stop_reading()
        await self.in_flight.idle()
        self.services.buffers.forget(self._go_on)
        self._drop_message_buffer()

    async def ready(self) -> None:
        """Wait until the kernel and we have agreed on the protocol."""
        while self.agreed is None and not self.closed:
            await self._waken()

    def agree(self, agreed: Agreed) -> None:
        self.agreed = agreed
        self._wake()

    def opened(self, pid: int, *, passes_through: bool) -> int:
        """Note that a process has the file open; returns the number that requests will name."""
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[number] = Handle(pid, passes_through)
        return number

    def released(self, number: int) -> None:
        """What was opened is closed."""
        handle = self.handles.pop(number, None)
        if handle is not None and handle.passes_through and self.passthrough is not None:
            self.passthrough.catch_up()
            self.passthrough.release()
        if not self.handles:
            self._wake()
            if self._unmounted:
                self.root.services.loop.call_soon(self._end_if_unused)

    @property
    def pids(self) -> list[int]:
        """The processes that opened what is open."""
        return sorted({handle.pid for handle in list(self.handles.values())})

    async def all_released(self) -> None:
        """Wait until nobody has the file open."""
        while self.handles and not self.closed:
            await self._waken()

    async def _waken(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Close the device: whoever has the file open gets errors from now on. What is in flight runs to its end."""
        if self.closed:
            return
        self.closed = True
        self._stop_reading()
        self._drop_message_buffer()
        os.close(self.fd)
        self.handles.clear()
        self._wake()

    def ended(self) -> None:
        """The kernel says that the file is mounted nowhere any more."""
        if not self.closed:
            self.close()
            self._on_ended()

    def unmounted(self) -> None:
        """The file can be found no more: end as soon as nobody has it open, whether the kernel says so or not."""
        if asyncio.get_running_loop() is not self.root.services.loop:  # the node moved while this call was on its way
            self.root.services.loop.call_soon_threadsafe(self.unmounted)
            return
        self._unmounted = True
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if not self.handles:
            self.ended()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.services.loop.remove_reader(self.fd)

    def _go_on(self) -> None:
        """Serve, if there is nothing against it; called when a reason not to has gone."""
        if not (self.closed or self._paused or self._reading or self.must_wait()):
            self._reading = True
            self.services.loop.add_reader(self.fd, self._readable)

    def must_wait(self) -> bool:
        """Whether too much is in flight for another request."""
        if self.in_flight.count >= MAX_IN_FLIGHT or self._in_flight_bytes >= MAX_IN_FLIGHT_BYTES:
            return True
        if self.services.buffers.exhausted and self.in_flight.count:
            self.services.buffers.wait(self._go_on)
            return True
        return False

    # Receiving -------------------------------------------------------------------------------------------------

    def _take_message_buffer(self) -> None:
        self._message = message = self.services.buffers.acquire(_DATA_AT + MAX_WRITE)
        self.room = message.view[_DATA_AT - READ_SIZE : _DATA_AT + MAX_WRITE]
        self.data = message.view[_DATA_AT : _DATA_AT + MAX_WRITE]
        self.vector = (self.room,)

    def _drop_message_buffer(self) -> None:
        if self._message is not None:
            self._message.release()
            self._message = None

    def keep_data(self, length: int) -> tuple[Buffer, int]:
        """Take the data of the WRITE that was received: a buffer to be released, and where in it they begin."""
        if length <= COPY_BELOW:
            buffer = self.services.buffers.acquire(length)
            buffer.view[:length] = self.data[:length]
            return buffer, 0
        kept = self._message
        assert kept is not None
        self._take_message_buffer()
        return kept, _DATA_AT

    def _readable(self) -> None:
        services = self.services
        if services.poll_seconds:
            # A client that we slept through looks late by the time it takes to wake up.
            patience = services.poll_seconds * (1 if self._polled_in_vain else 2)
            alone = services.last_served is self
            self._prompt = alone and time.monotonic() - self._turn_ended < patience
        services.last_served = self
        turn.serve(self)
        self._turn_ended = time.monotonic()
        if self.in_flight.count:
            services.engine.kick()
        if not self.closed and self.must_wait():
            self._stop_reading()

    def poll(self) -> int:
        """Wait for the next request without sleeping, if the last one came as soon as that (poll-max-ns).

        Returns its length, 0 if there is none.
        """
        if not self._prompt or self.in_flight.count:
            return 0
        until = time.monotonic() + self.services.poll_seconds
        self._polled_in_vain = False
        while not self._polled_in_vain:
            try:
                return os.readv(self.fd, self.vector)
            except BlockingIOError:
                self._polled_in_vain = time.monotonic() > until
        return 0

    def receive_failed(self, error: OSError) -> bool:
        """Whether to go on although the device gave an error: a request was taken back before we got it."""
        if error.errno in (errno.ENOENT, errno.EINTR):
            return True
        if error.errno not in _GONE:
            log.error("%s: receiving failed: %s", self.root.describe(), error.strerror)
        self.ended()
        return False

    # Answering -------------------------------------------------------------------------------------------------

    def reply(self, *parts: bytes | bytearray | memoryview) -> None:
        """Answer a request, or tell something, with one message in these parts."""
        if self.closed:
            return
        try:
            os.writev(self.fd, parts)
        except OSError as error:
            self.reply_failed(error)

    def reply_failed(self, error: OSError) -> None:
        """The device did not take a reply."""
        if error.errno in _GONE:
            return  # the next read says so, too
        if error.errno == errno.EFAULT:  # the image was cut off under a mapping; the kernel has answered EIO
            self.complain("reading failed: the image is shorter than it was when it was opened")
        elif error.errno != errno.ENOENT:  # the request was given up: nobody waits for it
            log.error("%s: answering failed: %s", self.root.describe(), error.strerror)

    def fail(self, unique: int, error: OSError, doing: str) -> None:
        """Answer that a request has failed, and say so in the log."""
        self.complain(f"{doing} failed: {error.strerror}")
        self.reply(replies.failure(unique, error.errno or errno.EIO))

    def complain(self, text: str) -> None:
        """A request failed: say so in the log, unless there is too much of it."""
        self._complaints.add(self.root.describe(), text)

    def attributes_changed(self) -> None:
        """Tell the kernel that the file is not as long as it was."""
        if self.agreed is not None:
            self.reply(replies.attributes_changed())

    # Counting --------------------------------------------------------------------------------------------------

    def begin(self, length: int) -> None:
        """Count an operation with `length` bytes of payload."""
        self.in_flight.begin()
        self._in_flight_bytes += length
        self.root.in_flight.begin()

    def finished(self, length: int) -> None:
        """An operation of `length` payload bytes is over, and answered."""
        self._in_flight_bytes -= length
        self.root.in_flight.end()
        self.in_flight.end()
        self._go_on()

    def spawn(self, unique: int, work: Coroutine[Any, Any, bytes], length: int = 0) -> None:
        """Execute a request as a task; `work` returns the reply, or raises OSError or Error."""
        self.begin(length)
        self._pending.add(unique)
        task = self.services.loop.create_task(self._perform(unique, work, length))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, unique: int, work: Coroutine[Any, Any, bytes], length: int) -> None:
        try:
            answer = await work
        except OSError as error:
            self.complain(f"a request failed: {error.strerror}")
            answer = replies.failure(unique, error.errno or errno.EIO)
        except Error as error:
            self.complain(error.message)
            answer = replies.failure(unique, replies.errno_of(error))
        except Exception:  # our own bug must fail this request, not all that follow
            log.exception("%s: request failed", self.root.describe())
            answer = replies.failure(unique, errno.EIO)
        self._pending.discard(unique)
        if unique in self._given_up:
            self._given_up.discard(unique)
        else:
            self.reply(answer)
        self.finished(length)

    def interrupt(self, unique: int) -> None:
        """Whoever waits for a request got a signal, perhaps to die. Files are not read in halves for that, so it is
        given up only if it takes much longer: then its process goes, and its result is dropped.
        """
        if unique in self._pending:
            self.services.loop.call_later(INTERRUPT_SECONDS, self._give_up, unique)

    def _give_up(self, unique: int) -> None:
        if unique in self._pending and unique not in self._given_up:
            self._given_up.add(unique)
            self.reply(replies.failure(unique, errno.EINTR))
