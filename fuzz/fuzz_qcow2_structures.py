"""Invariant: damaged structures are refused with Error, or rebuild to what parses equal; soon, in little memory.

    python fuzz/fuzz_qcow2_structures.py [seconds] [seed]

The corpus holds first clusters of images that qemu-img made (NAME.header, without the zeroes at the end), and their
snapshot tables and bitmap directories (NAME.snapshots, NAME.bitmaps), which are parsed for the header of the same name.
It is replayed first. A failure prints the seed and the bytes that reproduce it.
"""

from __future__ import annotations

import pathlib
import random
import resource
import struct
import sys
import time

from blkferry.drivers.qcow2 import bitmap_directory, snapshot_table
from blkferry.drivers.qcow2.header import Header
from blkferry.errors import Error, ErrorKind

CORPUS = pathlib.Path(__file__).parent / "corpus" / "qcow2_structures"
LONGEST = 5  # seconds for one input; milliseconds are usual, but the machine may be busy
MEMORY = 1 << 30  # bytes of address space that all of this may take
NUMBERS = (0, 1, 7, 8, 9, 72, 103, 104, 105, 112, 511, 512, 1023, 1024, 4096, 65535, 65536, 1 << 31, (1 << 32) - 1)
LARGE = (1 << 9, 1 << 16, 1 << 40, 1 << 56, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)
MAGICS = (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678)


def damaged(rng, data, others):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at & ~3 : (at & ~3) + 4] = struct.pack(">I", rng.choice(NUMBERS))
            case 3:
                data[at & ~3 : (at & ~3) + 8] = struct.pack(">Q", rng.choice(LARGE))
            case 4:
                data[at & ~7 : at & ~7] = struct.pack(">II", rng.choice(MAGICS), rng.choice(NUMBERS))
            case 5:
                del data[at : at + rng.randrange(1, 64)]
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other)) & ~7
                data[at & ~7 : at & ~7] = other[start : start + rng.randrange(1, 256)]
            case _:
                data[at:] = bytes(rng.randrange(64)) * rng.randrange(2)
    return bytes(data)


def rebuilt(value, build, parse):
    try:
        built = build(value)
    except Error as error:
        # What was written more tightly than we write, without an end marker for one, may not fit any more.
        if error.kind != ErrorKind.NO_SPACE:
            raise
        return
    assert parse(built) == value


def try_header(data):
    try:
        header = Header.parse(data)
    except Error:
        return False
    rebuilt(header, Header.build, Header.parse)
    return True


def try_snapshots(data, count, header):
    def parse(table):
        return snapshot_table.parse(table, count, header)

    try:
        snapshots = parse(data)
    except Error:
        return False
    reader = snapshot_table.SnapshotTableReader(count, header)
    at = 0
    while wanted := reader.wanted:
        reader.receive(data[at : at + wanted])
        at += wanted
    assert reader.snapshots == snapshots
    rebuilt(snapshots, snapshot_table.build, parse)
    return True


def try_bitmaps(data, count, header):
    def parse(directory):
        return bitmap_directory.parse(directory, count, header)

    def build(bitmaps):
        return bitmap_directory.build(bitmaps, header)

    try:
        bitmaps = parse(data)
    except Error:
        return False
    rebuilt(bitmaps, build, parse)
    return True


def cases():
    """What the corpus holds, each with what parses it: (bytes, attempt, arguments)."""
    for path in sorted(CORPUS.iterdir()):
        data = path.read_bytes()
        header = Header.parse(path.with_suffix(".header").read_bytes())
        match path.suffix:
            case ".header":
                yield data, try_header, ()
            case ".snapshots":
                yield data, try_snapshots, (header.nb_snapshots, header)
            case ".bitmaps":
                yield data, try_bitmaps, (header.bitmaps.count, header)


def run(seconds, seed):
    rng = random.Random(seed)
    corpus = list(cases())
    for data, attempt, arguments in corpus:
        assert attempt(data, *arguments)
    others = [data for data, _, _ in corpus]
    inputs = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data, attempt, arguments = rng.choice(corpus)
        data = damaged(rng, data, others)
        try:
            started = time.monotonic()
            attempt(data, *arguments)
            assert time.monotonic() - started < LONGEST
        except Exception:
            sys.stderr.write(f"seed {seed}, {attempt.__name__}, {data.hex()}\n")
            raise
        inputs += 1
    return inputs


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    sys.stdout.write(f"{run(seconds, seed)} inputs, seed {seed}\n")
