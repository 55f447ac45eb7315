"""A daemon on a loop of its own in a thread of this process, for tests whose clients block.

Everything runs as it does in a real daemon, except that it shares the interpreter with the test; `call` reaches inside.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from blkferry.daemon.daemon import Daemon
from blkferry.plane.loops import new_event_loop
from blkferry.testing.nbd import Client

Value = TypeVar("Value")

TIMEOUT = 30.0
"""Seconds after which a command that does not return is a failed test."""


class DaemonThread:
    """A running daemon; use it as a context manager. `events` are those it has emitted so far."""

    def __init__(self, *, engine: str = "auto") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="blkferry-")
        self.socket = str(Path(self._directory.name) / "nbd.sock")
        self.events: list[tuple[str, dict[str, object]]] = []
        self._engine = engine
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="daemon")
        self.daemon: Daemon
        self.loop: asyncio.AbstractEventLoop

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._failure = error
        self._ready.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        async with Daemon(engine=self._engine) as self.daemon:
            self.daemon.subscribe(lambda name, data: self.events.append((name, data)))
            self._ready.set()
            await self.daemon.finished.wait()

    def call(self, work: Callable[[], Awaitable[Value]], *, timeout: float = TIMEOUT) -> Value:
        """Await `work()` on the daemon's loop, and return what it returns."""

        async def run() -> Value:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout)

    def execute(self, command: str, /, *, timeout: float = TIMEOUT, **arguments: Any) -> Any:
        """Run a QMP command; underscores in argument names stand for dashes."""
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.call(lambda: self.daemon.execute(command, spelled), timeout=timeout)

    def begin(self, command: str, **arguments: object) -> Any:
        """Begin a QMP command; returns its concurrent future."""
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        return asyncio.run_coroutine_threadsafe(self.daemon.execute(command, spelled), self.loop)

    def serve(self, **options: Any) -> str:
        """Start the NBD server on `socket`, if it does not run yet, and return that path."""
        if self.daemon.nbd_server is None:
            self.execute("nbd-server-start", addr={"type": "unix", "data": {"path": self.socket}}, **options)
        return self.socket

    def export(self, node: str, name: str = "", export_id: str = "e", **options: Any) -> str:
        """Export a node over NBD, writable unless told otherwise; return the socket's path."""
        path = self.serve()
        arguments = {"writable": True} | options
        self.execute("block-export-add", type="nbd", id=export_id, node_name=node, name=name, **arguments)
        return path

    def client(self, export: str = "", **options: Any) -> Client:
        """A client that is connected to an export."""
        return Client.connect(self.socket, export, **options)

    def stop(self) -> None:
        """End the daemon in order, and raise what went wrong in it."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.daemon.finished.set)
        self._thread.join(TIMEOUT)
        self._directory.cleanup()
        if self._thread.is_alive():
            raise TimeoutError("the daemon did not end")
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
