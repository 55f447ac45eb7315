"""Requests of the common shape that the engine serves: cold reads, O_DIRECT, writes that are to be durable or that the
kernel throttles. Payload goes between disk and driver's memory, and the request is not taken apart.

What does not go like that is executed again as any other request, which finds out why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.queue import Queue
    from blkferry.plane.storage import Storage
    from blkferry.wire.virtio.memory import Home
    from blkferry.wire.virtio.split import SplitRing


class Transfer:
    """One of them: `count` bytes at guest address `data`, the status byte at `status` of region `home`.

    Calling it says what the engine made of it.
    """

    __slots__ = ("count", "data", "head", "home", "is_read", "queue", "ring", "status")

    def __init__(
        self,
        queue: Queue,
        ring: SplitRing,
        head: int,
        home: Home,
        status: int,
        data: int,
        count: int,
        *,
        is_read: bool,
    ) -> None:
        self.queue = queue
        self.ring = ring
        self.head = head
        self.home = home
        self.status = status
        self.data = data
        self.count = count
        self.is_read = is_read

    def read(self, storage: Storage, place: int, region: Home) -> bool:
        """Begin to read from `place`; False where the storage wants another alignment."""
        if (place | self.count) & (storage.alignment - 1):
            return False
        self.queue.begin()
        storage.read(region[3], self.data - region[0], self.count, place, self)
        return True

    def write(self, storage: Storage, place: int, region: Home) -> bool:
        """Begin to write to `place`, which may be overwritten; False where the storage cannot do that at once."""
        root = self.queue.device.root
        fua = root.writethrough
        if (place | self.count) & (storage.alignment - 1) or not storage.write_shortcut:
            return False
        if fua and root.node.flush_target() is not storage:
            return False
        self.queue.begin()
        storage.fast_write(region[3], self.count, place, fua, self, start=self.data - region[0])
        return True

    def __call__(self, result: int) -> None:
        queue = self.queue
        if not queue.broken:
            if result == self.count:
                self._finish()
            else:
                queue.execute_again(self.ring, self.head)
        queue.end()

    def _finish(self) -> None:
        queue, memory = self.queue, self.queue.memory
        base, _, view, _ = self.home
        view[self.status - base] = 0
        memory.wrote(self.status, 1)
        if self.is_read:
            memory.wrote(self.data, self.count)
            queue.bytes_read += self.count
        else:
            queue.bytes_written += self.count
        queue.put_head(self.ring, self.head, self.count + 1 if self.is_read else 1)
