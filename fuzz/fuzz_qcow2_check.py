"""Invariant: whatever an image holds, checks end and change nothing, leaks are repaired without harm, a repair of all
leaves nothing wrong unless it says that it could not, and a second check agrees.

    python fuzz/fuzz_qcow2_check.py [seconds] [seed]

Small images, some made at start and some by QEMU (fuzz/corpus/qcow2_check), have their metadata damaged: fields of
the header, entries of tables that are made to point to other structures, parts zeroed, copied or cut off. A failure
prints the seed and number of the image, and leaves the damaged image behind.
"""

from __future__ import annotations

import asyncio
import gzip
import pathlib
import random
import struct
import sys
import time

from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2.checking import Repair, check
from blkferry.drivers.qcow2.creation import CreateSpec, Preallocation, create
from blkferry.drivers.qcow2.header import Header
from blkferry.errors import Error
from blkferry.graph import access

CORPUS = pathlib.Path(__file__).parent / "corpus" / "qcow2_check"
LEFT_BEHIND = pathlib.Path("/tmp/fuzz_qcow2_check.img")
GROWTH = 48 << 20  # an L1 table as large as it may be, and new refcount structures

OPTIONS = (
    {"cluster_size": 512},
    {"cluster_size": 512, "preallocation": Preallocation.METADATA},
    {"cluster_size": 512, "refcount_bits": 1, "preallocation": Preallocation.METADATA},
    {"cluster_size": 512, "refcount_bits": 64, "preallocation": Preallocation.METADATA},
    {"cluster_size": 1024, "version": 2, "preallocation": Preallocation.METADATA},
    {"cluster_size": 16384, "extended_l2": True, "preallocation": Preallocation.METADATA},
)
HEADER_FIELDS = (24, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96)
FLAGS = (0, 0, 1, 2, 1 << 62, 1 << 63, 1 << 63, 3 << 62, 1 << 56)


async def load(node, image):
    await node.resize(0)
    await node.resize(len(image))
    await access.write(node, 0, memoryview(image))


async def content(node):
    image = bytearray(node.length)
    await access.read(node, 0, memoryview(image))
    return bytes(image)


async def originals(node):
    for options in OPTIONS:
        await node.resize(0)
        await create(node, None, CreateSpec(size=40960, **options))
        yield await content(node)
    for path in sorted(CORPUS.glob("*.gz")):
        image = gzip.decompress(path.read_bytes())
        yield image + bytes(-len(image) % 512)  # nodes have whole sectors


def damage(rng, original):
    """Change an image in a few places."""
    image = bytearray(original)
    header = Header.parse(original)
    size = header.cluster_size
    tables = [header.l1_table_offset, header.refcount_table_offset, header.snapshots_offset]
    for table in tables[:2]:
        tables += [struct.unpack_from(">Q", image, table + 8 * n)[0] & 0x00FFFFFFFFFFFE00 for n in range(2)]
    if header.bitmaps is not None:
        tables.append(header.bitmaps.directory_offset)
    tables = [table for table in tables if 0 < table < len(image) - 8]

    def somewhere():
        start = rng.choice(tables) if rng.random() < 0.8 else rng.randrange(len(image) // size) * size
        return min(start + rng.choice((0, 0, 8, 16, rng.randrange(size // 8) * 8)), len(image) - 8)

    def number():
        kind = rng.randrange(6)
        if kind == 0:
            return rng.getrandbits(64)
        if kind == 1:
            return rng.choice((0, 1, len(image), len(image) - size, 1 << 32, 1 << 55, (1 << 64) - 1))
        place = rng.choice((*tables, rng.randrange(len(image) // size + 2) * size))
        return place + rng.choice((0, 0, 0, 0, 512, size // 2)) | rng.choice(FLAGS)

    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        match rng.randrange(10):
            case 0:
                at = rng.choice(HEADER_FIELDS)
                image[at : at + 8] = struct.pack(">Q", number())
            case 1:
                at = somewhere() + rng.randrange(8)
                image[at] ^= 1 << rng.randrange(8)
            case 2:
                at = somewhere()
                image[at : at + size] = bytes(min(size, len(image) - at))
            case 3:
                at, source = somewhere(), somewhere()
                image[at : at + 8] = image[source : source + 8]
            case 4:
                at, source = somewhere() // size * size, somewhere() // size * size
                image[at : at + size] = image[source : source + size].ljust(min(size, len(image) - at), b"\0")
            case 5 if len(image) > 8192:
                del image[rng.randrange(len(image) // 2, len(image)) :]
                image += bytes(-len(image) % 512)
                tables = [table for table in tables if table < len(image) - 8] or [0]
            case 6:
                at = somewhere()
                image[at : at + 2] = rng.randbytes(2)
            case _:
                at = somewhere()
                image[at : at + 8] = struct.pack(">Q", number())
    return bytes(image)


async def examine(node, image):
    await load(node, image)
    try:
        header = Header.parse(image, file_size=node.length)
    except Error:
        return False
    found = await check(node, header)
    assert await content(node) == image, "a check has changed the image"

    after_leaks = await check(node, header, repair=Repair.LEAKS)
    assert after_leaks.corruptions <= found.corruptions, (found, after_leaks)

    await load(node, image)
    repaired = await check(node, header, repair=Repair.ALL)
    assert len(image) <= node.length <= len(image) + GROWTH
    after = await content(node)
    again = await check(node, Header.parse(after, file_size=node.length))
    assert await content(node) == after
    if not repaired.check_errors:
        assert again.corruptions == repaired.corruptions, (repaired, again)
        assert again.leaks == repaired.leaks == 0, (repaired, again)
        assert not again.check_errors, again
        # More users than a narrow refcount can count: only a copy of the image can help.
        overflows = [message for message in again.messages if message.startswith("ERROR overflow")]
        assert again.corruptions == 0 or overflows, (repaired, again)
    elif not repaired.modified:
        assert after == image
    return True


async def run(seconds, seed):
    images = 0
    end = time.monotonic() + seconds
    async with Daemon() as daemon:
        await daemon.execute("blockdev-add", {"driver": "memory", "node-name": "m", "size": 0})
        node = daemon.graph.find("m")
        sound = [image async for image in originals(node)]
        for image in sound:
            await load(node, image)
            assert (await check(node, Header.parse(image, file_size=len(image)))).clean
        while time.monotonic() < end:
            rng = random.Random(f"{seed}.{images}")
            image = damage(rng, rng.choice(sound))
            try:
                await examine(node, image)
            except BaseException:
                sys.stderr.write(f"seed {seed}, image {images}, left in {LEFT_BEHIND}\n")
                LEFT_BEHIND.write_bytes(image)
                raise
            images += 1
    return images


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    sys.stdout.write(f"{asyncio.run(run(seconds, seed))} images, seed {seed}\n")
