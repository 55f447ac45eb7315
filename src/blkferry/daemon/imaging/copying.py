"""What copying has in common: reads that run ahead of writes, buffers used again, and zeroes found in data."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from blkferry.extent import Effort
from blkferry.graph import access
from blkferry.graph.access import Run
from blkferry.units import align_down, align_up

if TYPE_CHECKING:
    from blkferry.graph.node import Node
    from blkferry.graph.root import Root

PIECE = 1 << 20
"""Bytes that are moved at once."""

AHEAD = 8
"""Pieces that are being read while an earlier one is written."""

MAX_RUNS_LENGTH = 1 << 34
"""How far a lookup is asked to look: a table of runs stays small, and a progress bar moves."""

MAX_JOINED = 1 << 28
"""A longer range is handed on before it is known where it ends: reading begins, and a progress bar moves."""

Progress = Callable[[int, int], None]
"""Is told how much is done, and of how much."""

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")
Kind = TypeVar("Kind")


def ignore_progress(done: int, total: int) -> None:
    """The callback of those who do not want to know."""
    del done, total


async def runs_of(node: Node, start: int = 0, end: int | None = None) -> AsyncIterator[Run]:
    """What a node holds, told from zeroes where that can be known."""
    end = node.length if end is None else end
    while start < end:
        length = min(end - start, MAX_RUNS_LENGTH)
        for run in await access.load_runs(node, start, length, Effort.ALLOCATION):
            yield run
            start += run.length


async def joined(ranges: AsyncIterator[tuple[int, int, Kind]]) -> AsyncIterator[tuple[int, int, Kind]]:
    """Put neighbouring ranges (start, end, kind) of the same kind together: an image may be in many small parts."""
    last: tuple[int, int, Kind] | None = None
    async for start, end, kind in ranges:
        if last is not None and last[1] == start and last[2] == kind and end - last[0] <= MAX_JOINED:
            last = (last[0], end, kind)
            continue
        if last is not None:
            yield last
        last = (start, end, kind)
    if last is not None:
        yield last


def pieces(start: int, end: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of `size`: start and length of each piece."""
    while start < end:
        stop = min(end, align_down(start, size) + size)
        yield start, stop - start
        start = stop


async def whole_units(
    ranges: AsyncIterator[tuple[int, int, Kind]], unit: int, length: int, size: int = PIECE
) -> AsyncIterator[tuple[int, int]]:
    """Pieces (start, length) of whole units that cover ascending ranges (start, end, ...), each of them once."""
    done = 0
    async for start, end, _ in ranges:
        first = max(align_down(start, unit), done)
        done = max(done, min(align_up(end, unit), length))
        for piece in pieces(first, done, max(size, unit)):
            yield piece


async def pipelined(
    items: AsyncIterator[Item],
    fetch: Callable[[Item], Awaitable[Fetched]],
    store: Callable[[Item, Fetched], Awaitable[None]],
    ahead: int = AHEAD,
) -> None:
    """Fetch several items at a time and store them one after the other, in their order."""
    waiting: deque[tuple[Item, asyncio.Future[Fetched]]] = deque()
    try:
        async for item in items:
            waiting.append((item, asyncio.ensure_future(fetch(item))))
            if len(waiting) >= ahead:
                await store(waiting[0][0], await waiting[0][1])
                waiting.popleft()
        while waiting:
            await store(waiting[0][0], await waiting[0][1])
            waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()
        if waiting:
            await asyncio.gather(*(future for _, future in waiting), return_exceptions=True)


class Buffers:
    """Memory for pieces that is used again: new memory costs as much as copying into it."""

    def __init__(self, size: int = PIECE) -> None:
        self._size = size
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(self._size)

    def give_back(self, buffer: bytearray) -> None:
        self._free.append(buffer)


_ZEROES = bytes(2 << 20)


def all_zero(data: bytearray, length: int) -> bool:
    """Whether the first `length` bytes (2 MiB at most) are zeroes."""
    return data.startswith(_ZEROES[:length])


def zero_runs(data: bytearray, length: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """Cut the first `length` bytes into stretches (start, length, all zero), at multiples of `unit`."""
    if all_zero(data, length):
        yield 0, length, True
        return
    zero = _ZEROES[:unit]
    begin, was_zero, at = 0, data.startswith(zero), unit
    while at < length:
        part = zero if at + unit <= length else _ZEROES[: length - at]
        if data.startswith(part, at) != was_zero:
            yield begin, at - begin, was_zero
            begin, was_zero = at, not was_zero
        at += unit
    yield begin, length - begin, was_zero


async def put(root: Root, start: int, view: memoryview) -> None:
    """Write, at once where that is possible."""
    if not root.write_now(start, view):
        await root.write(start, view)
