"""What one loop offers to everything that runs on it: an engine, buffers, scratch memory, a way in for other threads.

One Services object belongs to one loop and one thread (rule R1). Node trees and exports hold a reference to the
services they live on; moving them to another thread is giving them another reference while they are idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from blkferry.errors import Error, ErrorKind
from blkferry.plane.buffers import BufferPool
from blkferry.plane.engine import Engine
from blkferry.plane.ring import Ring, RingUnavailable
from blkferry.plane.syscalls import CacheStat, precise_sleeps
from blkferry.plane.workers import Workers

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SCRATCH_IN = 256 << 10
"""Receive scratch, shared by all connections of a loop: about what a socket buffer holds."""

SCRATCH_OUT = 1 << 20
"""Reply scratch, shared likewise: one turn's replies are built here and sent at once."""

POLL_SECONDS = 32768e-9
"""How long to wait for a prompt client without sleeping: QEMU's default for iothreads, which can set their own."""

SLOT_UNIT = 4096
"""Reads of multiples of this are common; there are few of them below the size that goes by sendfile."""

MAX_SLOTS = 512
"""Pieces kept of each length: more than fit side by side into the scratch memory, whatever is in front of them."""

BUFFER_LIMIT = 512 << 20
"""Memory for requests in flight on one loop; beyond it connections wait instead of the machine swapping."""


class Services:
    """Loop services. `engine` may be "auto" (io_uring, else threads), "io_uring" or "threads".

    `poll_seconds` is how long a turn may wait for a prompt client without sleeping; 0 never waits.

    Raises Error(UNSUPPORTED) when "io_uring" was asked for and the kernel refuses it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, engine: str = "auto", poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.loop = loop
        self.poll_seconds = poll_seconds
        self.buffers = BufferPool(BUFFER_LIMIT, loop.call_soon)
        self.cache = CacheStat()
        self.scratch_in = memoryview(bytearray(SCRATCH_IN))
        self.scratch_out = bytearray(SCRATCH_OUT)
        self.scratch_view = memoryview(self.scratch_out)
        self._slots: dict[int, dict[int, tuple[memoryview]]] = {}
        self._after: list[Callable[[], None]] = []
        self._threads: Workers | None = None
        self.last_served: object = None  # whose turn it was; for deciding whether a client is alone
        self.engine: Engine = self._choose(engine)
        precise_sleeps()

    def _choose(self, wanted: str) -> Engine:
        if wanted == "threads":
            return self.threads
        try:
            return Ring(self.loop, self.run_after_batch)
        except RingUnavailable as refusal:
            if wanted == "io_uring":
                raise Error(
                    ErrorKind.UNSUPPORTED, f"Unable to use io_uring: {refusal}", hint="Use aio=threads."
                ) from refusal
            log.info("io_uring is not available (%s); using worker threads", refusal)
            return self.threads

    @property
    def threads(self) -> Workers:
        """The worker threads, for those who ask for them by name (aio=threads)."""
        if self._threads is None:
            self._threads = Workers(self.loop, self.run_after_batch)
        return self._threads

    def after_batch(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the completions at hand have all been delivered: replies go out together."""
        self._after.append(callback)

    def run_after_batch(self) -> None:
        """Called by the engines at the end of a batch of completions."""
        while self._after:
            callbacks, self._after = self._after, []
            for callback in callbacks:
                callback()

    def read_slots(self, length: int) -> dict[int, tuple[memoryview]]:
        """Pieces of `length` bytes of the reply scratch, by where they start; the caller adds what is missing.

        Making such a piece takes as long as half a read, so those of common lengths are kept.
        """
        slots = self._slots.get(length)
        if slots is None:
            slots = {}
            if length % SLOT_UNIT == 0:
                self._slots[length] = slots
        return slots

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work` on this loop, from whichever loop the caller runs on."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def in_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Run a blocking control call (open, a lock scan) in the default executor."""
        return await asyncio.get_running_loop().run_in_executor(None, call, *arguments)

    def close(self) -> None:
        """End the engines. Everything that lived here must be gone."""
        self.engine.close()
        if self._threads is not None and self._threads is not self.engine:
            self._threads.close()
