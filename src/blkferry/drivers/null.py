"""`null-co`: a disk that is not there. Reads give zeroes, writes are forgotten; for tests and benchmarks."""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content, Effort, Extent
from blkferry.graph.graph import Opening
from blkferry.graph.node import Node
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.qapi import Doc, Uint64, branch
from blkferry.units import GIB, SECTOR, align_up


@branch
class BlockdevOptionsNull(BlockdevOptions):
    """A disk that is not there."""

    driver: Literal["null-co"] = "null-co"
    size: Annotated[int, Doc("size in bytes", since="2.9")] = GIB
    latency_ns: Annotated[Uint64, Doc("how long each request takes, in nanoseconds", since="2.9")] = 0
    read_zeroes: Annotated[bool, Doc("accepted for compatibility: reads always give zeroes", since="4.1")] = False


class NullCo(Node):
    """Zeroes to read, nowhere to write."""

    driver: ClassVar[str] = "null-co"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsNull
    options: BlockdevOptionsNull

    async def open(self, opening: Opening) -> None:
        del opening
        if self.options.size < 0:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'size' expects a size of 0 bytes or more")
        self.length = align_up(self.options.size, SECTOR)

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        opaque = self.options.latency_ns and effort is Effort.PLACE
        return [Extent(start, length, Content.OPAQUE if opaque else Content.ZERO, start, allocated=False)]

    async def read(self, start: int, view: memoryview) -> None:
        del start
        await self._delay()
        view[:] = bytes(len(view))

    async def write(self, start: int, view: memoryview) -> None:
        del start, view
        await self._delay()

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        del start, length, unmap, fast
        await self._delay()

    async def discard(self, start: int, length: int) -> None:
        del start, length
        await self._delay()

    async def prefetch(self, start: int, length: int) -> None:
        del start, length

    async def flush(self) -> None:
        await self._delay()

    async def _delay(self) -> None:
        if self.options.latency_ns:
            await asyncio.sleep(self.options.latency_ns / 1e9)

    def filename(self) -> str:
        return "null-co://"
