"""Counting what is in flight, and who waits for whom. Owned by one loop at a time; moves with its owner while idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

Result = TypeVar("Result")


class InFlight:
    """Operations that have begun and not ended."""

    __slots__ = ("_waiters", "count")

    def __init__(self) -> None:
        self.count = 0
        self._waiters: list[asyncio.Future[None]] = []

    def begin(self) -> None:
        self.count += 1

    def end(self) -> None:
        self.count -= 1
        if not self.count and self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self.count:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter


class Uses:
    """Operations on places that a lookup named earlier: before a place means something else, they must have ended.

    New ones may begin all the time, so nobody can wait for there to be none. They are counted by epochs instead: who
    waits opens a new epoch, and goes on when the older ones are over.
    """

    __slots__ = ("_counts", "_epoch", "_waiters", "count")

    def __init__(self) -> None:
        self.count = 0
        self._epoch = 0
        self._counts: dict[int, int] = {}
        self._waiters: list[tuple[int, Callable[[], None]]] = []

    def begin(self) -> int:
        """Count one more; `end` takes what this returns."""
        epoch = self._epoch
        self.count += 1
        self._counts[epoch] = self._counts.get(epoch, 0) + 1
        return epoch

    def end(self, epoch: int) -> None:
        """The operation whose `begin` returned `epoch` is over."""
        self.count -= 1
        left = self._counts[epoch] - 1
        if left:
            self._counts[epoch] = left
            return
        del self._counts[epoch]
        if self._waiters:
            oldest = min(self._counts, default=self._epoch)
            ready = [callback for (until, callback) in self._waiters if until <= oldest]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > oldest]
            for callback in ready:
                callback()

    def after(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when everything that has begun by now is over; at once if nothing has."""
        if not self.count:
            callback()
            return
        self._epoch += 1
        self._waiters.append((self._epoch, callback))

    async def settle(self) -> None:
        """Wait until everything that has begun by now is over."""
        if self.count:
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.after(lambda: None if settled.done() else settled.set_result(None))
            await settled

    async def idle(self) -> None:
        """Wait until nothing is going on."""
        while self.count:
            await self.settle()


class RangeLock:
    """Holders of overlapping ranges go one after the other, in the order they came."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int, asyncio.Future[None]]] = []

    def busy(self, start: int, end: int) -> bool:
        """Whether somebody holds, or waits for, a part of the range."""
        return any(s < end and start < e for (s, e, _) in self._held)

    @contextlib.asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold the half-open range."""
        earlier = [done for (s, e, done) in self._held if s < end and start < e]
        entry = (start, end, asyncio.get_running_loop().create_future())
        self._held.append(entry)
        try:
            for done in earlier:
                await asyncio.shield(done)
            yield
        finally:
            self._held.remove(entry)
            entry[2].set_result(None)


class TaskLock:
    """A lock that the task which holds it may take again."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._holder: asyncio.Task[object] | None = None
        self._depth = 0

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if self._holder is not task:
            await self._lock.acquire()
            self._holder = task
        self._depth += 1

    async def __aexit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._lock.release()


async def uninterrupted(future: asyncio.Future[Result]) -> Result:
    """Await what must not be left half done: a cancelled caller still waits for its end, and is cancelled then."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return future.result()
