"""Nodes that write down every change that reaches them, and the images a crash could leave behind.

`Disk` has a descriptor like a file: what drivers and exports do to it behind the graph's back (writes within a turn,
requests of the engine, ftruncate) is recorded too. `Bytes` is opaque: everything comes through its verbs. A test may
have either fail or take its time. They are put into a graph by `insert`, so that no user finds them in the schema.

What a disk keeps: a change that ended before a flush began is kept when that flush has ended. Of all others each sector
may hold what any of them put there or what was there before. Sectors are never torn.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from blkferry.extent import Content, Effort, Extent
from blkferry.graph.descriptor import DescriptorNode
from blkferry.graph.graph import Graph, Opening
from blkferry.graph.node import Node
from blkferry.plane.engine import Done, Engine, Memory
from blkferry.plane.services import Services
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions
from blkferry.units import SECTOR, align_up

AnyNode = TypeVar("AnyNode", bound=Node)


@dataclass(eq=False, slots=True)
class Change:
    """`data` written at `offset`, or with `size` a file that got another length.

    `begun` and `done` are positions in the log; `done` is None while it goes on. Of one that has `failed`, any part may
    be there until the next flush settles it: then it is as if it had never been.
    """

    begun: int
    offset: int
    data: bytes
    size: int | None = None
    done: int | None = None
    failed: int | None = None
    through: bool = False


@dataclass(eq=False, slots=True)
class Flush:
    begun: int
    done: int | None = None


@dataclass(eq=False)
class Log:
    """Everything that happened to one node since its image was `start`.

    `fault(verb, offset, length)` gives the errno a request fails with or 0, `delay` the seconds it takes longer.
    """

    start: bytes
    position: int = 0
    changes: list[Change] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)
    fault: Callable[[str, int, int], int] = lambda _verb, _offset, _length: 0
    delay: Callable[[str, int, int], float] = lambda _verb, _offset, _length: 0.0

    def now(self) -> int:
        """A position of its own."""
        self.position += 1
        return self.position

    def begin(
        self, offset: int, data: bytes | bytearray | memoryview, *, size: int | None = None, through: bool = False
    ) -> Change:
        change = Change(self.now(), offset, bytes(data), size, through=through)
        self.changes.append(change)
        return change

    def settle(self, change: Change, *, failed: bool) -> None:
        """A change is over."""
        if failed:
            change.failed = self.now()
        else:
            change.done = self.now()

    @contextmanager
    def changing(
        self, offset: int, data: bytes | bytearray | memoryview = b"", *, size: int | None = None
    ) -> Iterator[None]:
        """Within this, the change goes on; an exception says that it has failed."""
        change = self.begin(offset, data, size=size)
        try:
            yield
        except BaseException:
            self.settle(change, failed=True)
            raise
        self.settle(change, failed=False)

    def begin_flush(self) -> Flush:
        flush = Flush(self.now())
        self.flushes.append(flush)
        return flush

    def kept(self, cut: int) -> int:
        """The position before which changes have to have ended to be durable at `cut`."""
        return max((flush.begun for flush in self.flushes if flush.done is not None and flush.done <= cut), default=0)


Chooser = Callable[[Change, int], bool]
"""Whether a change that need not be durable is, as far as the sector with this number goes."""


class Crashes:
    """The images that crashes could leave, cheapest for cuts in ascending order."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._base = bytearray(log.start)
        self._settled = 0  # changes before this index are all durable, and in the base

    def image(self, cut: int, chooses: Chooser) -> bytes:
        """What is there after a crash at position `cut`."""
        log = self._log
        kept = log.kept(cut)
        while self._settled < len(log.changes):
            change = log.changes[self._settled]
            if _durable(change, kept, cut):
                _apply(self._base, change, None)
            elif not _void(change, kept):
                break
            self._settled += 1
        image = bytearray(self._base)
        for change in log.changes[self._settled :]:
            if change.begun >= cut:
                break
            if not _void(change, kept):
                _apply(image, change, None if _durable(change, kept, cut) else chooses)
        return bytes(image.ljust(align_up(len(image), SECTOR), b"\0"))

    def loose(self, cut: int) -> list[Change]:
        """The changes that may or may not be there after a crash at `cut`."""
        kept = self._log.kept(cut)
        return [
            change
            for change in self._log.changes[self._settled :]
            if change.begun < cut and not _durable(change, kept, cut) and not _void(change, kept)
        ]


def _durable(change: Change, kept: int, cut: int) -> bool:
    if change.done is None:
        return False
    return change.done <= kept or (change.through and change.done <= cut)


def _void(change: Change, kept: int) -> bool:
    return change.failed is not None and change.failed <= kept


def _apply(image: bytearray, change: Change, chooses: Chooser | None) -> None:
    if change.size is not None:
        if chooses is None or chooses(change, 0):
            del image[change.size :]
            image.extend(bytes(change.size - len(image)))
        return
    offset, data = change.offset, change.data
    if chooses is None:
        _put(image, offset, data)
        return
    at = 0
    while at < len(data):
        sector = (offset + at) // SECTOR
        stop = min((sector + 1) * SECTOR - offset, len(data))
        if chooses(change, sector):
            _put(image, offset + at, data[at:stop])
        at = stop


def _put(image: bytearray, offset: int, data: bytes) -> None:
    if offset + len(data) > len(image):
        image.extend(bytes(offset + len(data) - len(image)))
    image[offset : offset + len(data)] = data


def _raise(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


# A descriptor ----------------------------------------------------------------------------------------------------


class _Engine:
    """Records what one storage asks of an engine."""

    def __init__(self, engine: Engine, log: Log, loop: asyncio.AbstractEventLoop) -> None:
        self.name = engine.name
        self.kick = engine.kick
        self.close = engine.close
        self._engine = engine
        self._log = log
        self._loop = loop

    def _act(self, verb: str, offset: int, length: int, act: Callable[[], None], done: Done) -> None:
        code = self._log.fault(verb, offset, length)
        act_or_fail: Callable[[], object] = (lambda: done(-code)) if code else act
        delay = self._log.delay(verb, offset, length)
        if delay:
            self._loop.call_later(delay, act_or_fail)
        elif code:
            self._loop.call_soon(act_or_fail)
        else:
            act()

    def read(self, fd: int, buffer: Memory, start: int, length: int, offset: int, done: Done) -> None:
        self._act("read", offset, length, lambda: self._engine.read(fd, buffer, start, length, offset, done), done)

    def write(self, fd: int, buffer: Memory, start: int, length: int, offset: int, flags: int, done: Done) -> None:
        data = buffer.view[start : start + length]
        change = self._log.begin(offset, data, through=bool(flags & os.RWF_DSYNC))

        def finish(result: int) -> None:
            self._log.settle(change, failed=result != length)
            done(result)

        def act() -> None:
            self._engine.write(fd, buffer, start, length, offset, flags, finish)

        self._act("write", offset, length, act, finish)

    def readv(self, fd: int, pieces: Sequence[memoryview], offset: int, done: Done) -> None:
        length = sum(map(len, pieces))
        self._act("read", offset, length, lambda: self._engine.readv(fd, pieces, offset, done), done)

    def writev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, done: Done) -> None:
        data = b"".join(pieces)
        change = self._log.begin(offset, data, through=bool(flags & os.RWF_DSYNC))

        def finish(result: int) -> None:
            self._log.settle(change, failed=result != len(data))
            done(result)

        def act() -> None:
            self._engine.writev(fd, [memoryview(data)], offset, flags, finish)

        self._act("write", offset, len(data), act, finish)

    def fdatasync(self, fd: int, done: Done) -> None:
        flush = self._log.begin_flush()

        def finish(result: int) -> None:
            if result >= 0:
                flush.done = self._log.now()
            done(result)

        self._act("flush", 0, 0, lambda: self._engine.fdatasync(fd, finish), finish)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, done: Done) -> None:
        change = self._log.begin(offset, bytes(length))

        def finish(result: int) -> None:
            self._log.settle(change, failed=result < 0)
            done(result)

        self._act("fallocate", offset, length, lambda: self._engine.fallocate(fd, mode, offset, length, finish), finish)


class _Storage(Storage):
    """A descriptor in memory whose changes are recorded. Everything is written to it at once or by the engine."""

    def __init__(self, fd: int, services: Services, log: Log) -> None:
        self.log = log
        super().__init__(fd, services, writable=True)

    def move(self, services: Services) -> None:
        super().move(services)
        self.engine = _Engine(self.engine, self.log, services.loop)

    def write_now(self, view: memoryview, offset: int) -> None:
        with self.log.changing(offset, view):
            _raise(self.log.fault("write", offset, len(view)))
            super().write_now(view, offset)

    def grow(self, size: int) -> None:
        if size > self.refresh_size():
            with self.log.changing(0, size=size):
                _raise(self.log.fault("grow", 0, size))
                super().grow(size)


class Disk(DescriptorNode):
    """A disk in memory with a descriptor of its own."""

    driver: ClassVar[str] = "record"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptions
    log: Log

    async def open(self, opening: Opening) -> None:
        raise NotImplementedError("insert it")

    def fill(self, image: bytes) -> None:
        """Begin with these bytes."""
        self.log = Log(image)
        fd = os.memfd_create("record", os.MFD_CLOEXEC)
        os.ftruncate(fd, len(image))
        os.pwrite(fd, image, 0)
        self.adopt(_Storage(fd, self.services, self.log))

    async def resize(self, length: int) -> None:
        with self.log.changing(0, size=length):
            _raise(self.log.fault("resize", 0, length))
            await super().resize(length)

    def content(self) -> bytes:
        return os.pread(self.storage.fd, self.storage.refresh_size(), 0)


# Without a descriptor --------------------------------------------------------------------------------------------


class Bytes(Node):
    """A disk in memory that names no places: all that happens to it comes through the verbs of the graph.

    With `at_once` it takes writes within a turn. It grows at once if `grows`.
    """

    driver: ClassVar[str] = "record-opaque"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptions
    log: Log
    data: bytearray
    at_once = True
    grows = True

    async def open(self, opening: Opening) -> None:
        raise NotImplementedError("insert it")

    def fill(self, image: bytes) -> None:
        """Begin with these bytes."""
        self.log = Log(image)
        self.data = bytearray(image)
        self.length = align_up(len(image), SECTOR)

    async def _enter(self, verb: str, offset: int, length: int) -> None:
        delay = self.log.delay(verb, offset, length)
        if delay:
            await asyncio.sleep(delay)
        _raise(self.log.fault(verb, offset, length))

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        del effort
        return [Extent(start, length, Content.OPAQUE, start)]

    async def read(self, start: int, view: memoryview) -> None:
        await self._enter("read", start, len(view))
        data = self.data[start : start + len(view)]
        if len(data) < len(view) and start + len(view) > self.length:
            raise OSError(errno.EIO, "read outside the image")
        view[:] = data.ljust(len(view), b"\0")

    async def write(self, start: int, view: memoryview) -> None:
        with self.log.changing(start, view):
            await self._enter("write", start, len(view))
            self._put(start, bytes(view))

    def write_now(self, start: int, view: memoryview) -> bool:
        if not self.at_once or self.log.delay("write", start, len(view)):
            return False
        with self.log.changing(start, view):
            _raise(self.log.fault("write", start, len(view)))
            self._put(start, bytes(view))
        return True

    def _put(self, start: int, data: bytes) -> None:
        if start < 0 or start + len(data) > self.length:
            raise OSError(errno.EIO, "write outside the image")
        _put(self.data, start, data)

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        del unmap, fast
        await self.write(start, memoryview(bytes(length)))

    async def discard(self, start: int, length: int) -> None:
        await self.write(start, memoryview(bytes(length)))

    async def flush(self) -> None:
        flush = self.log.begin_flush()
        await self._enter("flush", 0, 0)
        flush.done = self.log.now()

    def grow(self, length: int) -> bool:
        if self.grows:
            self._resize(length)
        return self.grows

    async def resize(self, length: int) -> None:
        await self._enter("resize", 0, length)
        self._resize(length)
        self.retire()

    def _resize(self, length: int) -> None:
        with self.log.changing(0, size=length):
            _raise(self.log.fault("grow", 0, length))
            del self.data[length:]
            self.data.extend(bytes(length - len(self.data)))
            self.length = align_up(length, SECTOR)

    def content(self) -> bytes:
        return bytes(self.data)

    async def close(self) -> None:
        """Nothing to give up."""


def insert(graph: Graph, name: str, kind: type[AnyNode], *, read_only: bool = False) -> AnyNode:
    """Put an empty node of this kind into a graph; `fill` it. Call it on the daemon's loop."""
    if name in graph.nodes:
        raise FileExistsError(errno.EEXIST, f"there is a node called '{name}'")
    node = kind(name, BlockdevOptions(driver=kind.driver, node_name=name), graph.services, read_only=read_only)
    node.unmaps = True
    graph.nodes[name] = node
    return node
