"""One vring as its front end describes it, message by message, and the queue that serves it while it runs.

A ring runs from SET_VRING_KICK to GET_VRING_BASE, and is served meanwhile as long as it is enabled ("Ring states").
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from blkferry.exports.vhost_user_blk.inflight import InflightBuffer, PackedInflight, SplitInflight
from blkferry.exports.virtio_blk.queue import Queue
from blkferry.wire.vhost_user.constants import VringFlag
from blkferry.wire.vhost_user.payloads import ProtocolError, VringAddr
from blkferry.wire.virtio.chain import MAX_SIZE, RingError
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.packed import EVENT_SIZE, PackedRing, PackedState
from blkferry.wire.virtio.split import SplitRing, SplitState, descriptor_size, device_size, driver_size

if TYPE_CHECKING:
    from blkferry.exports.vhost_user_blk.memory import MemoryTable
    from blkferry.exports.virtio_blk.device import Device

WRAP = 1 << 15
"""The wrap counter in a position of a packed ring."""


class Vring:
    """Ring `index` of a device. `failed` is told when the ring makes no sense and is not served any more."""

    def __init__(self, index: int, device: Device, memory: MemoryTable, failed: Callable[[], None]) -> None:
        self.index = index
        self.device = device
        self._memory = memory
        self._failed = failed
        self._finished_requests = 0
        self._fds = {"kick": -1, "call": -1, "err": -1}
        self.call = -1
        self.queue: Queue | None = None
        self.inflight: InflightBuffer | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what the front end has said; the ring does not run."""
        assert self.queue is None
        self.size = 0
        self.base = 0
        self.where: VringAddr | None = None
        self.started = False
        self.enabled = False
        for which in self._fds:
            self.take_fd(which, -1)

    @property
    def requests(self) -> int:
        """How many requests it has served."""
        return self._finished_requests + (self.queue.requests if self.queue is not None else 0)

    # What the front end says ---------------------------------------------------------------------------------------

    def take_fd(self, which: str, fd: int) -> None:
        """Have another descriptor for "kick", "call" or "err", or none (-1). It is this ring's to close."""
        before, self._fds[which] = self._fds[which], fd
        self.call = self._fds["call"]
        if before >= 0:
            os.close(before)

    def resize(self, size: int) -> None:
        if self.queue is not None:
            raise ProtocolError(f"vring {self.index} gets another size while it runs")
        if not 0 < size <= MAX_SIZE:
            raise ProtocolError(f"vring {self.index} cannot have {size} descriptors")
        self.size = size

    def set_base(self, base: int) -> None:
        if self.queue is not None:
            raise ProtocolError(f"vring {self.index} gets another base while it runs")
        self.base = base

    # Running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve the ring if it may be, on the loop of the node. Raises ProtocolError when it cannot be what it is said
        to be.
        """
        if self.queue is not None or not self.started or not self.enabled:
            return
        try:
            ring, inflight = self._packed() if self.device.features & Feature.RING_PACKED else self._split()
        except RingError as error:
            raise ProtocolError(f"vring {self.index}: {error}") from error
        queue = Queue(
            self.device, self.index, ring, self._memory.guest, self._fds["kick"], self.notify, self._fail, inflight
        )
        self.queue = queue
        queue.start()

    async def halt(self) -> None:
        """Serve it no longer; return when nothing is in flight. `base` says where to go on."""
        queue = self.queue
        if queue is None:
            return
        state = await queue.stop()
        if isinstance(state, PackedState):
            used = state.next_used | state.used_wrap * WRAP
            self.base = state.next_avail | state.avail_wrap * WRAP | used << 16
        elif isinstance(state, SplitState):
            self.base = state.next_avail
        self._finished_requests += queue.requests
        self.queue = None
        if queue.services.last_served is queue:  # which would keep the guest's memory mapped until somebody else comes
            queue.services.last_served = None

    def notify(self) -> None:
        """Tell the driver that there are used buffers."""
        self._signal(self.call)

    def _fail(self, why: str) -> None:
        del why  # the queue has said it
        self._signal(self._fds["err"])
        self._failed()

    @staticmethod
    def _signal(fd: int) -> None:
        if fd >= 0:
            try:
                os.eventfd_write(fd, 1)
            except OSError:  # it is full, so its reader will see; or there is no reader any more
                pass

    # The ring ------------------------------------------------------------------------------------------------------

    def _areas(self, descriptor: int, driver: int, device: int) -> tuple[VringAddr, memoryview, memoryview, memoryview]:
        """Where the ring is, and its three areas, which have these lengths."""
        where = self.where
        if where is None or not self.size:
            raise ProtocolError(f"vring {self.index} is started without {'size' if where else 'addresses'}")
        found = [
            self._memory.guest.piece(self._memory.guest_address(address, length), length)
            for address, length in ((where.descriptor, descriptor), (where.available, driver), (where.used, device))
        ]
        return where, found[0], found[1], found[2]

    def _split(self) -> tuple[SplitRing, SplitInflight | None]:
        size = self.size
        where, table, driver, device = self._areas(descriptor_size(size), driver_size(size), device_size(size))
        used = int.from_bytes(device[2:4], "little")
        state = SplitState(self.base & 0xFFFF, used)
        inflight = None
        if self.inflight is not None:
            inflight = SplitInflight(self.inflight.region(self.index, size), size, used)
            state = SplitState((used + inflight.taken) & 0xFFFF, used)
        ring = SplitRing(
            size,
            table,
            driver,
            device,
            self._memory.guest,
            features=self.device.features,
            state=state,
            used_address=where.log if where.flags & VringFlag.LOG else None,
        )
        return ring, inflight

    def _packed(self) -> tuple[PackedRing, PackedInflight | None]:
        size = self.size
        where, ring_area, driver, device = self._areas(16 * size, EVENT_SIZE, EVENT_SIZE)
        avail, used = self.base & 0xFFFF, self.base >> 16
        state = PackedState(avail & (WRAP - 1), avail // WRAP, used & (WRAP - 1), used // WRAP)
        inflight = None
        if self.inflight is not None:
            region = self.inflight.region(self.index, size)
            inflight = PackedInflight(region, size, ring_area, (state.next_used, state.used_wrap))
            position, wrap = inflight.used
            following = position + inflight.taken
            state = PackedState(following % size, wrap ^ (following >= size), position, wrap)
        logged = bool(where.flags & VringFlag.LOG)
        ring = PackedRing(
            size,
            ring_area,
            driver,
            device,
            self._memory.guest,
            features=self.device.features,
            state=state,
            ring_address=self._memory.guest_address(where.descriptor, 16 * size) if logged else None,
            device_address=where.log if logged else None,
        )
        return ring, inflight


def can_be_polled(fd: int) -> bool:
    """Whether a descriptor can tell that there is something to read: not a file."""
    with select.epoll() as poll:
        try:
            poll.register(fd)
        except OSError:
            return False
    return True
