"""Many at once on one image: nobody ever sees the bytes of another place, and the image stays in order.

Every 16 bytes that are written say for which sector of the disk they are, and who wrote them. The node below answers
after random delays, so that what is looked up now is read and written later.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2 import compression, hostfile, reclaiming, snapshots
from blkferry.drivers.qcow2.checking import check
from blkferry.drivers.qcow2.creation import CreateSpec, create
from blkferry.drivers.qcow2.header import Header
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error
from blkferry.graph import access
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.testing import record
from blkferry.testing.record import Bytes, Disk

SECTOR = 512
SIZE = 64 << 10
SECTORS = SIZE // SECTOR

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1k": ({"cluster_size": 1024}, {}),
    "4k, backing": ({"cluster_size": 4096}, {"backing": "base"}),
    "subclusters, backing": ({"cluster_size": 16384, "extended_l2": True}, {"backing": "base"}),
    "small caches": ({"cluster_size": 512, "refcount_bits": 64}, {"l2-cache-size": 0, "refcount-cache-size": 0}),
    "lazy": ({"cluster_size": 512, "lazy_refcounts": True}, {}),
    "v2": ({"cluster_size": 1024, "version": 2}, {}),
}


def stamp(writer: int, first: int, count: int) -> bytes:
    return b"".join(b"%07x:%07x." % (writer, sector) * 32 for sector in range(first, first + count))


def verify(data: bytes | bytearray, first: int) -> None:
    """Every part is zero or says that it is for where it is."""
    for at in range(0, len(data), 16):
        piece = bytes(data[at : at + 16])
        sector = first + at // SECTOR
        if piece != bytes(16) and piece[8:] != b"%07x." % sector:
            raise AssertionError(f"sector {sector} has the bytes {piece!r}")


class Lab:
    def __init__(self, daemon: Daemon, node: Qcow2, below: Bytes | Disk, rng: random.Random) -> None:
        self.daemon = daemon
        self.node = node
        self.below = below
        self.rng = rng
        self.root = Root(node, "the test")
        self.writers = 0

    def slow(self, share: float = 0.3, most: float = 0.004) -> None:
        rng = self.rng
        self.below.log.delay = lambda *_: rng.random() * most if rng.random() < share else 0.0

    async def write(self, first: int, count: int, *, at_once: bool = False) -> None:
        self.writers += 1
        view = memoryview(stamp(self.writers, first, count))
        if not at_once or not self.root.write_now(first * SECTOR, view):
            await self.root.write(first * SECTOR, view)

    async def read(self, first: int, count: int) -> bytes:
        data = bytearray(b"\xa5" * count * SECTOR)
        await self.root.read(first * SECTOR, memoryview(data))
        verify(data, first)
        return bytes(data)

    async def compress(self, cluster: int) -> None:
        size = self.node.header.cluster_size
        self.writers += 1
        data = stamp(self.writers, cluster * size // SECTOR, size // SECTOR)
        packed = compression.compress(self.node.header.compression_type, data)
        if packed is not None:
            await self.node.writing.write_compressed(cluster * size, packed)

    async def act(self) -> None:
        rng, root = self.rng, self.root
        first = rng.randrange(SECTORS)
        count = min(rng.choice([1, 2, 8, 9, 30]), SECTORS - first)
        match rng.randrange(12):
            case 0 | 1 | 2:
                await self.write(first, count)
            case 3 | 4:
                await self.write(first, count, at_once=True)
            case 5:
                await root.write_zeroes(first * SECTOR, count * SECTOR, unmap=rng.random() < 0.7)
            case 6 | 7:
                await root.discard(first * SECTOR, count * 4 * SECTOR if first + 4 * count < SECTORS else SECTOR)
            case 8:
                await root.flush()
            case 9:
                await self.compress(rng.randrange(SIZE // self.node.header.cluster_size))
            case _:
                await self.read(first, count)

    async def act_on_snapshots(self) -> None:
        node, rng = self.node, self.rng
        names = [each.name for each in node.snapshots]
        kind = rng.randrange(4)
        if kind < 2 and len(names) < 4:
            self.writers += 1
            await snapshots.create(node, f"s{self.writers}")
        elif names and kind == 2:
            await snapshots.delete(node, None, rng.choice(names))
        elif names:
            await snapshots.apply(node, rng.choice(names))

    async def finish(self) -> None:
        """All still work; closed, the image is in order."""
        self.below.log.delay = lambda *_: 0.0
        assert not self.node.corrupt
        await self.write(0, SECTORS)
        await self.write(3, 20)
        before = await self.read(0, SECTORS)
        await self.root.flush()
        names = [each.name for each in self.node.snapshots]
        await self.root.detach()
        await self.daemon.graph.remove("n")
        image = self.below.content()
        found = await check(self.below, Header.parse(image[: 2 << 20], file_size=len(image)))
        assert not found.check_errors, found.messages
        assert not found.corruptions, found.messages
        self.leaks = found.leaks
        assert await self.reopened() == before
        for name in names:
            verify(await self.reopened(snapshot=name), 0)

    async def reopened(self, **options: Any) -> bytes:
        base = "base" if "base" in self.daemon.graph.nodes else None
        wanted = {"driver": "qcow2", "node-name": "again", "file": "below", "backing": base, "read-only": True}
        node = await self.daemon.graph.add(visit(BlockdevOptions, wanted | options))
        data = bytearray(node.length)
        await access.read(node, 0, memoryview(data))
        await self.daemon.graph.remove("again")
        return bytes(data)


@asynccontextmanager
async def lab(case: str, kind: type[Bytes | Disk], seed: object = 1) -> AsyncIterator[Lab]:
    spec, options = CASES[case]
    async with Daemon() as daemon:
        made = record.insert(daemon.graph, "made", Bytes)
        made.fill(b"")
        await create(made, None, CreateSpec(size=SIZE, **spec))
        if options.get("backing"):
            record.insert(daemon.graph, "base", Bytes).fill(stamp(0, 0, SECTORS - 5))
        below = record.insert(daemon.graph, "below", kind)
        below.fill(made.content())
        wanted = {"driver": "qcow2", "node-name": "n", "file": "below", "discard": "unmap", "backing": None}
        node = await daemon.graph.add(visit(BlockdevOptions, wanted | options))
        assert isinstance(node, Qcow2)
        made_lab = Lab(daemon, node, below, random.Random(f"{case} {kind.__name__} {seed}"))
        await made_lab.root.attach(Permission.CONSISTENT_READ | Permission.WRITE, ALL)
        yield made_lab


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(hostfile, "GROWTH", 4096)
    monkeypatch.setattr(reclaiming, "RECLAIM_SECONDS", 0.003)


async def crowd(case: str, kind: type[Bytes | Disk], seed: int, *, steps: int = 40, workers: int = 6) -> None:
    """Some who read and write whatever comes, one who takes, applies and deletes snapshots."""
    async with lab(case, kind, seed) as it:
        it.slow()

        async def work() -> None:
            for _ in range(steps):
                await it.act()

        async def keep_snapshots() -> None:
            for _ in range(steps // 6):
                await it.act_on_snapshots()
                await asyncio.sleep(it.rng.random() * 0.005)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
            tasks.create_task(keep_snapshots())
        await it.finish()
        assert not it.leaks


@pytest.mark.parametrize("kind", [Bytes, Disk])
@pytest.mark.parametrize("case", CASES)
async def test_everything_at_once(case, kind):
    await crowd(case, kind, 1, steps=25, workers=5)


async def cancel(case: str, kind: type[Bytes | Disk], seed: int, *, steps: int = 60) -> None:
    """Begin things one after the other, and cancel some."""
    async with lab(case, kind, seed) as it:
        it.slow()
        running: set[asyncio.Task[None]] = set()
        for _ in range(steps):
            task = asyncio.create_task(it.act_on_snapshots() if it.rng.random() < 0.05 else it.act())
            running.add(task)
            await asyncio.sleep(it.rng.random() * 0.002)
            if it.rng.random() < 0.5:
                it.rng.choice(sorted(running, key=id)).cancel()
            running = {task for task in running if not task.done()}
        await asyncio.gather(*running, return_exceptions=True)
        await it.finish()


@pytest.mark.parametrize("kind", [Bytes, Disk])
@pytest.mark.parametrize("case", CASES)
async def test_those_who_are_cancelled_leave_order(case, kind):
    await cancel(case, kind, 1, steps=40)


async def test_slow_readers_keep_their_clusters():
    """What is given up while somebody reads there goes to nobody else before that ends."""
    async with lab("1k", Disk) as it:
        await it.write(0, SECTORS)
        await it.root.flush()
        it.below.log.delay = lambda verb, *_: 0.1 if verb == "read" else 0.0
        readers = [asyncio.create_task(it.read(first, 8)) for first in range(0, 64, 8)]
        await asyncio.sleep(0.01)
        await it.root.discard(0, 64 * SECTOR)
        await it.root.flush()
        await asyncio.sleep(0.02)
        await it.root.flush()
        for first in range(64, SECTORS, 2):
            await it.compress(first // 2)
            await it.write(first, 2, at_once=True)
        for data in await asyncio.gather(*readers):
            assert any(data)
        await it.finish()
        assert not it.leaks


async def test_slow_writers_write_nowhere_else():
    """A write in place that is on its way when its cluster is given up does not reach the next owner."""
    async with lab("1k", Disk) as it:
        await it.write(0, SECTORS)
        await it.root.flush()
        it.below.log.delay = lambda verb, offset, length: 0.1 if verb == "write" and length == SECTOR else 0.0
        writers = [asyncio.create_task(it.write(first, 1)) for first in range(0, 32, 2)]
        await asyncio.sleep(0.01)
        it.below.log.delay = lambda *_: 0.0
        await it.root.discard(0, 32 * SECTOR)
        await it.root.flush()
        await asyncio.sleep(0.02)
        await it.root.flush()
        await it.write(32, SECTORS - 32)
        await it.root.discard(64 * SECTOR, 16 * SECTOR)
        for first in range(32, 64, 2):
            await it.compress(first // 2)
        await asyncio.gather(*writers)
        await it.read(0, SECTORS)
        await it.finish()
        assert not it.leaks


async def test_writes_to_one_new_cluster_lose_nothing():
    async with lab("4k, backing", Disk) as it:
        it.slow(0.8)
        await asyncio.gather(*(it.write(sector, 1, at_once=sector % 3 == 0) for sector in range(SECTORS)))
        data = await it.read(0, SECTORS)
        assert all(data[at : at + 7] != b"0000000" for at in range(0, len(data), SECTOR))
        await it.finish()
        assert not it.leaks


@pytest.mark.parametrize("kind", [Bytes, Disk])
async def test_a_snapshot_has_what_came_before_and_not_what_came_after(kind):
    """A writer counts up here, then there; any snapshot has seen both, or the first one alone."""
    async with lab("1k", kind) as it:
        it.slow()
        stop = asyncio.Event()

        async def count() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for first in (4, 90):
                    await it.root.write(first * SECTOR, memoryview(stamp(number, first, 2)))

        counting = asyncio.create_task(count())
        for number in range(6):
            await asyncio.sleep(0.01)
            await snapshots.create(it.node, f"s{number}")
        stop.set()
        await counting
        await it.finish()
        last = 0
        for number in range(6):
            disk = await it.reopened(snapshot=f"s{number}")
            here = {int(disk[at : at + 7] or b"0", 16) for at in range(4 * SECTOR, 6 * SECTOR, 16) if disk[at]}
            there = {int(disk[at : at + 7] or b"0", 16) for at in range(90 * SECTOR, 92 * SECTOR, 16) if disk[at]}
            assert len(here) <= 1, "a write is in it by half"
            assert len(there) <= 1, "a write is in it by half"
            (first,) = here or {0}
            (second,) = there or {0}
            assert second in (first, first - 1)
            assert first >= last
            last = first


async def test_frozen_sections_go_one_after_the_other():
    """Snapshots and resizes that are asked for at once, while others write."""
    async with lab("1k", Disk) as it:
        it.slow()
        await it.write(0, SECTORS)

        async def write() -> None:
            for first in range(0, SECTORS, 3):
                await it.write(first, 1)

        commands = [snapshots.create(it.node, name) for name in "abc"]
        commands += [it.node.resize(SIZE + 4096), snapshots.create(it.node, "d"), snapshots.apply(it.node, "d")]
        commands += [snapshots.delete(it.node, None, "a"), it.node.resize(SIZE)]
        done = await asyncio.wait_for(asyncio.gather(write(), *commands, return_exceptions=True), 20)
        assert all(result is None or isinstance(result, (Error, snapshots.Snapshot)) for result in done), done
        assert len({each.id for each in it.node.snapshots}) == len(it.node.snapshots)
        if it.node.length != SIZE:
            await it.node.resize(SIZE)
        await it.finish()
        assert not it.leaks


async def test_flushes_while_clusters_are_allocated():
    async with lab("1k", Disk) as it:
        it.slow()

        async def flush() -> None:
            for _ in range(8):
                await asyncio.sleep(it.rng.random() * 0.004)
                await it.root.flush()

        await asyncio.gather(flush(), flush(), *(it.write(first, 2) for first in range(0, SECTORS, 2)))
        await it.finish()
        assert not it.leaks
