"""Threads for calls that may never return."""

from __future__ import annotations

import asyncio
import threading

import pytest

from blkferry.plane.patience import within


async def test_what_a_call_returns_or_raises():
    assert await within(10, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await within(10, divmod, 7, 0)


class Slow:
    """A call that ends when told to, and what becomes of its result."""

    def __init__(self) -> None:
        self.begun, self.may_end, self.undone = threading.Event(), threading.Event(), threading.Event()
        self.result = object()

    def call(self) -> object:
        self.begun.set()
        self.may_end.wait(10)
        return self.result

    def undo(self, result: object) -> None:
        assert result is self.result
        self.undone.set()


async def test_a_late_result_is_undone():
    slow = Slow()
    with pytest.raises(TimeoutError):
        await within(0.01, slow.call, undo=slow.undo)
    assert not slow.undone.is_set()
    slow.may_end.set()
    assert slow.undone.wait(10)


async def test_a_result_that_nobody_waits_for_is_undone():
    slow = Slow()
    waiting = asyncio.create_task(within(10, slow.call, undo=slow.undo))
    await asyncio.to_thread(slow.begun.wait, 10)
    slow.may_end.set()
    join("blkferry-patience")  # here, so that the loop has not heard of it yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert slow.undone.wait(10)


def test_a_loop_that_has_ended_is_no_reason_to_complain():
    slow = Slow()
    with pytest.raises(TimeoutError):
        asyncio.run(within(0.01, slow.call, undo=slow.undo))
    slow.may_end.set()
    assert slow.undone.wait(10)
    join("blkferry-patience")


def join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(10)
