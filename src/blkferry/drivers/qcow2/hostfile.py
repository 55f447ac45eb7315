"""The node an image's bytes are in, as the rest of the driver sees it: pieces by offset, growth, and who uses them.

The same serves for the image file and for an external data file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blkferry.extent import Effort
from blkferry.graph import access
from blkferry.graph.access import Miss
from blkferry.graph.node import Node, depends_on
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.plane.storage import Storage

GROWTH = 1 << 20
"""A file that has to grow grows by this many bytes at once; what is not used in the end is cut off on closing."""


class HostFile:
    """A child node of the driver. All offsets are host offsets, in bytes."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._place: tuple[Storage, int] | None = None
        self.grown = False
        self.needed = node.length
        """Up to where the file is used; behind that there are only zeroes that it grew by in advance."""

    @property
    def length(self) -> int:
        return self.node.length

    async def get(self, offset: int, length: int) -> bytearray:
        """The bytes there; zeroes behind the end of the file."""
        data = bytearray(length)
        there = min(length, self.node.length - offset)
        if there > 0:
            with memoryview(data) as view:
                await access.read(self.node, offset, view[:there])
        return data

    async def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write into the file, making it longer where that is needed."""
        view = memoryview(data)
        if offset + len(view) > self.needed:
            await self.extend(offset + len(view))
        if not access.write_now(self.node, offset, view):
            await access.write(self.node, offset, view)

    def place(self) -> tuple[Storage, int] | None:
        """The storage behind the whole file and how far its offsets are shifted, if buffered writes there are all it
        takes; None where writes have to go through the node.
        """
        if self._place is None and self.node.length:
            runs = access.resolve(self.node, 0, self.node.length, Effort.PLACE)
            if not isinstance(runs, Miss) and len(runs) == 1:
                (run,) = runs
                if run.in_place and not run.marks and run.storage is not None and not run.storage.direct:
                    self._place = (run.storage, run.offset)
        return self._place

    def forget_place(self) -> None:
        """The node says that lookups are void."""
        self._place = None

    def extend_now(self, end: int) -> bool:
        """Make the file at least `end` bytes long, at once; the new bytes read as zeroes. Raises OSError."""
        if end > self.node.length:
            if not self.node.grow(align_up(end, GROWTH)):
                return False
            self.grown = True
        self.needed = max(self.needed, end)
        return True

    async def extend(self, end: int) -> None:
        """The same, however long it takes. Raises OSError or Error."""
        if not self.extend_now(end):
            await self.node.resize(end)
            self.needed = max(self.needed, end)

    def storages(self) -> list[Storage]:
        """Every descriptor that the bytes may be in."""
        return [node.storage for node in depends_on(self.node) if node.storage is not None]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count as somebody who still reads from a place that was looked up before."""
        epoch = self.node.readers.begin()
        try:
            yield
        finally:
            self.node.readers.end(epoch)

    async def settle(self) -> None:
        """Wait until nobody moves bytes any more who looked up their place before now."""
        for node in depends_on(self.node):
            await node.readers.settle()
            if node.storage is not None:
                await node.storage.readers.settle()
                await node.storage.writers.settle()

    async def settle_writers(self) -> None:
        """The same, only for those who write."""
        for storage in self.storages():
            await storage.writers.settle()
