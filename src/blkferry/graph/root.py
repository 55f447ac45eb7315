"""The way into the graph: what an export, a job or a Python caller holds to use a node.

A root resolves ranges through all layers to descriptors ("runs"), and offers the plain asynchronous operations that
every slow path uses. Generic reading and writing is written here once; exports shortcut it only where a run says that
one system call does the same. Failures are OSError.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from blkferry.extent import Content, Effort, Status, coalesce
from blkferry.graph import permissions
from blkferry.graph.node import MAX_TRANSFER, Node
from blkferry.graph.permissions import ALL, NONE, Edge, Permission
from blkferry.plane.drain import InFlight
from blkferry.schema.block import BlockdevDetectZeroesOptions
from blkferry.units import align_down, align_up

if TYPE_CHECKING:
    from blkferry.plane.services import Services
    from blkferry.plane.storage import Storage

MAX_STATUS_RUNS = 1024
"""Extents of one status answer: a millisecond or two of lseek. Callers ask again for the rest."""

_ZERO_CHUNK = 1 << 20


class Run(NamedTuple):
    """A resolved extent: `length` bytes of the root from `start`, at `offset` of `storage` when the content is DATA.

    For OPAQUE content `node` can read it, at `offset`. `in_place`: overwriting there changes no metadata.
    """

    start: int
    length: int
    content: Content
    node: Node
    offset: int
    storage: Storage | None
    in_place: bool
    allocated: bool


def resolve(node: Node, start: int, length: int, effort: Effort) -> list[Run] | Node:
    """Runs for a range of `node`, or the node that has to `load` the same range of its own first."""
    extents = node.lookup(start, length, effort)
    if extents is None:
        return node
    runs: list[Run] = []
    for extent in extents:
        if extent.content is Content.DATA and extent.child is not None:
            below = resolve(node.children[extent.child].node, extent.offset, extent.length, effort)
            if isinstance(below, Node):
                return below
            shift = extent.start - extent.offset
            runs += [run._replace(start=run.start + shift, in_place=run.in_place and extent.in_place) for run in below]
        else:
            runs.append(
                Run(
                    extent.start,
                    extent.length,
                    extent.content,
                    node,
                    extent.offset,
                    node.storage if extent.content is Content.DATA else None,
                    extent.in_place,
                    extent.allocated,
                )
            )
    return runs


class Root:
    """A user's hold on a node.

    `on_retire` is called when resolved runs may no longer be used. Users count every operation that is not finished
    within one turn of the loop in `in_flight`. With `writethrough` every change is durable when it returns.
    """

    def __init__(self, node: Node, description: str, on_retire: Callable[[], None] = lambda: None) -> None:
        self.edge = Edge(self, node, "root")
        self._description = description
        self._on_retire = on_retire
        self.in_flight = InFlight()
        self.writethrough = False

    @property
    def node(self) -> Node:
        return self.edge.node

    @property
    def services(self) -> Services:
        return self.edge.node.services

    def describe(self) -> str:
        return self._description

    def retire(self) -> None:
        self._on_retire()

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

    # Reading ---------------------------------------------------------------------------------------------------

    def runs(self, start: int, length: int, effort: Effort = Effort.PLACE) -> list[Run] | None:
        """Runs for the range, or None when metadata must be loaded first (`load_runs` does)."""
        found = resolve(self.node, start, length, effort)
        return None if isinstance(found, Node) else found

    async def load_runs(self, start: int, length: int, effort: Effort = Effort.PLACE) -> list[Run]:
        """Runs for the range, loading whatever is missing."""
        while isinstance(found := resolve(self.node, start, length, effort), Node):
            await found.load(start, length)
        return found

    async def read(self, start: int, view: memoryview) -> None:
        """Fill `view` from offset `start`. The range must lie inside the node."""
        for run in await self.load_runs(start, len(view)):
            part = view[run.start - start : run.start - start + run.length]
            if run.content is Content.DATA and run.storage is not None:
                await _read_storage(run.storage, run.offset, part)
            elif run.content is Content.OPAQUE:
                await run.node.read(run.offset, part)
            else:
                part[:] = bytes(len(part))

    async def status(self, start: int, length: int) -> list[Status]:
        """What is there, from `start`, covering at most `length` bytes and at least one."""
        runs = await self.load_runs(start, length, Effort.ALLOCATION)
        return coalesce([Status(run.length, run.content is Content.ZERO, run.allocated) for run in runs])

    @property
    def detects_zeroes(self) -> bool:
        """Whether writes have to be looked at before they take a short cut."""
        return self.node.detects_zeroes is not BlockdevDetectZeroesOptions.OFF

    # Writing ---------------------------------------------------------------------------------------------------

    async def write(self, start: int, view: memoryview, *, fua: bool = False) -> None:
        """Write `view` at offset `start`. With `fua` it is durable on return."""
        if self.detects_zeroes and view == bytes(len(view)):
            unmap = self.node.detects_zeroes is BlockdevDetectZeroesOptions.UNMAP
            await self.write_zeroes(start, len(view), unmap=unmap, fua=fua)
            return
        await self._write_runs(start, view, fua or self.writethrough)

    async def _write_runs(self, start: int, view: memoryview, fua: bool) -> None:
        for run in await self.load_runs(start, len(view)):
            part = view[run.start - start :][: run.length]
            if run.in_place and run.storage is not None:
                await _write_storage(run.storage, run.offset, part, fua)
            else:
                await run.node.write(run.offset, part)
                if fua:
                    await run.node.flush()

    async def write_zeroes(
        self, start: int, length: int, *, unmap: bool, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; `unmap` allows holes, `fast` refuses (ENOTSUP) to write them."""
        alignment = self.node.remap_alignment
        first, last = align_up(start, alignment), align_down(start + length, alignment)
        if first >= last:
            if fast:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            await self._write_plain_zeroes(start, start + length)
        else:
            try:
                await self.node.remap(first, last - first, unmap=unmap, fast=fast)
            except OSError as error:
                if fast or error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                await self._write_plain_zeroes(first, last)
            await self._write_plain_zeroes(start, first)
            await self._write_plain_zeroes(last, start + length)
        if fua or self.writethrough:
            await self.flush()

    async def _write_plain_zeroes(self, start: int, end: int) -> None:
        zeroes = memoryview(bytes(min(_ZERO_CHUNK, max(end - start, 0))))
        while start < end:
            part = zeroes[: end - start]
            await self._write_runs(start, part, fua=False)
            start += len(part)

    async def discard(self, start: int, length: int, *, fua: bool = False) -> None:
        """Give space back where the nodes' `discard` options want that; otherwise do nothing."""
        alignment = self.node.remap_alignment
        first, last = align_up(start, alignment), align_down(start + length, alignment)
        if first < last:
            await self.node.discard(first, last - first)
        if fua or self.writethrough:
            await self.flush()

    async def flush(self) -> None:
        """Make everything written so far durable."""
        await self.node.flush()

    async def prefetch(self, start: int, length: int) -> None:
        """Bring the range into the page cache, where there is one."""
        await self.node.prefetch(start, length)


async def _read_storage(storage: Storage, offset: int, view: memoryview) -> None:
    """Read with whatever alignment the storage wants; zeroes follow the end of the file up to the next sector."""
    done = 0
    while done < len(view):
        length = min(len(view) - done, MAX_TRANSFER)
        first = align_down(offset + done, storage.alignment)
        last = align_up(offset + done + length, storage.alignment)
        buffer = storage.services.buffers.acquire(last - first)
        try:
            count = await storage.aread(buffer, 0, last - first, first)
            skip = offset + done - first
            if count < skip + length:
                _fill_tail(storage, first, count, skip + length, buffer.view)
            view[done : done + length] = buffer.view[skip : skip + length]
        finally:
            buffer.release()
        done += length


def _fill_tail(storage: Storage, offset: int, count: int, wanted: int, view: memoryview) -> None:
    """The sector that the file's last bytes begin reads as zeroes after them; any other short read is an I/O error."""
    if offset + wanted > align_up(storage.size, 512) or offset + count < storage.size:
        raise OSError(errno.EIO, "the image is shorter than it was when it was opened")
    view[count:wanted] = bytes(wanted - count)


async def _write_storage(storage: Storage, offset: int, view: memoryview, fua: bool) -> None:
    """Write with whatever alignment the storage wants, reading the edges first where that is needed."""
    done = 0
    while done < len(view):
        length = min(len(view) - done, MAX_TRANSFER)
        first = align_down(offset + done, storage.alignment)
        last = align_up(offset + done + length, storage.alignment)
        buffer = storage.services.buffers.acquire(last - first)
        try:
            async with storage.exclusive(first, last):
                if last - first != length:
                    count = await storage.aread(buffer, 0, last - first, first)
                    buffer.view[count : last - first] = bytes(last - first - count)
                skip = offset + done - first
                buffer.view[skip : skip + length] = view[done : done + length]
                await storage.awrite(buffer, 0, last - first, first, fua=fua)
        finally:
            buffer.release()
        done += length
