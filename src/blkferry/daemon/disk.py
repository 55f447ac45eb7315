"""A node in the hands of a Python program: read, write, zero, discard, map, flush."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from blkferry.errors import Error, ErrorKind
from blkferry.extent import Status, coalesce
from blkferry.graph.graph import Graph
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.plane.drain import InFlight

Result = TypeVar("Result")


class Disk:
    """One node, held open for a program; made by `Daemon.open` and `Daemon.attach`.

    Offsets and lengths are bytes, of any alignment. Every method raises Error(INVALID_ARGUMENT) for a range that does
    not lie inside the disk, and OSError with the storage's errno when the storage fails. All are to be called on the
    loop the daemon was started on.
    """

    pinned = False

    def __init__(self, graph: Graph, root: Root, *, writable: bool, owns_node: bool) -> None:
        self._graph = graph
        self.root = root
        self._operations = InFlight()
        self._movable = asyncio.Event()
        self._movable.set()
        self._owned = root.node if owns_node else None  # not always the one it uses: an overlay may come
        self.writable = writable

    @classmethod
    async def attach(cls, graph: Graph, node: Node, *, writable: bool, owns_node: bool = False) -> Self:
        """Become a user of `node`. Raises Error when it cannot be had like that."""
        used = Permission.CONSISTENT_READ | (Permission.WRITE if writable else Permission(0))
        root = Root(node, "a Python program")
        async with graph.changing:
            await node.services.run(root.attach(used, ALL))
        disk = cls(graph, root, writable=writable, owns_node=owns_node)
        graph.users.append(disk)
        return disk

    @property
    def name(self) -> str:
        """The name of the node."""
        return self.root.node.name

    @property
    def size(self) -> int:
        """The length of the node in bytes."""
        return self.root.node.length

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`."""
        self._check(offset, length)
        data = bytearray(length)
        await self._run(self.root.read(offset, memoryview(data)))
        return bytes(data)

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is durable on return, otherwise after the next `flush`."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view), writing=True)
        await self._run(self.root.write(offset, view, fua=fua))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeroes; `unmap` allows a hole where the node's `discard` option does."""
        self._check(offset, length, writing=True)
        await self._run(self.root.write_zeroes(offset, length, unmap=unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Give space back where the node's `discard` option wants it; the range then reads as before or as zeroes."""
        self._check(offset, length, writing=True)
        await self._run(self.root.discard(offset, length))

    async def flush(self) -> None:
        """Make everything written so far durable."""
        await self._run(self.root.flush())

    async def map(self, offset: int = 0, length: int | None = None) -> list[Status]:
        """What is there: stretches that read as zero or not, with host space behind them or not."""
        length = self.size - offset if length is None else length
        self._check(offset, length)
        found: list[Status] = []
        end = offset + length
        while offset < end:
            part = await self._run(self.root.status(offset, end - offset))
            offset += sum(stretch.length for stretch in part)
            found += part
        return coalesce(found)

    async def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run one operation where the node lives, unless it is just moving."""
        while not self._movable.is_set():
            await self._movable.wait()
        self._operations.begin()
        try:
            return await self.root.services.run(work)
        finally:
            self._operations.end()

    async def pause(self) -> None:
        """Start no operation; return when none is in flight. For the graph, which is about to move the node."""
        self._movable.clear()
        await self._operations.idle()

    async def resume(self) -> None:
        """Go on."""
        self._movable.set()

    def _check(self, offset: int, length: int, *, writing: bool = False) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"{length} bytes at offset {offset} do not lie inside disk '{self.name}' of {self.size} bytes",
            )
        if writing and not self.writable:
            raise Error(ErrorKind.DENIED, f"Disk '{self.name}' was not opened for writing", hint="Use writable=True.")

    async def close(self) -> None:
        """Let go of the node, and remove it if `Daemon.open` made it and nothing else uses it."""
        if self not in self._graph.users:
            return
        async with self._graph.changing:
            self._graph.users.remove(self)
            await self.root.services.run(self.root.detach())
        node = self._owned
        if node is not None and not node.parents and self._graph.nodes.get(node.name) is node:
            await self._graph.remove(node.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
