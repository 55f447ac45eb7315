"""What a guest did to a disk, and what it may find there after a crash.

A sector's versions are kept with the positions in the log between which they came about. What a flush has made durable
must be there, or something newer; a snapshot must be there whole from the moment its command has returned.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from blkferry.drivers.qcow2 import compression, snapshots
from blkferry.drivers.qcow2.checking import Repair, check
from blkferry.drivers.qcow2.header import Header, Incompatible
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error
from blkferry.graph import access
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.testing import record
from blkferry.testing.record import Bytes, Change, Crashes, Log

SECTOR = 512
LEFT_BEHIND = Path(tempfile.gettempdir()) / "blkferry-crashed.qcow2"


@dataclass(slots=True)
class Version:
    begun: int
    done: int | None
    value: bytes | None  # None: nothing is promised


@dataclass(slots=True)
class Taken:
    """A snapshot: what it holds, when it is certainly there."""

    content: bytes
    done: int | None
    gone: int | None = None


@dataclass
class Guest:
    """A guest on a node; all that it does goes into its book. Ranges are whole sectors."""

    root: Root
    log: Log
    rng: random.Random
    versions: list[list[Version]] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)
    taken: dict[str, Taken] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # position and sectors
    repairs: list[tuple[int, int | None]] = field(default_factory=list)
    """When an image may need repair although it is not called dirty: between these positions."""
    stamps: int = 0

    @property
    def node(self) -> Qcow2:
        node = self.root.node
        assert isinstance(node, Qcow2)
        return node

    @property
    def sectors(self) -> int:
        return self.node.length // SECTOR

    async def look(self) -> None:
        """Take what is there for what has always been there."""
        content = await self.content()
        self.versions = [[Version(0, 0, content[at : at + SECTOR])] for at in range(0, len(content), SECTOR)]
        self.sizes = [(0, self.sectors)]

    async def content(self) -> bytes:
        data = bytearray(self.node.length)
        await self.root.read(0, memoryview(data))
        return bytes(data)

    def stamp(self, first: int, count: int) -> bytes:
        """Bytes that say who wrote them, compressible."""
        self.stamps += 1
        return b"".join(b"%07x:%07x." % (self.stamps, first + n) * 32 for n in range(count))

    def _begin(self, first: int, values: list[bytes | None]) -> list[Version]:
        begun = self.log.now()
        found = [Version(begun, None, value) for value in values]
        for sector, version in enumerate(found, first):
            self.versions[sector].append(version)
        return found

    def _end(self, versions: list[Version]) -> None:
        done = self.log.now()
        for version in versions:
            version.done = done

    async def write(self, first: int, count: int, *, at_once: bool = False) -> None:
        data = self.stamp(first, count)
        versions = self._begin(first, [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)])
        if not at_once or not self.root.write_now(first * SECTOR, memoryview(data)):
            await self.root.write(first * SECTOR, memoryview(data))
        self._end(versions)

    async def compressed(self, cluster: int) -> None:
        node = self.node
        size = node.header.cluster_size
        first, count = cluster * size // SECTOR, size // SECTOR
        data = self.stamp(first, count)
        packed = compression.compress(node.header.compression_type, data)
        if packed is None or (first + count) > self.sectors:
            return
        versions = self._begin(first, [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)])
        await node.writing.write_compressed(cluster * size, packed)
        self._end(versions)

    async def zero(self, first: int, count: int, *, unmap: bool) -> None:
        versions = self._begin(first, [bytes(SECTOR)] * count)
        await self.root.write_zeroes(first * SECTOR, count * SECTOR, unmap=unmap)
        self._end(versions)

    async def discard(self, first: int, count: int) -> None:
        """Either what was there or zeroes, and only a look tells which: nobody else may write there meanwhile."""
        versions = self._begin(first, [bytes(SECTOR)] * count)
        await self.root.discard(first * SECTOR, count * SECTOR)
        found = bytearray(count * SECTOR)
        await self.root.read(first * SECTOR, memoryview(found))
        for at, version in enumerate(versions):
            version.value = bytes(found[at * SECTOR : (at + 1) * SECTOR])
        self._end(versions)

    async def flush(self) -> None:
        begun = self.log.now()
        await self.root.flush()
        self.flushes.append((begun, self.log.now()))

    def _may_need_repair(self) -> int:
        """Version 2 has no dirty bit."""
        if self.node.header.version < 3:
            self.repairs.append((self.log.now(), None))
        return len(self.repairs)

    def _needs_none(self, number: int) -> None:
        if self.node.header.version < 3:
            self.repairs[number - 1] = (self.repairs[number - 1][0], self.log.now())

    async def snapshot(self) -> None:
        name = f"s{len(self.taken)}"
        number = self._may_need_repair()
        content = await self.content()
        taken = self.taken[name] = Taken(content, None)
        await snapshots.create(self.node, name)
        taken.done = self.log.now()
        self._needs_none(number)

    def _some_snapshot(self) -> str | None:
        there = [name for name, taken in self.taken.items() if taken.done is not None and taken.gone is None]
        return self.rng.choice(there) if there else None

    async def delete_snapshot(self) -> None:
        name = self._some_snapshot()
        if name is not None:
            number = self._may_need_repair()
            self.taken[name].gone = self.log.now()
            await snapshots.delete(self.node, None, name)
            self._needs_none(number)

    async def apply_snapshot(self) -> None:
        name = self._some_snapshot()
        if name is None:
            return
        number = self._may_need_repair()
        content = self.taken[name].content
        count = len(content) // SECTOR
        self._extend(count)
        self.sizes.append((self.log.now(), count))
        versions = self._begin(0, [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)])
        rest = self._begin(count, [None] * (len(self.versions) - count))
        await snapshots.apply(self.node, name)
        self._end(versions + rest)
        self._needs_none(number)

    def _extend(self, count: int) -> None:
        while len(self.versions) < count:
            self.versions.append([Version(0, 0, None)])

    async def resize(self, count: int) -> None:
        old = self.sectors
        self._extend(count)
        self.sizes.append((self.log.now(), count))
        low, high = min(old, count), max(old, count)
        # Nothing is promised of what comes or goes, until a flush.
        between = self._begin(low, [None] * (high - low))
        after = self._begin(low, [bytes(SECTOR) if count > old else None] * (high - low))
        await self.node.resize(count * SECTOR)
        self._end(between + after)

    # After the crash ---------------------------------------------------------------------------------------------

    def allowed(self, sector: int, cut: int) -> list[bytes | None]:
        kept = max((begun for begun, done in self.flushes if done <= cut), default=0)
        history = [version for version in self.versions[sector] if version.begun < cut]
        first = max(n for n, version in enumerate(history) if version.done is not None and version.done <= kept)
        return [version.value for version in history[first:]]

    def compare(self, content: bytes, cut: int) -> None:
        """Fail where a sector holds what it cannot."""
        sizes = [count for at, count in self.sizes if at < cut]
        assert len(content) // SECTOR in sizes, f"a disk of {len(content) // SECTOR} sectors; it had {sizes}"
        for sector in range(len(content) // SECTOR):
            allowed = self.allowed(sector, cut)
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if None not in allowed and found not in allowed:
                shown = [(value or b"?")[:16] for value in allowed]
                raise AssertionError(f"sector {sector} holds {found[:16]!r}, not one of {shown}")

    def may_need_repair(self, cut: int) -> bool:
        return any(begun < cut and (done is None or cut <= done) for begun, done in self.repairs)


class Patterns:
    """Ways to choose what of the loose changes is there."""

    def __init__(self, rng: random.Random, loose: list[Change], samples: int) -> None:
        self._loose = loose
        picks = [self._none, self._all]
        for change in loose if len(loose) <= samples else rng.sample(loose, samples):
            picks += [self._only(change), self._all_but(change)]
        for _ in range(samples):
            picks.append(self._some(rng.randrange(1 << 30), rng.random()))
            picks.append(self._torn(rng.randrange(1 << 30), rng.random()))
        if len(picks) > 2 + 2 * samples:
            picks = picks[:2] + rng.sample(picks[2:], 2 * samples)
        self.picks = picks if loose else [self._none]

    @staticmethod
    def _none(change: Change, sector: int) -> bool:
        del change, sector
        return False

    @staticmethod
    def _all(change: Change, sector: int) -> bool:
        del change, sector
        return True

    @staticmethod
    def _only(wanted: Change):
        return lambda change, _sector: change is wanted

    @staticmethod
    def _all_but(unwanted: Change):
        return lambda change, _sector: change is not unwanted

    @staticmethod
    def _some(seed: int, share: float):
        return lambda change, _sector: random.Random(seed * 7919 + change.begun).random() < share

    @staticmethod
    def _torn(seed: int, share: float):
        return lambda change, sector: random.Random((seed * 7919 + change.begun) * 7919 + sector).random() < share


class Examiner:
    """Looks at images that crashes left behind. `base` names the backing node of the images, if they have one."""

    def __init__(self, daemon, base: str | None = None, secret: str | None = None) -> None:
        self.daemon = daemon
        self.base = base
        self.secret = secret
        self.node = record.insert(daemon.graph, "crashed", Bytes)
        self.images = 0
        self.dirty = 0

    async def examine(self, image: bytes, guest: Guest, cut: int) -> None:
        self.images += 1
        self.node.fill(image)
        header = Header.parse(image[: 2 << 20], file_size=len(image))
        found = await check(self.node, header)
        assert not found.check_errors, found.messages
        dirty = bool(header.incompatible & Incompatible.DIRTY)
        self.dirty += dirty
        if found.corruptions:
            assert dirty or guest.may_need_repair(cut), found.messages
            repaired = await check(self.node, header, repair=Repair.ALL)
            assert not repaired.check_errors, repaired.messages
            assert not repaired.corruptions, repaired.messages
        guest.compare(await self.read(), cut)
        for name, taken in guest.taken.items():
            if taken.done is not None and taken.done <= cut and (taken.gone is None or taken.gone > cut):
                assert await self.read(snapshot=name) == taken.content, f"snapshot {name} has changed"

    async def write_on(self, image: bytes, *, repaired: bool) -> None:
        """Open the image for writing, as somebody does after a crash, and use it."""
        self.node.fill(image)
        if repaired:
            await check(self.node, Header.parse(image[: 2 << 20], file_size=len(image)), repair=Repair.ALL)
        node = await self._open("r", **{"read-only": False, "discard": "unmap"})
        root = Root(node, "the test")
        size = node.length
        before = bytearray(size)
        await root.read(0, memoryview(before))
        for start in range(0, size - 700, size // 7 & ~511 | 512):
            await root.write(start, memoryview(b"\x77" * 700))
            before[start : start + 700] = b"\x77" * 700
        await root.flush()
        after = bytearray(size)
        await root.read(0, memoryview(after))
        assert after == before
        await self.daemon.graph.remove("r")
        content = self.node.content()
        found = await check(self.node, Header.parse(content[: 2 << 20], file_size=len(content)))
        assert not found.corruptions, found.messages
        assert not found.check_errors, found.messages

    async def _open(self, name: str, **options: object) -> Qcow2:
        wanted = {"driver": "qcow2", "node-name": name, "file": "crashed", "backing": self.base, **options}
        if self.secret:
            wanted["encrypt"] = {"format": "luks", "key-secret": self.secret}
        return await self.daemon.graph.add(visit(BlockdevOptions, wanted))

    async def read(self, **options: object) -> bytes:
        node = await self._open("r", **{"read-only": True}, **options)
        content = bytearray(node.length)
        await access.read(node, 0, memoryview(content))
        await self.daemon.graph.remove("r")
        return bytes(content)


async def examine_all(
    log: Log, guest: Guest, examiner: Examiner, rng: random.Random, *, samples: int = 4, write_on: float = 0.05
) -> None:
    """Cut the log at every flush; an image for each of some choices of what was not flushed."""
    crashes = Crashes(log)
    cuts = sorted({flush.done - 1 for flush in log.flushes if flush.done is not None} | {log.position + 1})
    for cut in cuts:
        crashes.image(cut, Patterns._none)
        for number, pick in enumerate(Patterns(rng, crashes.loose(cut), samples).picks):
            image = crashes.image(cut, pick)
            try:
                await examiner.examine(image, guest, cut)
                if rng.random() < write_on:
                    await examiner.write_on(image, repaired=guest.may_need_repair(cut))
            except (AssertionError, Error, OSError) as error:
                LEFT_BEHIND.write_bytes(image)
                where = f"cut {cut} of {log.position}, choice {number}, left in {LEFT_BEHIND}"
                raise AssertionError(f"{where}: {error}; loose were {_told(crashes.loose(cut), pick)}") from error


def _told(loose: list[Change], pick) -> list[str]:
    told = []
    for change in loose[:40]:
        first, end = change.offset // SECTOR, -(-(change.offset + len(change.data)) // SECTOR)
        there = "".join("-x"[pick(change, sector)] for sector in range(first, max(end, first + 1)))
        told.append(f"{'size ' if change.size is not None else ''}{change.size or hex(change.offset)}: {there}")
    return told


async def gather(*work) -> None:
    """Do these at once; all have ended when this returns."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
