"""Serving a ring when there is nothing to serve from any more: every request fails.

An export may be removed while its device is on the vDPA bus. Whoever uses the device must get answers all the same, or
it could never be taken off.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from blkferry.exports.vduse_blk.reconnect import QueueLog
from blkferry.exports.virtio_blk.request import Malformed, Request
from blkferry.wire.virtio.chain import Chain, RingError
from blkferry.wire.virtio.memory import GuestMemory
from blkferry.wire.virtio.split import SplitRing
from blkferry.wire.virtio_blk import Status


class RefusingQueue:
    """Answers all requests of a ring with IOERR; owned by the loop that calls `start`."""

    def __init__(
        self,
        index: int,
        ring: SplitRing,
        memory: GuestMemory,
        kick_fd: int,
        notify: Callable[[], None],
        failed: Callable[[str], None],
        reconnect: QueueLog,
    ) -> None:
        del index, memory
        self._ring = ring
        self._kick_fd = kick_fd
        self._notify = notify
        self._failed = failed
        self._reconnect = reconnect

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._kick_fd, self._kicked)
        self._refuse_all()

    async def stop(self) -> tuple[int | None, ...]:
        asyncio.get_running_loop().remove_reader(self._kick_fd)
        return self._ring.state

    async def pause(self) -> None:
        await self.stop()

    def resume(self) -> None:
        self.start()

    def _kicked(self) -> None:
        try:
            os.eventfd_read(self._kick_fd)
        except BlockingIOError:
            pass
        self._refuse_all()

    def _refuse_all(self) -> None:
        ring, reconnect = self._ring, self._reconnect
        try:
            chains = [ring.again(head, descriptors) for head, descriptors in reconnect.pending()]
            while True:
                while (chain := ring.take()) is not None:
                    reconnect.begin((chain.head,))
                    chains.append(chain)
                for chain in chains:
                    self._refuse(chain)
                reconnect.end([chain.head for chain in chains])
                wanted = ring.publish(idle=True)
                reconnect.published(ring.next_used)
                if wanted:
                    self._notify()
                if not ring.arm():
                    return
                chains = []
        except RingError as error:
            asyncio.get_running_loop().remove_reader(self._kick_fd)
            self._failed(str(error))

    def _refuse(self, chain: Chain) -> None:
        try:
            Request(chain).status[0] = Status.IOERR
        except Malformed:
            pass
        self._ring.put(chain, 1)
