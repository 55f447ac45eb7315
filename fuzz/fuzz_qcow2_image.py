"""Invariant: whatever an image holds, a disk on it raises only Error and OSError, in bounded time and space, reads what
is sound as it was, and keeps an image sound in which a check finds nothing.

    python fuzz/fuzz_qcow2_image.py [seconds] [seed]

Small images, some made at start and some by QEMU (fuzz/corpus/qcow2_image), are damaged where their structures are, and
opened read-only and for writing: reads, writes, zeroes, discards, snapshots, resizes, several at once, flushes, closes.
A failure prints the seed and number of the image, and leaves the damaged image behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import logging
import os
import pathlib
import random
import resource
import signal
import struct
import sys
import time
import traceback
from typing import NamedTuple

from blkferry.crypt import luks
from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2 import compression, snapshots
from blkferry.drivers.qcow2.checking import check
from blkferry.drivers.qcow2.creation import CreateSpec, create
from blkferry.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET, ZERO, Geometry
from blkferry.drivers.qcow2.header import CryptMethod, Header
from blkferry.errors import Error
from blkferry.graph import access
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.testing import record

CORPUS = pathlib.Path(__file__).parent / "corpus" / "qcow2_image"
LEFT_BEHIND = pathlib.Path("/tmp/fuzz_qcow2_image.qcow2")

LARGEST = 160 << 20
"""The nodes below are full then. An L1 table as large as it may be, twice, and new refcounts fit."""

MEMORY = 3 << 30
SECONDS = 20
"""For one image. It takes a hundredth of that."""

SIZE = 96 << 10
FLAGS = (0, 0, ZERO, COMPRESSED, COPIED, COPIED, COPIED, COPIED | COMPRESSED, 1 << 56)
EXPECTED = (Error, OSError)


class Base(NamedTuple):
    """A sound image, the nodes it needs, and what a guest sees in it."""

    image: bytes
    options: dict[str, object]
    content: bytes
    data: bytes


class Small(record.Bytes):
    """Opaque, and not without limits."""

    def grow(self, length: int) -> bool:
        _limit(length)
        return super().grow(length)

    async def resize(self, length: int) -> None:
        _limit(length)
        await super().resize(length)

    def _put(self, start: int, data: bytes) -> None:
        assert 0 <= start <= start + len(data) <= self.length, "a write outside the file"
        super()._put(start, data)


class SmallDisk(record.Disk):
    """With a descriptor."""

    def fill(self, image: bytes) -> None:
        super().fill(image)
        self.log.fault = self._watch

    def _watch(self, verb: str, offset: int, length: int) -> int:
        if verb == "write":
            assert 0 <= offset <= offset + length <= self.length, "a write outside the file"
        return 0

    def grow(self, length: int) -> bool:
        _limit(length)
        return super().grow(length)

    async def resize(self, length: int) -> None:
        _limit(length)
        await super().resize(length)


def _limit(length: int) -> None:
    if length > LARGEST:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Images ----------------------------------------------------------------------------------------------------------


class Lab:
    """One daemon, with nodes that images are put into."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.files = [record.insert(daemon.graph, f"file{n}", kind) for n, kind in enumerate((Small, SmallDisk))]
        self.file = self.files[0]
        self.data = record.insert(daemon.graph, "data", Small)
        self.data.fill(b"")
        record.insert(daemon.graph, "base", Small).fill(b"base" * 128 * 90)

    def fill(self, number: int, image: bytes, data: bytes) -> None:
        for file in self.files:
            if file.storage is not None:
                file.storage.close()
                file.storage = None
        self.file = self.files[number]
        self.file.fill(image + bytes(-len(image) % 512))
        self.data.fill(data)

    async def open(self, options: dict[str, object], *, read_only: bool, user: bool = True) -> Root:
        wanted = {"driver": "qcow2", "node-name": "n", "file": self.file.name, "backing": None, "discard": "unmap"}
        node = await self.daemon.graph.add(visit(BlockdevOptions, wanted | options | {"read-only": read_only}))
        root = Root(node, "the target")
        if user:
            used = Permission.CONSISTENT_READ | (Permission(0) if read_only else Permission.WRITE)
            await root.attach(used, ALL)
        return root

    async def close(self, root: Root) -> None:
        await root.detach()
        await self.daemon.graph.remove("n")

    async def bases(self) -> list[Base]:
        found = [await self.base(gzip.decompress(path.read_bytes()), {}) for path in sorted(CORPUS.glob("*.gz"))]
        luks_options = luks.FormatOptions(key_bits=128, iterations=1000)
        rng = random.Random(1)
        for spec, options in (
            (CreateSpec(size=SIZE, cluster_size=512), {}),
            (CreateSpec(size=SIZE, cluster_size=4096, refcount_bits=64), {"backing": "base"}),
            (CreateSpec(size=SIZE, cluster_size=16384, extended_l2=True), {"backing": "base"}),
            (CreateSpec(size=SIZE, cluster_size=1024), {"l2-cache-size": 0, "refcount-cache-size": 0}),
            (CreateSpec(size=SIZE, cluster_size=4096, data_file_name="data"), {"data-file": "data"}),
            (CreateSpec(size=SIZE, cluster_size=512, data_file_name="d", data_file_raw=True), {"data-file": "data"}),
            (
                CreateSpec(size=SIZE, cluster_size=1024, version=2, encryption=CryptMethod.AES),
                {"encrypt": {"format": "aes", "key-secret": "s"}},
            ),
            (
                CreateSpec(
                    size=SIZE,
                    cluster_size=4096,
                    encryption=lambda _: luks.format_volume(b"pw", luks_options, random=rng.randbytes),
                ),
                {"encrypt": {"format": "luks", "key-secret": "s"}},
            ),
        ):
            self.fill(0, b"", b"")
            await create(self.file, self.data if "data-file" in options else None, spec)
            root = await self.open(options, read_only=False)
            for _ in range(2):
                for _ in range(6):
                    await act(root, rng, most=9000, snapshots_too=False)
                if "data-file" not in options:
                    await snapshots.create(root.node, "a")
            await self.close(root)
            found.append(await self.base(self.file.content(), options))
        return found

    async def base(self, image: bytes, options: dict[str, object]) -> Base:
        data = self.data.content() if "data-file" in options else b""
        self.fill(0, image, data)
        assert (await check(self.file, Header.parse(image, file_size=self.file.length))).clean
        root = await self.open(options, read_only=True)
        content = bytearray(root.node.length)
        await root.read(0, memoryview(content))
        await self.close(root)
        return Base(image + bytes(-len(image) % 512), options, bytes(content), data)


def places(header: Header, image: bytes) -> list[tuple[int, int]]:
    """Where structures are: offset and length."""
    size = header.cluster_size
    found = [(0, 112), (112, 200), (header.snapshots_offset, 200)]

    def table(offset: int, entries: int) -> None:
        found.append((offset, 8 * entries))
        for (entry,) in struct.iter_unpack(">Q", image[offset : offset + 8 * entries]):
            if entry & OFFSET:
                found.append((entry & OFFSET, size))

    table(header.l1_table_offset, header.l1_size)
    table(header.refcount_table_offset, 4)
    if header.nb_snapshots:
        offset, entries = struct.unpack_from(">QI", image, header.snapshots_offset)
        table(offset, entries)
    if header.bitmaps is not None:
        found.append((header.bitmaps.directory_offset, header.bitmaps.directory_size))
        table(*struct.unpack_from(">QI", image, header.bitmaps.directory_offset))
    if header.encryption is not None:
        found.append((header.encryption.offset, 592))
    return [(offset, length) for offset, length in found if 0 <= offset < len(image) - 8 and length]


def damage(rng: random.Random, original: bytes) -> bytes:
    image = bytearray(original)
    header = Header.parse(original)
    size = header.cluster_size
    known = places(header, original)

    def somewhere() -> int:
        start, length = rng.choice(known) if rng.random() < 0.95 else (0, len(image))
        at = start + (rng.choice((0, 0, 8, 16, rng.randrange(length))) & ~7)
        return min(at, len(image) - 8)

    def number() -> int:
        kind = rng.randrange(8)
        if kind == 0:
            return rng.getrandbits(64)
        if kind == 1:
            return rng.choice((0, 1, len(image), len(image) - size, 1 << 32, 1 << 55, (1 << 64) - 1, *FLAGS))
        place = rng.choice((rng.choice(known)[0], rng.randrange(len(image) // size + 2) * size))
        return place + rng.choice((0, 0, 0, 0, 0, 512, size // 2, 1)) | rng.choice(FLAGS)

    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = somewhere()
        match rng.randrange(10):
            case 0:
                image[at + rng.randrange(8)] ^= 1 << rng.randrange(8)
            case 1:
                image[at : at + size] = bytes(min(size, len(image) - at))
            case 2:
                source = somewhere()
                image[at : at + 8] = image[source : source + 8]
            case 3:
                source = somewhere() // size * size
                at = at // size * size
                image[at : at + size] = image[source : source + size].ljust(min(size, len(image) - at), b"\0")
            case 4 if len(image) > 8192 and rng.random() < 0.3:
                del image[rng.randrange(len(image) // 2, len(image)) // 512 * 512 :]
            case 5:
                image[at : at + 2] = rng.randbytes(2)
            case 6:
                image[at : at + 8] = struct.pack(">Q", struct.unpack_from(">Q", image, at)[0] ^ rng.choice(FLAGS))
            case 7:
                step = rng.choice((-1, 1)) * rng.choice((1, size, 1 << 54))
                image[at : at + 8] = struct.pack(">Q", (struct.unpack_from(">Q", image, at)[0] + step) % (1 << 64))
            case _:
                image[at : at + 8] = struct.pack(">Q", number())
    return bytes(image)


def sound_clusters(base: Base, image: bytes) -> list[int]:
    """Guest clusters that are read as before: nothing on the way to their bytes is damaged."""
    header = Header.parse(base.image)
    size, geometry = header.cluster_size, Geometry(header, header.cluster_size)
    if header.encryption is not None or image[:size] != base.image[:size]:
        return []
    found = []
    for cluster in range(len(base.content) // size):
        l1_at = header.l1_table_offset + 8 * geometry.l1_index(cluster * size)
        if image[l1_at : l1_at + 8] != base.image[l1_at : l1_at + 8]:
            continue
        table = struct.unpack_from(">Q", base.image, l1_at)[0] & OFFSET
        if table:
            words = 8 * geometry.words
            at = table + (cluster & (geometry.table_clusters - 1)) * words
            if image[at : at + words] != base.image[at : at + words]:
                continue
            entry = struct.unpack_from(">Q", base.image, at)[0]
            first, count = (entry & OFFSET) // size, 1
            if entry & COMPRESSED:
                first, count = geometry.compressed_clusters(entry)
            if "data-file" not in base.options and entry & (OFFSET | COMPRESSED):
                start, end = first * size, (first + count) * size
                if image[start:end] != base.image[start:end]:
                    continue
        found.append(cluster)
    return found


# Using them ------------------------------------------------------------------------------------------------------


async def act(root: Root, rng: random.Random, *, most: int = 40_000, snapshots_too: bool = True) -> None:
    """Do something to a disk."""
    node = root.node
    length = node.length
    if not length:
        return
    at = rng.randrange(length)
    count = min(rng.choice((1, 512, 700, 4096, rng.randrange(1, most))), length - at)
    data = memoryview(rng.randbytes(8) * (count // 8 + 1))[:count]
    match rng.randrange(14 if snapshots_too else 9):
        case 0 | 1:
            await root.write(at, data)
        case 2 | 3:
            if not root.write_now(at, data):
                await root.write(at, data)
        case 4:
            await root.write_zeroes(at, count, unmap=rng.random() < 0.5)
        case 5:
            await root.discard(at, count)
        case 6:
            await root.flush()
        case 7:
            await root.read(at, memoryview(bytearray(count)))
        case 8:
            size = node.header.cluster_size
            packed = compression.compress(node.header.compression_type, bytes(data[:1]) * size)
            if packed is not None and length >= size and node.data_file is None and node.cipher is None:
                with node.marking_corruption():
                    await node.writing.write_compressed(at % (length // size) * size, packed)
        case 9:
            await snapshots.create(node, rng.choice("abc"))
        case 10:
            await snapshots.apply(node, rng.choice("12abc"))
        case 11:
            await snapshots.delete(node, None, rng.choice("abc"))
        case 12:
            await node.resize(max(length + rng.choice((-9000, -512, 512, 70_000)) & ~511, 0))
        case _:
            at = 0
            for _ in range(50):
                if at >= node.length:
                    break
                at += sum(status.length for status in await root.status(at, node.length - at))


async def read_only(lab: Lab, base: Base, image: bytes, rng: random.Random) -> None:
    try:
        root = await lab.open(base.options, read_only=True)
    except EXPECTED:
        return
    size = Header.parse(image[: 2 << 20]).cluster_size
    sound = sound_clusters(base, image)
    everything = list(range(min(len(base.content), root.node.length, 4 << 20) // size))
    rng.shuffle(everything)
    for cluster in everything:
        found = bytearray(size)
        try:
            await root.read(cluster * size, memoryview(found))
        except EXPECTED:
            assert cluster not in sound, f"sound guest cluster {cluster} cannot be read"
        else:
            if cluster in sound:
                assert found == base.content[cluster * size : (cluster + 1) * size], f"guest cluster {cluster}"
    with contextlib.suppress(*EXPECTED):
        await access.status(root.node, 0, root.node.length)
    await lab.close(root)
    assert lab.file.content() == image, "reading has changed the image"


async def read_write(lab: Lab, base: Base, image: bytes, rng: random.Random) -> None:
    try:
        before = await check(lab.file, Header.parse(image[: 2 << 20], file_size=len(image)))
    except Error:
        before = None
    try:
        root = await lab.open(base.options, read_only=False)
    except EXPECTED:
        return
    failed = False
    for _ in range(rng.randrange(1, 12)):
        work = [act(root, rng) for _ in range(rng.choice((1, 1, 1, 4)))]
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, BaseException):
                if not isinstance(result, EXPECTED):
                    raise result
                failed = failed or isinstance(result, OSError)
    with contextlib.suppress(*EXPECTED):
        await root.flush()
    await lab.close(root)
    if before is not None and before.clean and not failed:
        content = lab.file.content()
        after = await check(lab.file, Header.parse(content[: 2 << 20], file_size=len(content)))
        assert not after.corruptions, after.messages
        assert not after.check_errors, after.messages


async def examine(lab: Lab, base: Base, image: bytes, rng: random.Random) -> None:
    nodes = set(lab.daemon.graph.nodes)
    for work in (read_only, read_write):
        lab.fill(rng.randrange(2), image, base.data)
        await work(lab, base, lab.file.content(), rng)
        assert set(lab.daemon.graph.nodes) == nodes, "nodes are left over"
    length = lab.file.length
    assert length <= LARGEST + (1 << 20), f"the file has become {length} bytes long"


class TooLong(BaseException):
    """Not an error that anybody would take for one of a disk."""


def _too_long(*_: object) -> None:
    raise TooLong


async def run(seconds: float, seed: int) -> int:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    images = 0
    async with Daemon() as daemon:
        await daemon.execute("object-add", {"qom-type": "secret", "id": "s", "data": "pw"})
        lab = Lab(daemon)
        bases = await lab.bases()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rng = random.Random(f"{seed}.{images}")
            base = rng.choice(bases)
            image = damage(rng, base.image)
            signal.alarm(SECONDS)
            try:
                await asyncio.wait_for(examine(lab, base, image, rng), SECONDS / 2)
            except BaseException:  # noqa: BLE001 - all of them are findings
                traceback.print_exc()
                sys.stderr.write(f"seed {seed}, image {images} of base {bases.index(base)}, left in {LEFT_BEHIND}\n")
                LEFT_BEHIND.write_bytes(image)
                sys.stderr.flush()
                os._exit(1)  # whatever hangs must not keep us from ending
            signal.alarm(0)
            images += 1
        lab.fill(0, b"", b"")
        for file in lab.files:
            file.storage = None
    return images


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    sys.stdout.write(f"{asyncio.run(run(seconds, seed))} images, seed {seed}\n")
