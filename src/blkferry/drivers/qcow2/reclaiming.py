"""Giving up host clusters: counted down when the disk no longer names them, used again when no reader may be there.

A cluster that nothing in memory points at any more goes through three stages. It is *dropped* until a commit has made
that durable. Then its refcount is lowered, and if that was the last use, it *rests*: its count is 0, but it is not
taken until everybody has ended who looked it up before; a client that does not read its replies can delay that, and
nothing else. At last its space goes back to the host, where that is wanted, and the cluster is *free*.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from blkferry.drivers.qcow2.words import CorruptError
from blkferry.graph import access
from blkferry.graph.root import asker

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.hostfile import HostFile
    from blkferry.drivers.qcow2.refcounts import Refcounts
    from blkferry.plane.services import Services

log = logging.getLogger(__name__)

RECLAIM_SECONDS = 1.0
"""How long dropped clusters wait for a flush of a client before a commit of our own frees them."""

RECLAIM_CLUSTERS = 4096
"""So many dropped clusters do not wait."""

REST_SECONDS = 5.0
"""How long closing waits for readers. All users are gone by then, so nobody should be left."""


class Dropped(NamedTuple):
    """Host clusters that lose one reference; `discard`: the host may have their space back when that was the last."""

    first: int
    clusters: int
    discard: bool


class Reclaiming:
    """The clusters on their way to be free. `commit` makes durable that they are dropped, and calls `count_down`."""

    def __init__(
        self, file: HostFile, refcounts: Refcounts, services: Services, commit: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self.file = file
        self.refcounts = refcounts
        self.services = services
        self.on_corrupt: Callable[[CorruptError], None] = _log_corruption
        self._commit = commit
        self._dropped: list[Dropped] = []
        self._dropped_clusters = 0
        self._timer: asyncio.TimerHandle | None = None
        self._counting: set[asyncio.Task[None]] = set()
        self._resting: dict[asyncio.Task[None], list[Dropped]] = {}
        self._interrupted: list[list[Dropped]] = []
        self._ended = False

    def drop(self, first: int, count: int, *, discard: bool) -> None:
        """Nothing in memory refers to these clusters any more."""
        self._dropped.append(Dropped(first, count, discard))
        self._dropped_clusters += count
        if self._ended:
            return
        if self._timer is None:
            self._timer = self.services.loop.call_later(RECLAIM_SECONDS, self._commit_soon)
        elif self._dropped_clusters >= RECLAIM_CLUSTERS > self._dropped_clusters - count:
            self._timer.cancel()
            self._commit_soon()

    def _commit_soon(self) -> None:
        self._timer = None
        self._count(self._commit)

    @property
    def any_dropped(self) -> bool:
        return bool(self._dropped)

    def take_dropped(self) -> list[Dropped]:
        """What a commit that begins now makes durable."""
        dropped, self._dropped = self._dropped, []
        self._dropped_clusters = 0
        return dropped

    def put_back(self, dropped: list[Dropped]) -> None:
        """The commit failed."""
        self._dropped = dropped + self._dropped

    def count_down(self, dropped: list[Dropped]) -> None:
        """The disk does not name these clusters any more. Not awaited: it may need commits itself."""
        if dropped:
            self._count(lambda: self._count_down(dropped))

    def _count(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self.services.loop.create_task(self._in_background(work))
        self._counting.add(task)
        task.add_done_callback(self._counting.discard)

    async def _in_background(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asker.set(None)  # it is not done for the sake of whose request led to it
        try:
            await work()
        except CorruptError as error:
            self.on_corrupt(error)
        except OSError as error:  # whoever flushes next is told; what could not be freed is a leak
            log.warning("could not write metadata: %s", error.strerror)

    async def _count_down(self, dropped: list[Dropped]) -> None:
        free: list[Dropped] = []
        try:
            for first, count, discard in sorted(dropped):  # neighbours share a refcount block
                for cluster in await self.refcounts.adjust(first, count, -1, rest=True):
                    if free and free[-1].first + free[-1].clusters == cluster and free[-1].discard == discard:
                        free[-1] = Dropped(free[-1].first, free[-1].clusters + 1, discard)
                    else:
                        free.append(Dropped(cluster, 1, discard))
                if self.refcounts.blocks.crowded:
                    await self._commit()
        finally:
            self._rest(free)

    def _rest(self, free: list[Dropped]) -> None:
        if free and not self._ended:
            task = self.services.loop.create_task(self._in_background(lambda: self._free(free)))
            self._resting[task] = free
            task.add_done_callback(lambda done: self._resting.pop(done, None))

    async def _free(self, free: list[Dropped]) -> None:
        await self.file.settle()
        bits = self.refcounts.cluster_bits
        for first, count, discard in free:
            if discard:
                try:
                    await access.discard(self.file.node, first << bits, count << bits)
                except OSError as error:
                    log.info("could not discard %d bytes at %#x: %s", count << bits, first << bits, error.strerror)
            self.refcounts.wake(first, count)

    # Life ------------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Finish counting. What rests goes on resting, if need be on another loop (`move`)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._counting:
            await asyncio.wait(self._counting)

    async def interrupt(self) -> None:
        """`pause`, and stop waiting for readers until `move`."""
        await self.pause()
        tasks = list(self._resting)
        self._interrupted += [free for task, free in self._resting.items() if not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def move(self, services: Services) -> None:
        """Live on another loop."""
        self.services = services
        interrupted, self._interrupted = self._interrupted, []
        for free in interrupted:
            services.loop.call_soon_threadsafe(self._rest, free)
        if self._dropped:
            services.loop.call_soon_threadsafe(self._commit_soon)

    async def end(self) -> None:
        """Do nothing more, whatever is left: what is not free on disk by now is a leak."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ended = True
        tasks = [*self._counting, *self._resting]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def rested(self) -> None:
        """Wait for what rests, but not for ever: what is left is free on disk anyway."""
        if self._resting:
            await asyncio.wait(self._resting, timeout=REST_SECONDS)


def _log_corruption(error: CorruptError) -> None:
    log.error("%s", error.strerror)
