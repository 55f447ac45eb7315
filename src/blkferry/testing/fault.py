"""A node that passes everything through to another one, and fails or waits where a test tells it to.

It answers lookups with OPAQUE: nothing on the fast path can get around it. It is put into a graph by `insert`, not by
blockdev-add, so that no user can ever find it in the schema.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar

from blkferry.extent import Content, Effort, Extent
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.graph.permissions import Edge
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions

VERBS = ("read", "write", "remap", "discard", "prefetch", "flush")


class Fault(Node):
    """`errors` maps a verb to the errno it fails with; `gates` maps a verb to an event it waits for first.

    `calls` lists the verbs that have been called, with what they were called for.
    """

    driver: ClassVar[str] = "fault"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptions

    async def open(self, opening: Opening) -> None:
        raise NotImplementedError("insert it")

    def place(self, below: Node) -> None:
        """Stand above a node."""
        edge = Edge(self, below, "file")
        self.children["file"] = edge
        below.parents.append(edge)
        self._below = Root(below, self.describe())
        self.length = below.length
        self.unmaps = True
        self.errors: dict[str, int | Callable[[], int]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[Any, ...]] = []

    async def _enter(self, verb: str, *facts: Any) -> None:
        self.calls.append((verb, *facts))
        if verb in self.gates:
            await self.gates[verb].wait()
        code = self.errors.get(verb, 0)
        if callable(code):
            code = code()
        if code:
            raise OSError(code, os.strerror(code))

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        del effort
        return [Extent(start, length, Content.OPAQUE, start)]

    async def read(self, start: int, view: memoryview) -> None:
        await self._enter("read", start, len(view))
        await self._below.read(start, view)

    async def write(self, start: int, view: memoryview) -> None:
        await self._enter("write", start, len(view))
        await self._below.write(start, view)

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        await self._enter("remap", start, length)
        await self._below.write_zeroes(start, length, unmap=unmap, fast=fast)

    async def discard(self, start: int, length: int) -> None:
        await self._enter("discard", start, length)
        await self._below.discard(start, length)

    async def prefetch(self, start: int, length: int) -> None:
        await self._enter("prefetch", start, length)
        await self._below.prefetch(start, length)

    async def flush(self) -> None:
        await self._enter("flush")
        await self._below.flush()


def insert(graph: Graph, name: str, below: str) -> Fault:
    """Put a node called `name` above the node called `below`. Call it on the daemon's loop."""
    child = graph.find(below)
    node = Fault(name, BlockdevOptions(driver="fault", node_name=name), child.services, read_only=child.read_only)
    node.place(child)
    if name in graph.nodes:
        raise FileExistsError(errno.EEXIST, f"there is a node called '{name}'")
    graph.nodes[name] = node
    return node
