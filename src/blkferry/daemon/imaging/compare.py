"""Whether two images have the same content."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from blkferry.daemon.imaging.copying import (
    Buffers,
    Progress,
    all_zero,
    ignore_progress,
    joined,
    pieces,
    pipelined,
    runs_of,
)
from blkferry.daemon.imaging.mapping import Stretch, stretches
from blkferry.daemon.imaging.names import ImageName, opened
from blkferry.errors import Error
from blkferry.extent import Content

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.loan import Loan
    from blkferry.graph.node import Node


class Difference(enum.Enum):
    """How two images differ."""

    CONTENT = "content"
    SIZE = "size"
    ALLOCATION = "allocation"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How they differ, and where; None when they are the same. `sizes_differ` also where that does not count."""

    difference: Difference | None
    offset: int = 0
    sizes_differ: bool = False


async def compare(
    daemon: Daemon,
    one: ImageName,
    other: ImageName,
    *,
    strict: bool = False,
    progress: Progress = ignore_progress,
) -> Comparison:
    """Compare two images. One may be longer, by zeroes; with `strict` that and allocation count too. Raises Error."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened(daemon, one, "compare"))
        second = await stack.enter_async_context(opened(daemon, other, "compare"))
        sizes_differ = first.node.length != second.node.length
        if strict and sizes_differ:
            return Comparison(Difference.SIZE, sizes_differ=True)
        if strict and (at := await first.run(_allocation_differs(first.node, second.node))) is not None:
            return Comparison(Difference.ALLOCATION, at)
        offset = await first.run(_Comparing(first, second, progress).run())
        return Comparison(None if offset is None else Difference.CONTENT, offset or 0, sizes_differ)


async def _allocation_differs(one: Node, other: Node) -> int | None:
    """Where what is stored differs, although it may read alike."""
    right = stretches(other)
    upper = await anext(right, None)
    async for lower in stretches(one):
        end = lower.start + lower.length
        while upper is not None and upper.start < end:
            if _kind(lower) != _kind(upper):
                return max(lower.start, upper.start)
            if upper.start + upper.length > end:
                break
            upper = await anext(right, None)
    return None


def _kind(stretch: Stretch) -> tuple[bool, ...]:
    return stretch.data, stretch.zero, stretch.present, stretch.compressed, stretch.offset is not None


class _Part(NamedTuple):
    start: int
    length: int
    reads: tuple[bool, bool]
    """Which of the two has to be read; the other one is all zero there."""


class _Found(Exception):  # noqa: N818 - it ends the pipeline
    def __init__(self, offset: int) -> None:
        self.offset = offset


class _Comparing:
    """One comparison at work."""

    def __init__(self, one: Loan, other: Loan, progress: Progress) -> None:
        self._loans = (one, other)
        self._progress = progress
        self._buffers = Buffers()
        self._total = max(one.node.length, other.node.length)

    async def run(self) -> int | None:
        """The first offset at which they differ."""
        self._progress(0, self._total)
        try:
            await pipelined(self._parts(), self._read, self._judge)
        except _Found as found:
            return found.offset
        self._progress(self._total, self._total)
        return None

    async def _parts(self) -> AsyncIterator[_Part]:
        right = _contents(self._loans[1].node, self._total)
        upper = await anext(right, None)
        async for start, length, zero in _contents(self._loans[0].node, self._total):
            at, end = start, start + length
            while at < end:
                assert upper is not None
                stop = min(end, upper[0] + upper[1])
                if not (zero and upper[2]):
                    for begin, size in pieces(at, stop):
                        yield _Part(begin, size, (not zero, not upper[2]))
                else:
                    self._progress(stop, self._total)
                at = stop
                if at == upper[0] + upper[1]:
                    upper = await anext(right, None)

    async def _read(self, part: _Part) -> list[bytearray]:
        found = []
        for loan, wanted in zip(self._loans, part.reads, strict=True):
            if wanted:
                buffer = self._buffers.take()
                try:
                    await loan.root.read(part.start, memoryview(buffer)[: part.length])
                except OSError as error:
                    raise Error.from_oserror(f"Error while reading offset {part.start}", error) from error
                found.append(buffer)
        return found

    async def _judge(self, part: _Part, found: list[bytearray]) -> None:
        if len(found) == 2:
            one, other = (memoryview(each)[: part.length] for each in found)
            if found[0] != found[1] and (at := _first_difference(one, other)) is not None:
                raise _Found(part.start + at)
        elif not all_zero(found[0], part.length):
            raise _Found(part.start + next(at for at in range(part.length) if found[0][at]))
        for buffer in found:
            self._buffers.give_back(buffer)
        self._progress(part.start + part.length, self._total)


def _first_difference(one: memoryview, other: memoryview) -> int | None:
    low, high = 0, len(one)
    if bytes(one) == bytes(other):
        return None
    while high - low > 1:  # the first difference is in here
        middle = (low + high) // 2
        if bytes(one[low:middle]) == bytes(other[low:middle]):
            low = middle
        else:
            high = middle
    return low


async def _zeroes(node: Node) -> AsyncIterator[tuple[int, int, bool]]:
    async for run in runs_of(node):
        yield run.start, run.start + run.length, run.content is Content.ZERO


async def _contents(node: Node, total: int) -> AsyncIterator[tuple[int, int, bool]]:
    """Stretches (start, length, known to be zero), with zeroes behind the end."""
    async for start, end, zero in joined(_zeroes(node)):
        yield start, end - start, zero
    if node.length < total:
        yield node.length, total - node.length, True
