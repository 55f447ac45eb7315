"""An open VDUSE device: it answers what the kernel asks, and has its virtqueues served.

Theory of operation. The kernel asks one thing after the other (`wire.vduse.machine`), and waits for each answer. Most
are answered at once. Those that end the use of memory, a reset and a new mapping, are answered when nothing is in
flight any more; until then no other request is read. Kicks come by eventfds, interrupts go by an ioctl, and what is in
flight stands in the reconnect log, from where it is taken up again if this process dies.

It can leave its loop, and go on on another, between `pause` and `resume`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from typing import Final, Protocol

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk.kernel import KernelDevice
from blkferry.exports.vduse_blk.reconnect import QueueLog, ReconnectLog
from blkferry.exports.virtio_blk.device import Device
from blkferry.wire.vduse.ioctls import NO_EVENTFD, QueueInfo
from blkferry.wire.vduse.machine import Effect, Machine, Task
from blkferry.wire.virtio.chain import RingError
from blkferry.wire.virtio.memory import GuestMemory, MemoryFault, Region
from blkferry.wire.virtio.split import SplitRing, descriptor_size, device_size, driver_size
from blkferry.wire.virtio_blk import Feature as Blk

log = logging.getLogger(__name__)

MAX_REGIONS: Final = 1024
"""More than any driver has: the kernel's own takes one and one for each ring, guests have some memory slots."""

INTERRUPT_AGAIN: Final = 0.001
"""Seconds after which an interrupt is tried again. The kernel takes none until it has seen that the driver is ready."""


class Serving(Protocol):
    """Something that serves a ring (`exports.virtio_blk.queue`, or `refusal`)."""

    def start(self) -> None: ...

    async def stop(self) -> tuple[int | None, ...]: ...

    async def pause(self) -> None: ...

    def resume(self) -> None: ...


MakeServing = Callable[[int, SplitRing, GuestMemory, int, Callable[[], None], Callable[[str], None], QueueLog], Serving]
"""Makes what serves a ring: of this index, with this kick eventfd, what interrupts the driver and what fails."""


class VirtQueue:
    """One virtqueue of the device, served or not."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.ring: SplitRing | None = None
        self.serving: Serving | None = None
        self.kick_fd = NO_EVENTFD
        self._rested = 0

    @property
    def avail_index(self) -> int:
        """Where it is in the available ring, or was when it was last served."""
        return self._rested if self.ring is None else self.ring.next_avail

    def rest(self) -> None:
        """It is not served any more."""
        self._rested = self.avail_index
        self.ring = self.serving = None
        if self.kick_fd != NO_EVENTFD:
            os.close(self.kick_fd)
            self.kick_fd = NO_EVENTFD


class VduseDevice:
    """The device that the kernel has as `kernel`, whose owner it is; each virtqueue has up to `entries`.

    Owned by the loop that calls `start`.
    """

    def __init__(self, kernel: KernelDevice, device: Device, entries: int, make: MakeServing) -> None:
        self._kernel = kernel
        self._device = device
        self._entries = entries
        self._make = make
        self.queues = [VirtQueue(index) for index in range(device.queues)]
        self._machine = Machine(self.queues)
        self._memory = GuestMemory(miss=self._miss)
        self._working: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life ------------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Declare the virtqueues of a new device. Raises Error."""
        try:
            for queue in self.queues:
                self._kernel.declare_queue(queue.index, self._entries)
        except OSError as error:
            raise Error.from_oserror("failed to create vduse device: virtqueues", error) from error

    def check_found(self) -> None:
        """See whether a device that was there already is like this one. Raises Error."""
        try:
            count, features = len(self.queues), self._kernel.features()
        except PermissionError as error:
            raise Error(
                ErrorKind.GONE,
                f"failed to create vduse device: the kernel has given {self._device.name} up",
                hint="Nobody has served it for too long. Take it off the vDPA bus, and begin anew.",
            ) from error
        alike = self._kernel.has_queue(count - 1) and not self._kernel.has_queue(count)
        if alike and features:
            alike = not features & ~self._device.offered and bool(features & Blk.RO) is not self._device.writable
        if not alike or any(self._kernel.queue(queue.index).size > self._entries for queue in self.queues):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"failed to create vduse device: {self._device.name} was made with other options",
                hint="Give those that it has (num-queues, queue-size, writable), or take it off the vDPA bus.",
            )

    def start(self, reconnect: ReconnectLog, *, found: bool) -> None:
        """Begin to answer. The virtqueues of a device that was `found` running are served at once. Raises Error."""
        self._log = reconnect
        self._loop = asyncio.get_running_loop()
        if found:
            self.announce_config()
            if any(self._kernel.queue(queue.index).ready for queue in self.queues):
                self._device.accept(self._kernel.features())
                self._start_queues()
                self._machine.resume()
        self._listen()

    async def stop(self) -> None:
        """Serve nothing and answer nothing; return when nothing is in flight."""
        await self._rest()
        await self._stop_queues()

    def close(self) -> None:
        """Let go of the device, which is stopped."""
        self._memory.replace(())
        self._kernel.close()

    async def pause(self) -> None:
        """Let go of the loop; return when nothing is in flight."""
        await self._rest()
        for queue in self.queues:
            if queue.serving is not None:
                await queue.serving.pause()

    def resume(self) -> None:
        """Go on, on this loop."""
        self._loop = asyncio.get_running_loop()
        for queue in self.queues:
            if queue.serving is not None:
                queue.serving.resume()
        self._listen()

    def serve_by(self, make: MakeServing) -> None:
        """After `stop`: go on like this, on this loop."""
        self._make = make
        self._loop = asyncio.get_running_loop()
        try:
            self._start_queues()
        except Error as error:
            log.warning("%s: %s", self._device.name, error.message)
        self._listen()

    def announce_config(self) -> None:
        """Tell the driver, if there is one, of the configuration as it is now."""
        try:
            self._kernel.set_config(self._device.config())
            self._kernel.interrupt_for_config()
        except OSError as error:
            if error.errno != errno.EINVAL:  # there is no driver yet
                log.warning("%s: cannot announce its new size: %s", self._device.name, error.strerror)

    # What the kernel asks --------------------------------------------------------------------------------------

    def _listen(self) -> None:
        assert self._loop is not None
        self._loop.add_reader(self._kernel.fd, self._readable)

    async def _rest(self) -> None:
        """Read no more requests, and wait for the one at hand."""
        while self._working is not None:
            await asyncio.wait([self._working])
        if self._loop is not None:
            self._loop.remove_reader(self._kernel.fd)

    def _readable(self) -> None:
        assert self._loop is not None
        data = self._kernel.receive()
        if data is None:
            if self._kernel.broken:
                self._loop.remove_reader(self._kernel.fd)
                log.error("%s: the kernel has given it up: it waited too long for an answer", self._device.name)
            return
        task = self._machine.receive(data)
        if task.effect in (Effect.STOP, Effect.REMAP):
            self._loop.remove_reader(self._kernel.fd)
            self._working = asyncio.ensure_future(self._work(task))
        else:
            self._answer(task, ok=self._do(task))

    def _do(self, task: Task) -> bool:
        """Carry out what takes no time; tell whether it could be done."""
        try:
            match task.effect:
                case Effect.NEGOTIATE:
                    self._device.accept(self._kernel.features())
                case Effect.START:
                    self._device.accept(self._kernel.features())
                    self._start_queues()
        except (Error, OSError) as error:
            log.warning("%s: %s", self._device.name, error)
            return False
        return True

    async def _work(self, task: Task) -> None:
        """Carry out what ends the use of memory."""
        ok = True
        try:
            await self._stop_queues()
            self._memory.replace(())
            self._memory.lost = False
            if task.effect is Effect.STOP:
                self._log.clear()
                self._device.reset()
            else:
                self._start_queues()
        except Error as error:
            log.warning("%s: %s", self._device.name, error.message)
            ok = False
        finally:
            self._working = None
            self._answer(task, ok=ok)
            self._listen()

    def _answer(self, task: Task, *, ok: bool) -> None:
        try:
            self._kernel.answer(self._machine.answer(task, ok=ok))
        except OSError as error:
            log.warning("%s: the kernel did not wait for an answer (%s)", self._device.name, error.strerror)

    # Virtqueues ------------------------------------------------------------------------------------------------

    def _start_queues(self) -> None:
        """Serve those that are ready. Raises Error."""
        try:
            for queue in self.queues:
                if queue.serving is None and (info := self._kernel.queue(queue.index)).ready:
                    self._start_queue(queue, info)
        except (OSError, RingError, MemoryFault) as error:
            raise Error(ErrorKind.IO, f"virtqueue {queue.index}: {error}") from error

    def _start_queue(self, queue: VirtQueue, info: QueueInfo) -> None:
        if info.size > self._entries:
            raise RingError(f"it has {info.size} entries, more than {self._entries}")
        memory, size, reconnect = self._memory, info.size, self._log.queues[queue.index]
        ring = SplitRing(
            size,
            memory.piece(info.descriptor_area, descriptor_size(size)),
            memory.piece(info.driver_area, driver_size(size)),
            memory.piece(info.device_area, device_size(size), write=True),
            memory,
            features=self._device.features,
        )
        ring.next_avail = (ring.next_used + reconnect.recover(ring.next_used)) & 0xFFFF
        if self._log.lost and ring.available():
            log.warning("%s: virtqueue %d: nobody knows what was in flight", self._device.name, queue.index)
        queue.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        queue.ring = ring
        index = queue.index

        def failed(text: str) -> None:
            log.error("%s: virtqueue %d: %s; it is served again after a reset", self._device.name, index, text)

        serving = self._make(index, ring, memory, queue.kick_fd, self._interrupter(index), failed, reconnect)
        queue.serving = serving
        self._kernel.set_kick(index, queue.kick_fd)
        serving.start()

    async def _stop_queues(self) -> None:
        for queue in self.queues:
            if queue.serving is not None:
                await queue.serving.stop()
                try:
                    self._kernel.set_kick(queue.index, NO_EVENTFD)
                except OSError:
                    pass  # the kernel has given the device up
                queue.rest()

    def _interrupter(self, index: int) -> Callable[[], None]:
        """What tells the driver to look at the used ring."""
        inject = self._kernel.interrupter(index)

        def interrupt() -> None:
            try:
                inject()
            except OSError as error:
                if error.errno == errno.EINVAL and self._loop is not None:
                    self._loop.call_later(INTERRUPT_AGAIN, again)

        def again() -> None:
            if self.queues[index].serving is not None:
                interrupt()

        return interrupt

    # Memory ----------------------------------------------------------------------------------------------------

    def _miss(self, address: int) -> Region | None:
        if len(self._memory.regions) >= MAX_REGIONS:
            return None
        return self._kernel.region_at(address, self._memory)
