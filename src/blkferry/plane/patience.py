"""Calls that may never return, such as those that touch a file system whose server is gone or is ourselves.

Each gets a thread of its own, which does not keep the process from ending, and a time limit. The loop's executor would
do neither: its threads are few, and the interpreter waits for them when it exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


async def within(
    seconds: float, call: Callable[..., Result], *arguments: Any, undo: Callable[[Result], object] | None = None
) -> Result:
    """Have a thread call this, and return what it returns or raise what it raises.

    Raises TimeoutError after that many seconds. What the call brings when nobody waits for it any more, because of that
    or of a cancellation, is handed to `undo`, which may block.
    """
    attempt: _Attempt[Result] = _Attempt(asyncio.get_running_loop(), undo)
    threading.Thread(target=attempt.run, args=(call, arguments), name="blkferry-patience", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await attempt.ended.wait()
    except BaseException:
        attempt.abandon()
        raise
    return attempt.result()


class _Attempt(Generic[Result]):
    """One call. The lock decides who gets the result: whoever waits, or `undo`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, undo: Callable[[Result], object] | None) -> None:
        self.ended = asyncio.Event()
        self._loop = loop
        self._undo = undo
        self._lock = threading.Lock()
        self._abandoned = False
        self._results: list[Result] = []
        self._error: BaseException | None = None

    def run(self, call: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        try:
            result = call(*arguments)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._error = error
        else:
            with self._lock:
                self._results.append(result)
                abandoned = self._abandoned
            if abandoned:
                self._undo_all()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self.ended.set)

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._results[0]

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            there = bool(self._results)
        if there:
            threading.Thread(target=self._undo_all, daemon=True).start()

    def _undo_all(self) -> None:
        for result in self._results:
            if self._undo is not None:
                self._undo(result)
