"""Counting what is in flight, and who waits for whom. Owned by one loop at a time; moves with its owner while idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


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


class RangeLock:
    """Holders of overlapping ranges go one after the other, in the order they came."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int, asyncio.Future[None]]] = []

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
