"""`iothread`: a thread with a loop of its own, where exports and their node trees can live (rule R1)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.base import BlkObject
from blkferry.plane.loops import new_event_loop
from blkferry.plane.services import Services
from blkferry.schema.qom import IothreadProperties, ObjectOptions


class Iothread(BlkObject):
    """The running thread, and the `services` of its loop."""

    kind: ClassVar[str] = "iothread"
    options_type: ClassVar[type[ObjectOptions]] = IothreadProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, IothreadProperties)
        super().__init__(options)
        self.options = options
        self.services: Services
        self._loop: asyncio.AbstractEventLoop
        if options.thread_pool_min > options.thread_pool_max or not options.thread_pool_max:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "bad thread-pool-min/thread-pool-max values",
                hint="thread-pool-max must be at least 1 and not below thread-pool-min.",
            )

    async def start(self, graph: Graph, engine: str) -> None:
        """Start the thread and wait until its loop runs."""
        del graph
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        caller = asyncio.get_running_loop()

        def run() -> None:
            self._loop = new_event_loop()
            asyncio.set_event_loop(self._loop)
            try:
                self._loop.run_until_complete(self._prepare(engine))
            except BaseException as error:  # noqa: BLE001 - the starter gets it
                caller.call_soon_threadsafe(started.set_exception, error)
                self._loop.close()
                return
            caller.call_soon_threadsafe(started.set_result, None)
            try:
                self._loop.run_forever()
            finally:
                self.services.close()
                self._loop.close()

        self._thread = threading.Thread(target=run, name=f"blkferry-{self.id}", daemon=True)
        self._thread.start()
        await started

    async def _prepare(self, engine: str) -> None:
        # The ring belongs to the thread that makes it.
        self.services = Services(self._loop, engine=engine, poll_seconds=self.options.poll_max_ns / 1e9)

    async def stop(self) -> None:
        """End the thread; nothing may live there any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def users(self, graph: Graph) -> Iterator[str]:
        """The nodes that live on its loop, and who has them."""
        yield from (node.describe() for node in graph.nodes.values() if node.services is self.services)
        yield from (user.root.describe() for user in graph.users if user.root.services is self.services)
