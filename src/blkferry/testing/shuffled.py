"""A node whose clusters lie all over its file, as an image format's do, and move when they are written.

For tests of whoever uses lookups: some clusters are zero, some shine through from a backing node, some only the driver
can read, some move with the first write to them, and what the node knows of them has to be loaded now and then. A
cluster's place is given to another as soon as nobody is counted as using it, and is overwritten with rubbish at that
moment: who still uses it without being counted reads that. Everything follows from a seed and the order of requests.

Like `fault`, it is put into a graph by `insert`, not by blockdev-add.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
from dataclasses import dataclass
from typing import ClassVar

from blkferry.extent import Content, Effort, Extent
from blkferry.graph import access
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Edge, Permission
from blkferry.plane.drain import RangeLock
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions
from blkferry.units import SECTOR, align_up

RUBBISH = 0xEE
_MASK = 0x5A  # what the bytes of masked clusters are stored with
_MASKED = bytes(byte ^ _MASK for byte in range(256))
_TABLE = 32  # clusters that are loaded together
_TABLES = 8  # that are kept loaded
_MANY = 256  # extents of one answer


class Kind(enum.Enum):
    """What a guest cluster is."""

    PLAIN = Content.DATA, True
    SHARED = Content.DATA, False
    """Data that moves when it is written."""
    ZERO = Content.ZERO, False
    BELOW = Content.BELOW, False
    MASKED = Content.OPAQUE, False


_KINDS = (Kind.PLAIN, Kind.PLAIN, Kind.PLAIN, Kind.SHARED, Kind.ZERO, Kind.BELOW, Kind.MASKED)
_STORED = frozenset({Kind.PLAIN, Kind.SHARED, Kind.MASKED})


@dataclass
class Layout:
    """Where the clusters of a node of `length` bytes are at first. Pure."""

    length: int
    bits: int
    kinds: list[Kind]
    hosts: list[int]  # in clusters of the file
    free: list[int]

    @classmethod
    def make(cls, length: int, bits: int, *, seed: int = 0, kinds: tuple[Kind, ...] = _KINDS) -> Layout:
        """A layout of clusters of 1 << `bits` bytes, each of one of `kinds`."""
        rng = random.Random(seed)  # noqa: S311 - being the same each time is the point
        count = align_up(length, 1 << bits) >> bits
        chosen = [rng.choice(kinds) for _ in range(count)]
        hosts = rng.sample(range(count + count // 8 + 4), count)
        unused = set(range(count + count // 8 + 4)) - {
            host for host, kind in zip(hosts, chosen, strict=True) if kind in _STORED
        }
        return cls(align_up(length, SECTOR), bits, chosen, hosts, sorted(unused))

    def empty_image(self) -> bytes:
        """The file of a node that reads as zeroes, if what is below does."""
        size = 1 << self.bits
        image = bytearray([RUBBISH]) * ((max([*self.hosts, *self.free]) + 1) * size)
        for kind, host in zip(self.kinds, self.hosts, strict=True):
            if kind in _STORED:
                image[host * size : (host + 1) * size] = bytes([_MASK if kind is Kind.MASKED else 0]) * size
        return bytes(image)


class Shuffled(Node):
    """A node over `file`, which has a storage, and perhaps `backing`."""

    driver: ClassVar[str] = "shuffled"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptions

    async def open(self, opening: Opening) -> None:
        raise NotImplementedError("insert it")

    def place(self, layout: Layout, file: Node, backing: Node | None) -> None:
        """Stand above these nodes."""
        for role, below in (("file", file), (access.BACKING, backing)):
            if below is not None:
                self.children[role] = edge = Edge(self, below, role)
                below.parents.append(edge)
        assert file.storage is not None
        self.file, self._storage = file, file.storage
        self.length = layout.length
        self.alignment = file.alignment
        self.bits, self.size = layout.bits, 1 << layout.bits
        self.remap_alignment = self.size
        self.unmaps = True
        self.kinds, self.hosts = list(layout.kinds), list(layout.hosts)
        self.free = list(layout.free)
        self.moves = 0
        self._loaded: dict[int, None] = {}
        self._busy = RangeLock()

    def child_permissions(self, role: str, used: Permission, shared: Permission) -> tuple[Permission, Permission]:
        return (used, shared) if role == "file" else (used & Permission.CONSISTENT_READ, ALL)

    # Where bytes live ------------------------------------------------------------------------------------------

    @property
    def reuses_places(self) -> bool:
        return True

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        del effort
        extents: list[Extent] = []
        end = start + length
        while start < end and len(extents) < _MANY:
            number = start >> self.bits
            if number // _TABLE not in self._loaded:
                return extents or None
            part = min(end, number + 1 << self.bits) - start
            content, in_place = self.kinds[number].value
            if content is Content.DATA:
                place = (self.hosts[number] << self.bits) + (start & self.size - 1)
                extents.append(Extent(start, part, content, place, "file", in_place, settled=True))
            else:
                extents.append(Extent(start, part, content, start, allocated=content is Content.OPAQUE))
            start += part
        return extents

    async def load(self, start: int, length: int) -> None:
        del length
        await asyncio.sleep(0)
        self._loaded[(start >> self.bits) // _TABLE] = None
        if len(self._loaded) > _TABLES:
            del self._loaded[next(iter(self._loaded))]

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        if role == access.BACKING:
            self.retire(start, end)
        else:
            self.retire()

    async def read(self, start: int, view: memoryview) -> None:
        number = start >> self.bits
        if self.kinds[number] is not Kind.MASKED:  # it has moved meanwhile
            await access.read(self, start, view)
            return
        await access.read(self.file, (self.hosts[number] << self.bits) + (start & self.size - 1), view)
        view[:] = bytes(view).translate(_MASKED)

    # Writing ---------------------------------------------------------------------------------------------------

    def write_now(self, start: int, view: memoryview) -> bool:
        storage = self._storage
        if storage.direct:
            return False
        for number, at, part in self._clusters(start, view):
            if number // _TABLE not in self._loaded or self._busy.busy(number, number + 1):
                return False
            if self.kinds[number] is Kind.PLAIN:
                storage.write_now(part, (self.hosts[number] << self.bits) + at)
                continue
            data = bytearray(self.size)
            if len(part) < self.size and not self._read_now(number, memoryview(data)):
                return False
            data[at : at + len(part)] = part
            host = self._reserve()
            storage.write_now(memoryview(data), host << self.bits)
            self._publish(number, host)
        return True

    async def write(self, start: int, view: memoryview) -> None:
        for number, at, part in self._clusters(start, view):
            async with self._busy.hold(number, number + 1):
                if self.kinds[number] is Kind.PLAIN:
                    await access.write(self.file, (self.hosts[number] << self.bits) + at, part)
                    continue
                data = memoryview(bytearray(self.size))
                first = number << self.bits
                await access.read(self, first, data[: min(self.size, self.length - first)])
                data[at : at + len(part)] = part
                host = self._reserve()
                await access.write(self.file, host << self.bits, data)
                self._publish(number, host)

    def _clusters(self, start: int, view: memoryview) -> list[tuple[int, int, memoryview]]:
        parts = []
        done = 0
        while done < len(view):
            at = start + done & self.size - 1
            part = view[done : done + self.size - at]
            parts.append((start + done >> self.bits, at, part))
            done += len(part)
        return parts

    def _read_now(self, number: int, view: memoryview) -> bool:
        """Read a cluster from the page cache; False when it is not there."""
        kind = self.kinds[number]
        storage: Storage | None = self._storage
        place = self.hosts[number] << self.bits
        if kind is Kind.ZERO or (kind is Kind.BELOW and access.BACKING not in self.children):
            return True
        if kind is Kind.BELOW:
            below = self.children[access.BACKING].node
            storage, place = below.storage, number << self.bits
            view = view[: max(min(len(view), below.length - place), 0)]
        if storage is None or storage.inline_read_flags is None:
            return False
        try:
            count = os.preadv(storage.fd, (view,), place, storage.inline_read_flags)
        except BlockingIOError:
            return False
        if count < len(view):
            return False
        if kind is Kind.MASKED:
            view[:] = bytes(view).translate(_MASKED)
        return True

    # Places ----------------------------------------------------------------------------------------------------

    def _reserve(self) -> int:
        if not self.free:
            length = align_up(self.file.length, self.size)
            self.file.grow(length + self.size)
            self.free.append(length >> self.bits)
        return self.free.pop(self.moves * 7 % len(self.free))

    def _publish(self, number: int, host: int | None) -> None:
        """A cluster is at another place now, or nowhere; its old place is free when nobody uses it any more."""
        old = self.hosts[number] if self.kinds[number] in _STORED else None
        self.moves += 1
        self.kinds[number] = Kind.ZERO
        if host is not None:
            self.kinds[number] = Kind.SHARED if self.moves % 3 == 0 else Kind.PLAIN
            self.hosts[number] = host
        self.retire(number << self.bits, number + 1 << self.bits)
        if old is not None:
            self._storage.readers.after(lambda: self._storage.writers.after(lambda: self._reuse(old)))

    def _reuse(self, host: int) -> None:
        if not self._storage.direct:
            self._storage.write_now(memoryview(bytes([RUBBISH]) * self.size), host << self.bits)
        self.free.append(host)

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        del unmap, fast
        first, last = start >> self.bits, start + length >> self.bits
        async with self._busy.hold(first, last):
            for number in range(first, last):
                self._publish(number, None)

    async def discard(self, start: int, length: int) -> None:
        await self.remap(start, length, unmap=True, fast=True)


def insert(graph: Graph, name: str, layout: Layout, file: str, backing: str | None = None) -> Shuffled:
    """Put a node called `name` above those called `file` and `backing`. Call it on the daemon's loop."""
    below = graph.find(file)
    options = BlockdevOptions(driver="shuffled", node_name=name)
    node = Shuffled(name, options, below.services, read_only=below.read_only)
    node.place(layout, below, graph.find(backing) if backing is not None else None)
    if name in graph.nodes:
        raise FileExistsError(f"there is a node called '{name}'")
    graph.nodes[name] = node
    return node
