"""A block device over a node of a daemon in a thread, and the driver of its queue, without a transport between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

from blkferry.exports.virtio_blk.device import Device
from blkferry.exports.virtio_blk.queue import Queue
from blkferry.graph.permissions import ALL, NONE, Permission
from blkferry.graph.root import Root
from blkferry.plane.guarded import guarded_map
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio import BlockDriver, DriverMemory, Requester, ring_driver
from blkferry.wire.virtio.chain import Inflight
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, Region


def whole(memory: DriverMemory, mapped: memoryview) -> list[Region]:
    """All of the driver's memory in one region."""
    return [Region(memory.start, memory.size, mapped)]


FEATURES = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX)


class VirtioDisk(Requester):
    """Node `node` of `daemon` as a device with one queue of `size`; the test is its driver. A context manager.

    `features` are what the driver accepts, `options` go to the `Device`, which sees the driver's memory by a guarded
    mapping of its own, as `regions` makes it of that. `failures` is what the queue said when it stopped.
    """

    def __init__(
        self,
        daemon: DaemonThread,
        node: str,
        *,
        size: int = 64,
        features: int = FEATURES,
        memory_size: int = 16 << 20,
        writable: bool = True,
        regions: Callable[[DriverMemory, memoryview], list[Region]] = whole,
        inflight: Inflight | None = None,
        memory: DriverMemory | None = None,
        log: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        self.daemon = daemon
        self.memory = memory or DriverMemory(memory_size)
        self.ring = ring_driver(self.memory, size, features)
        self.block = BlockDriver(self.ring)
        self.failures: list[str] = []
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.guest = GuestMemory(log=log)
        mapped = guarded_map(self.memory.fd, self.memory.size, 0, self.guest)
        self.guest.replace(regions(self.memory, mapped))
        self._node, self._features, self._writable, self._inflight = node, features, writable, inflight
        self._options = options
        self.device: Device
        self.queue: Queue

    def __enter__(self) -> Self:
        self.daemon.call(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.call(self._stop)
        for fd in (self.kick_fd, self.call_fd):
            os.close(fd)
        self.memory.close()

    async def _start(self) -> None:
        graph = self.daemon.daemon.graph
        node = graph.find(self._node)
        root = Root(node, "the test's disk", self._retired)
        self.device = Device(root, name="the test's disk", writable=self._writable, **self._options)
        used = Permission.CONSISTENT_READ | (Permission.WRITE if self._writable else NONE)
        async with graph.changing:
            await node.services.run(root.attach(used, ALL))
        self.device.accept(self._features | int(self._features_of_device()))
        self.queue = self.make_queue()
        await node.services.run(self._on_loop(self.queue.start))

    def _retired(self, start: int, end: int | None) -> None:
        self.device.retired(start, end)

    def _features_of_device(self) -> int:
        return self.device.offered & 0xFFFFFF

    def make_queue(self) -> Queue:
        """Another queue over the same ring, which goes on where the last one ended."""
        state = self.queue.ring.state if hasattr(self, "queue") else None
        return Queue(
            self.device,
            0,
            self.ring.ring(self.guest, state),  # type: ignore[arg-type]
            self.guest,
            self.kick_fd,
            lambda: os.eventfd_write(self.call_fd, 1),
            self.failures.append,
            self._inflight,
        )

    @staticmethod
    async def _on_loop(call: Callable[[], object]) -> None:
        call()

    async def _stop(self) -> None:
        services = self.device.root.services
        await services.run(self.queue.stop())
        async with self.daemon.daemon.graph.changing:
            await services.run(self.device.root.detach())
        self.device.drop()
