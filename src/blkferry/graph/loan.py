"""A node that is lent to one piece of work: to the driver that makes an image in it, to a job.

Whoever has the loan uses `Loan.run`, and so stands still with all other users while the graph changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.plane.drain import InFlight

if TYPE_CHECKING:
    from blkferry.graph.graph import Graph
    from blkferry.graph.node import Node
    from blkferry.schema.block import BlockdevOptions

Result = TypeVar("Result")


class Loan:
    """The use of a node until the loan ends. It stays on its loop meanwhile, unless a user of the tree must move it."""

    pinned = True

    def __init__(self, root: Root) -> None:
        self.root = root
        self._running = InFlight()
        self._going = asyncio.Event()
        self._going.set()

    @property
    def node(self) -> Node:
        return self.root.node

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work` on the loop of the node. Called on the main loop.

        The work must not wait for `Graph.changing`: whoever holds that may be waiting for the work.
        """
        while not self._going.is_set():
            await self._going.wait()
        self._running.begin()
        try:
            return await self.root.services.run(work)
        finally:
            self._running.end()

    async def pause(self) -> None:
        """Begin nothing; return when what has begun is over. For the graph."""
        self._going.clear()
        await self._running.idle()

    async def resume(self) -> None:
        """Go on."""
        self._going.set()


@asynccontextmanager
async def lend(
    graph: Graph,
    reference: str | BlockdevOptions,
    description: str,
    used: Permission,
    shared: Permission = ALL,
    *,
    beside: Loan | None = None,
) -> AsyncIterator[Loan]:
    """Use the node that `reference` names, or one that is opened by these options and closed again at the end.

    With `beside` it lives on the loop of that loan's node. Takes `Graph.changing`. Raises Error.
    """
    async with graph.changing:
        inline = not isinstance(reference, str)
        node = (
            graph.find(reference, device=reference) if isinstance(reference, str) else await graph.open(reference, None)
        )
        try:
            if beside is not None:
                await graph.move(node, beside.node.services)
            loan = Loan(Root(node, description))
            await node.services.run(loan.root.attach(used, shared))
        except BaseException:
            if inline:
                await graph.close_node(node)
            raise
        graph.users.append(loan)
    try:
        yield loan
    finally:
        async with graph.changing:
            graph.users.remove(loan)
            await loan.root.services.run(loan.root.detach())
            if inline:
                await graph.close_node(node)
