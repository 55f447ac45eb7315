"""What a kernel is to a VDUSE device, and the driver of its one virtqueue: so that it is tested on any machine.

It has the methods of `exports.vduse_blk.kernel.KernelDevice`, over a driver's memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable

from blkferry.testing.virtio import BlockDriver, DriverMemory, Requester, SplitDriver
from blkferry.wire.vduse.ioctls import NO_EVENTFD, QueueInfo
from blkferry.wire.vduse.messages import REQUEST_SIZE, RESPONSE_SIZE
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, Region
from blkferry.wire.virtio_blk import Feature as Blk

FEATURES = Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Blk.FLUSH
DRIVER_OK = 15


class FakeKernel(Requester):
    """A kernel that a device was made in. It outlives the processes that open the device, one after the other."""

    def __init__(self, entries: int = 64) -> None:
        self.entries = entries
        self.features_accepted = int(FEATURES)
        self.found = False
        self.attached = True
        self.broken = False
        self.mapped: list[int] = []
        self.configs: list[bytes] = []
        self.config_interrupts = 0
        self.kick_fd = NO_EVENTFD
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._requests = 0
        self.have_driver(DriverMemory(4 << 20))
        self.open()

    def have_driver(self, memory: DriverMemory) -> None:
        """Another driver, whose ring is empty."""
        self.memory = memory
        self.ring = SplitDriver(memory, self.entries, FEATURES)
        self.block = BlockDriver(self.ring)
        self.ready = self.driver_ok = False

    def open(self) -> None:
        """As another process does, when the one before has closed it."""
        if hasattr(self, "_ours"):
            self.close()
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(10)
        self._theirs.setblocking(False)
        self.fd = self._theirs.fileno()

    # What the device asks --------------------------------------------------------------------------------------

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def receive(self) -> bytes | None:
        try:
            return self._theirs.recv(REQUEST_SIZE + 1) or None
        except BlockingIOError:
            return None

    def answer(self, response: bytes) -> None:
        self._theirs.send(response)

    def features(self) -> int:
        return self.features_accepted

    def set_config(self, config: bytes) -> None:
        self.configs.append(config)

    def interrupt_for_config(self) -> None:
        self._needs_driver()
        self.config_interrupts += 1

    def declare_queue(self, index: int, size: int) -> None:
        assert (index, size) == (0, self.entries)

    def queue(self, index: int) -> QueueInfo:
        if index:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        ring = self.ring
        areas = ring.descriptor_address, ring.driver_address, ring.device_address
        return QueueInfo(0, ring.size, *areas, avail_index=0, ready=self.ready)

    def has_queue(self, index: int) -> bool:
        return not index

    def set_kick(self, index: int, fd: int) -> None:
        assert not index
        self.kick_fd = fd

    def interrupter(self, index: int) -> Callable[[], None]:
        assert not index

        def interrupt() -> None:
            self._needs_driver()
            os.eventfd_write(self.call_fd, 1)

        return interrupt

    def region_at(self, address: int, memory: GuestMemory) -> Region | None:
        del memory
        if not self.memory.start <= address < self.memory.start + self.memory.size:
            return None
        self.mapped.append(address)
        return self.memory.region()

    def _needs_driver(self) -> None:
        if not self.driver_ok:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    # What it asks of the device, and its driver ----------------------------------------------------------------

    def ask(self, kind: int, payload: bytes, *, result: int = 0) -> bytes:
        """A request and its answer, without its head; fails unless the result is this one."""
        self._requests += 1
        self._ours.send((struct.pack("<II16x", kind, self._requests) + payload).ljust(REQUEST_SIZE, b"\0"))
        answer = self._ours.recv(RESPONSE_SIZE + 1)
        assert len(answer) == RESPONSE_SIZE
        assert struct.unpack_from("<II", answer) == (self._requests, result)
        return answer[24:]

    def give_up(self) -> None:
        """Wait for no answer any more."""
        self.broken = True
        self._ours.send(b"")

    def set_status(self, status: int) -> None:
        self.ask(1, bytes([status]))
        self.driver_ok = bool(status & 4)

    def arrive(self) -> None:
        """A driver comes, and is ready."""
        for status in (0, 1, 3, 11):
            self.set_status(status)
        self.ready = True
        self.set_status(DRIVER_OK)

    def reset(self) -> None:
        self.set_status(0)
        self.ready = False
