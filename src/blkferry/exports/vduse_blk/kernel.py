"""An open VDUSE device, as the kernel has it: its ioctls, its messages, and the memory that it lends.

Memory comes in regions that are mapped when a driver first names them. For a block device of this host that is what the
kernel copies requests to and from (bounce pages), and one region for each ring. For a guest it is the guest's memory,
whose file belongs to another process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
from collections.abc import Callable

from blkferry.plane.guarded import Owner, guarded_map
from blkferry.wire.vduse.ioctls import (
    Access,
    Ioctl,
    IotlbEntry,
    QueueInfo,
    build_config_data,
    build_index,
    build_queue_config,
    build_queue_eventfd,
    build_version,
    parse_features,
)
from blkferry.wire.vduse.messages import REQUEST_SIZE
from blkferry.wire.virtio.memory import MemoryFault, Region

_INJECT_IRQ = int(Ioctl.VQ_INJECT_IRQ)


class KernelDevice:
    """The device behind a non-blocking descriptor, which it owns. Methods raise OSError where the kernel refuses."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)

    # Messages --------------------------------------------------------------------------------------------------

    def receive(self) -> bytes | None:
        """The next request, None if there is none."""
        try:
            return os.read(self.fd, REQUEST_SIZE)
        except BlockingIOError:
            return None

    def answer(self, response: bytes) -> None:
        os.write(self.fd, response)

    @property
    def broken(self) -> bool:
        """Whether the kernel has given the device up, because it did not get an answer in time."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    # The device ------------------------------------------------------------------------------------------------

    def features(self) -> int:
        """What the driver has accepted; 0 before it has."""
        return parse_features(fcntl.ioctl(self.fd, Ioctl.DEV_GET_FEATURES, build_version(0)))

    def set_config(self, config: bytes) -> None:
        """Have the driver see this configuration from now on."""
        fcntl.ioctl(self.fd, Ioctl.DEV_SET_CONFIG, build_config_data(0, config))

    def interrupt_for_config(self) -> None:
        """Have the driver look at its configuration. Fails with EINVAL as long as it is not ready."""
        fcntl.ioctl(self.fd, Ioctl.DEV_INJECT_CONFIG_IRQ)

    # Virtqueues ------------------------------------------------------------------------------------------------

    def declare_queue(self, index: int, size: int) -> None:
        """There is a virtqueue, which may have up to `size` entries."""
        fcntl.ioctl(self.fd, Ioctl.VQ_SETUP, build_queue_config(index, size))

    def queue(self, index: int) -> QueueInfo:
        """How the driver has set a virtqueue up. Fails with EINVAL if there is no such."""
        data = QueueInfo.ask(index)
        fcntl.ioctl(self.fd, Ioctl.VQ_GET_INFO, data)
        return QueueInfo.parse(data)

    def has_queue(self, index: int) -> bool:
        """Whether there is such a virtqueue."""
        try:
            self.queue(index)
        except OSError:
            return False
        return True

    def set_kick(self, index: int, fd: int) -> None:
        """Where the driver's kicks go: an eventfd, or NO_EVENTFD."""
        fcntl.ioctl(self.fd, Ioctl.VQ_SETUP_KICKFD, build_queue_eventfd(index, fd))

    def interrupter(self, index: int) -> Callable[[], None]:
        """What has the driver look at a used ring; it fails with EINVAL as long as the driver is not ready."""
        fd, request, ioctl = self.fd, build_index(index), fcntl.ioctl

        def interrupt() -> None:
            ioctl(fd, _INJECT_IRQ, request)

        return interrupt

    # Memory ----------------------------------------------------------------------------------------------------

    def region_at(self, address: int, memory: Owner) -> Region | None:
        """The region that has an address, None where there is none.

        Not all of a region has to be there: the kernel's has holes where nothing was copied yet, and a guest's file can
        be cut off. Then `memory` is told that it has lost something.
        """
        request = IotlbEntry.ask(address)
        try:
            fd = fcntl.ioctl(self.fd, Ioctl.IOTLB_GET_FD, request)
        except OSError:
            return None
        try:
            entry = IotlbEntry.parse(request)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if entry.access & Access.WRITE else 0)
            length = entry.last - entry.start + 1
            return Region(entry.start, length, guarded_map(fd, length, entry.offset, memory, prot=protection))
        except (OSError, ValueError, OverflowError, MemoryFault):
            return None  # nothing that can be mapped: to the driver it is as if it were not there
        finally:
            os.close(fd)
