"""The way into the graph: what an export, a job or a Python caller holds to use a node.

A root says what its user may do, how durable its writes are, and hears when lookups are void. Failures are OSError.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from blkferry.extent import Effort, Status
from blkferry.graph import access, permissions
from blkferry.graph.access import Miss, Run
from blkferry.graph.node import Node, depends_on
from blkferry.graph.permissions import ALL, NONE, Edge, Permission
from blkferry.plane.drain import InFlight
from blkferry.schema.block import BlockdevDetectZeroesOptions

if TYPE_CHECKING:
    from blkferry.plane.engine import Done
    from blkferry.plane.services import Services

asker: ContextVar[Root | None] = ContextVar("asker", default=None)
"""For whose sake a node is asked for something. Drivers that wait for others outside can give up for one user."""


class Root:
    """A user's hold on a node.

    `on_retire` is called when what lookups said of a range may no longer be used; with (0, None) that is all of it.
    Users count every operation that is not finished within one turn of the loop in `in_flight`. With `writethrough`
    every change is durable when it returns. `given_up`: whatever would have to wait for something outside fails.
    """

    def __init__(
        self, node: Node, description: str, on_retire: Callable[[int, int | None], None] = lambda _start, _end: None
    ) -> None:
        self.edge = Edge(self, node, "root")
        self._description = description
        self._on_retire = on_retire
        self.in_flight = InFlight()
        self.writethrough = False
        self.given_up = False

    @property
    def node(self) -> Node:
        return self.edge.node

    @property
    def services(self) -> Services:
        return self.edge.node.services

    def describe(self) -> str:
        return self._description

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        del role
        self._on_retire(start, end)

    async def attach(self, used: Permission, shared: Permission) -> None:
        """Become a user of the node with these permissions. Raises Error when they cannot be had."""
        self.node.parents.append(self.edge)
        try:
            await permissions.change(self.edge, used, shared)
        except BaseException:
            self.node.parents.remove(self.edge)
            raise

    async def detach(self) -> None:
        """Stop using the node. Nothing may be in flight."""
        if self.edge in self.node.parents:
            await permissions.change(self.edge, NONE, ALL)
            self.node.parents.remove(self.edge)

    def give_up(self) -> None:
        """Have what this user has asked for and what waits for something outside fail soon. On the node's loop."""
        self.given_up = True
        for node in depends_on(self.node):
            node.cancel_in_flight(self)

    # Reading ---------------------------------------------------------------------------------------------------

    def runs(self, start: int, length: int, effort: Effort = Effort.PLACE) -> list[Run] | None:
        """Runs from `start`, not always to the end of the range; None when metadata must be loaded first."""
        found = access.resolve(self.node, start, length, effort)
        return None if isinstance(found, Miss) else found

    async def read(self, start: int, view: memoryview) -> None:
        """Fill `view` from offset `start`. The range must lie inside the node."""
        asker.set(self)
        await access.read(self.node, start, view)

    def read_later(self, start: int, view: memoryview, done: Done) -> bool:
        """Begin to read what is one piece that only a driver can read; false when that takes `read` (see Node)."""
        asker.set(self)
        return access.read_later(self.node, start, view, done)

    async def status(self, start: int, length: int) -> list[Status]:
        """What is there, from `start`, covering at most `length` bytes and at least one."""
        asker.set(self)
        return await access.status(self.node, start, length)

    @property
    def detects_zeroes(self) -> bool:
        """Whether writes have to be looked at before they take a short cut."""
        return self.node.detects_zeroes is not BlockdevDetectZeroesOptions.OFF

    # Writing ---------------------------------------------------------------------------------------------------

    async def write(self, start: int, view: memoryview, *, fua: bool = False) -> None:
        """Write `view` at offset `start`. With `fua` it is durable on return."""
        asker.set(self)
        if self.detects_zeroes and view == bytes(len(view)):
            unmap = self.node.detects_zeroes is BlockdevDetectZeroesOptions.UNMAP
            await self.write_zeroes(start, len(view), unmap=unmap, fua=fua)
            return
        await access.write(self.node, start, view, fua=fua or self.writethrough)

    def write_now(self, start: int, view: memoryview) -> bool:
        """`write` without `fua`, if it can be done at once; tells whether it was (see `access.write_now`)."""
        return not self.writethrough and not self.detects_zeroes and access.write_now(self.node, start, view)

    def write_later(self, start: int, view: memoryview, done: Done) -> bool:
        """Begin to write where one driver takes it all; false when that takes `write` (see Node)."""
        asker.set(self)
        return not self.writethrough and not self.detects_zeroes and access.write_later(self.node, start, view, done)

    async def write_zeroes(
        self, start: int, length: int, *, unmap: bool, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; `unmap` allows holes, `fast` refuses (ENOTSUP) to write them."""
        asker.set(self)
        await access.write_zeroes(self.node, start, length, unmap=unmap, fast=fast)
        if fua or self.writethrough:
            await self.flush()

    async def discard(self, start: int, length: int, *, fua: bool = False) -> None:
        """Give space back where the nodes' `discard` options want that; otherwise do nothing."""
        asker.set(self)
        await access.discard(self.node, start, length)
        if fua or self.writethrough:
            await self.flush()

    async def flush(self) -> None:
        """Make everything written so far durable."""
        asker.set(self)
        await self.node.flush()

    def flush_later(self, done: Done) -> bool:
        """Begin to flush, where a driver has it done elsewhere; false when that takes `flush` (see Node)."""
        asker.set(self)
        return self.node.flush_later(done)

    async def prefetch(self, start: int, length: int) -> None:
        """Bring the range into the page cache, where there is one."""
        asker.set(self)
        await self.node.prefetch(start, length)
