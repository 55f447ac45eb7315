"""A crash at any moment leaves an image with nothing worse than leaks, and all that was flushed."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pytest
from crash_model import Examiner, Guest, examine_all, gather

from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2.creation import CreateSpec, create
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.testing import record
from blkferry.testing.record import Bytes, Disk

SIZE = 128 << 10
CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus" / "qcow2_image"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4k": ({"cluster_size": 4096}, {}),
    "512": ({"cluster_size": 512}, {}),
    "many blocks": ({"cluster_size": 512, "refcount_bits": 64}, {"refcount-cache-size": 0, "l2-cache-size": 0}),
    "one bit": ({"cluster_size": 512, "refcount_bits": 1}, {}),
    "v2": ({"cluster_size": 1024, "version": 2}, {}),
    "lazy": ({"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True}, {}),
    "subclusters": ({"cluster_size": 16384, "extended_l2": True}, {}),
    "backing": ({"cluster_size": 2048}, {"backing": "base"}),
    "v2, backing": ({"cluster_size": 2048, "version": 2}, {"backing": "base"}),
    "bitmaps": ({"corpus": "mixed"}, {}),
    "subclusters, backing": ({"cluster_size": 16384, "extended_l2": True}, {"backing": "base"}),
}


class Lab:
    """An image on a node that records, somebody who uses it, and somebody who looks at what crashes leave."""

    def __init__(self, daemon: Daemon, case: str, seed: object, kind: type[Bytes | Disk]) -> None:
        self.daemon = daemon
        self.spec, self.options = CASES[case]
        self.kind = kind
        self.rng = random.Random(f"{case} {kind.__name__} {seed}")

    async def prepare(self, size: int = SIZE) -> Guest:
        daemon, options = self.daemon, self.options
        image = record.insert(daemon.graph, "made", Bytes)
        image.fill(b"")
        if corpus := self.spec.get("corpus"):  # it has bitmaps, which only closing stores
            image.fill(gzip.decompress((CORPUS / f"{corpus}.qcow2.gz").read_bytes()))
        else:
            await create(image, None, CreateSpec(size=size, **self.spec))
        backing = options.get("backing")
        if backing:
            base = record.insert(daemon.graph, "base", Bytes)
            base.fill(self.rng.randbytes(size - 5 * 512))
        self.below = record.insert(daemon.graph, "below", self.kind)
        self.below.fill(image.content())
        self.guest = await self.open()
        self.examiner = Examiner(daemon, backing)
        return self.guest

    async def open(self) -> Guest:
        wanted = {"driver": "qcow2", "node-name": "n", "file": "below", "discard": "unmap", "backing": None}
        node = await self.daemon.graph.add(visit(BlockdevOptions, wanted | self.options))
        assert isinstance(node, Qcow2)
        root = Root(node, "the guest")
        await root.attach(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE, ALL)
        guest = Guest(root, self.below.log, self.rng)
        await guest.look()
        return guest

    async def close(self) -> None:
        root = self.guest.root
        await root.detach()
        await self.daemon.graph.remove("n")

    async def examine(self, **options: Any) -> None:
        await examine_all(self.below.log, self.guest, self.examiner, self.rng, **options)


async def act(guest: Guest, rng: random.Random, *, snapshots: bool, resizes: bool) -> None:
    """Do one thing, or a few at once."""
    sectors = guest.sectors
    size = guest.node.header.cluster_size // 512

    def place(most: int = 40) -> tuple[int, int]:
        first = rng.randrange(sectors)
        return first, min(rng.choice([1, 2, size, size + 1, most]), sectors - first)

    match rng.choices(
        ["write", "now", "zero", "discard", "compressed", "flush", "at once", "snapshot", "resize"],
        [6, 6, 2, 3, 2, 4, 3, 2 * snapshots, resizes],
    ):
        case ["write"]:
            await guest.write(*place())
        case ["now"]:
            await guest.write(*place(), at_once=True)
        case ["zero"]:
            await guest.zero(*place(), unmap=rng.random() < 0.5)
        case ["discard"]:
            await guest.discard(*place(100))
        case ["compressed"]:
            await guest.compressed(rng.randrange(sectors // size))
        case ["flush"]:
            await guest.flush()
        case ["at once"]:
            starts = sorted(rng.sample(range(sectors), 5))
            ends = [*starts[1:], sectors]
            work = []
            for first, end in zip(starts, ends, strict=True):
                count = min(end - first, rng.choice([1, size, 30]))
                match rng.randrange(5):
                    case 0:
                        work.append(guest.discard(first, count))
                    case 1:
                        work.append(guest.zero(first, count, unmap=True))
                    case 2:
                        work.append(guest.flush())
                    case _:
                        work.append(guest.write(first, count))
            await gather(*work)
        case ["snapshot"]:
            match rng.randrange(4):
                case 0 | 1:
                    await guest.snapshot()
                case 2:
                    await guest.delete_snapshot()
                case _:
                    await guest.apply_snapshot()
        case ["resize"]:
            await guest.resize(max(sectors + rng.choice([-60, -8, 8, 24, 60]), 100))


async def crash(case: str, kind: type[Bytes | Disk], seed: int, *, steps: int = 25, samples: int = 3) -> None:
    """Live for a while, then look at what a crash at any moment would have left."""
    async with Daemon() as daemon:
        lab = Lab(daemon, case, seed, kind)
        guest = await lab.prepare()
        snapshots = lab.spec.get("refcount_bits") != 1
        resizes = lab.spec.get("version") != 2 and "backing" not in lab.options
        for _ in range(steps):
            await act(guest, lab.rng, snapshots=snapshots, resizes=resizes)
        await lab.close()
        await lab.examine(samples=samples)


@pytest.mark.parametrize("kind", [Bytes, Disk])
@pytest.mark.parametrize("case", CASES)
async def test_a_crash_leaves_leaks_at_worst(case, kind):
    await crash(case, kind, 1, steps=20, samples=2)
