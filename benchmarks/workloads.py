"""The rows of the comparison: what the client does, to which image, in which state, against whom, with which target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from images import Cache, Image
from servers import (
    BARE,
    BLKFERRY,
    BLKFERRY_BITMAPS,
    BLKFERRY_FUSE,
    BLKFERRY_PASSTHROUGH,
    BLKFERRY_RAW,
    BLKFERRY_THREADS,
    NBDKIT,
    NBDKIT_NOCACHE,
    QSD,
    QSD_BITMAPS,
    QSD_FUSE,
    QSD_IO_URING,
    QSD_NATIVE,
    Server,
)

EVERYONE = (BLKFERRY, QSD, NBDKIT)
QCOW2_READERS = (BLKFERRY, BLKFERRY_RAW, QSD)
WITH_BITMAPS = (BLKFERRY_BITMAPS, BLKFERRY, QSD_BITMAPS)
FUSE = (BLKFERRY_FUSE, QSD_FUSE)
PASSTHROUGH = (BLKFERRY_PASSTHROUGH, BARE)
DIRECT = (QSD, QSD_IO_URING, QSD_NATIVE, NBDKIT_NOCACHE)


@dataclass(frozen=True, slots=True)
class Target:
    """What design.md section 5 asks for, as ratios of blkferry to the better peer; None where it asks nothing."""

    cpu: float | None = None  # at most
    iops: float | None = None  # at least


NO_TARGET = Target()
DEEP = Target(cpu=0.5, iops=1.5)
SHALLOW = Target(iops=0.9)
LARGE_READ = Target(cpu=0.4)
ENCRYPTED_READ = Target(iops=1.0)
EQUAL = Target(iops=1.0)
TWICE = Target(iops=2.0)
NEAR = Target(iops=0.8)
ALLOCATING = Target(iops=1.0)
GUEST_SHALLOW = Target(iops=1.5)
GUEST = Target(iops=1.0)
RECORDED = Target(cpu=1.05)


@dataclass(frozen=True, slots=True)
class Row:
    """One workload. The first server is the one the others are compared with."""

    name: str
    title: str
    pattern: str  # fio's rw=
    block_size: int
    depth: int
    connections: int = 1
    image: Image = Image.RANDOM
    cache: Cache = Cache.WARM
    direct: bool = False
    iothread: bool = False
    tls: bool = False
    vhost_user: bool = False  # the client is qemu-img bench, which goes through the image in order
    engine: str = "nbd"  # fio's; with any other it works on a file that the server shows
    buffered: bool = False  # fio uses the page cache of that file
    servers: tuple[Server, ...] = EVERYONE
    target: Target = NO_TARGET
    most_bytes: int | None = None  # a run over a cold cache ends before it has warmed much of it
    note: str = ""

    @property
    def is_write(self) -> bool:
        return self.pattern in {"write", "randwrite"}


def fuse_row(name: str, title: str, pattern: str, block_size: int, depth: int, **more: Any) -> Row:
    """Files of two servers that fio opens with O_DIRECT, so that every request reaches the server."""
    engine = "psync" if depth == 1 else "io_uring"
    note = "QSD 10.0 corrupts what several write at a time." if "write" in pattern else ""
    return Row(name, f"FUSE, {title}", pattern, block_size, depth, engine=engine, servers=FUSE, note=note, **more)


K4 = 4 << 10
K256 = 256 << 10
ROWS = (
    Row("read-4k-qd32", "4 KiB random read, QD 32, page cache", "randread", K4, 32, target=DEEP),
    Row("read-4k-qd1", "4 KiB random read, QD 1, page cache", "randread", K4, 1, target=SHALLOW),
    Row("read-4k-4x16", "4 KiB random read, 4 connections x QD 16, page cache", "randread", K4, 16, connections=4),
    Row("read-256k-qd8", "256 KiB sequential read, QD 8, page cache", "read", K256, 8, target=LARGE_READ),
    Row("write-4k-qd32", "4 KiB random write, QD 32, page cache", "randwrite", K4, 32, target=DEEP),
    Row("write-256k-qd8", "256 KiB sequential write, QD 8, page cache", "write", K256, 8),
    Row(
        "direct-4k-qd32",
        "4 KiB random read, QD 32, O_DIRECT",
        "randread",
        K4,
        32,
        cache=Cache.COLD,
        direct=True,
        servers=(BLKFERRY, *DIRECT),
        target=DEEP,
    ),
    Row(
        "direct-4k-qd32-threads",
        "4 KiB random read, QD 32, O_DIRECT, io_uring refused to blkferry",
        "randread",
        K4,
        32,
        cache=Cache.COLD,
        direct=True,
        servers=(BLKFERRY_THREADS, *DIRECT),
        note="What the worker pool costs where a container's filter refuses io_uring; the peers are not restricted.",
    ),
    Row(
        "cold-4k-qd32",
        "4 KiB random read, QD 32, page cache dropped before",
        "randread",
        K4,
        32,
        cache=Cache.COLD,
        target=DEEP,
        most_bytes=128 << 20,
        note="At most an eighth of the image is read, each block once, so that nearly all reads reach the disk.",
    ),
    Row(
        "sparse-256k-qd8",
        "256 KiB sequential read, QD 8, holes and data in turns of 64 KiB",
        "read",
        K256,
        8,
        image=Image.STRIPED,
        target=LARGE_READ,
    ),
    Row(
        "hole-256k-qd8",
        "256 KiB sequential read, QD 8, nothing but a hole",
        "read",
        K256,
        8,
        image=Image.HOLE,
        target=LARGE_READ,
    ),
    Row(
        "qcow2-read-4k-qd32",
        "4 KiB random read, QD 32, page cache, qcow2",
        "randread",
        K4,
        32,
        image=Image.QCOW2,
        servers=QCOW2_READERS,
        target=Target(iops=2.0),
        note="The CPU of blkferry with the raw image is the other yardstick: at most 1.3 times that.",
    ),
    Row(
        "qcow2-read-4k-qd1",
        "4 KiB random read, QD 1, page cache, qcow2",
        "randread",
        K4,
        1,
        image=Image.QCOW2,
        servers=QCOW2_READERS,
        target=SHALLOW,
    ),
    Row(
        "qcow2-read-256k-qd8",
        "256 KiB sequential read, QD 8, page cache, qcow2",
        "read",
        K256,
        8,
        image=Image.QCOW2,
        servers=QCOW2_READERS,
        target=LARGE_READ,
    ),
    Row(
        "qcow2-allocate-64k-qd8",
        "64 KiB sequential write to a new qcow2 image, QD 8",
        "write",
        64 << 10,
        8,
        image=Image.QCOW2_FRESH,
        servers=(BLKFERRY, QSD),
        target=ALLOCATING,
        most_bytes=256 << 20,
    ),
    Row(
        "qcow2-allocate-4k-qd32",
        "4 KiB sequential write to a new qcow2 image, QD 32",
        "write",
        K4,
        32,
        image=Image.QCOW2_FRESH,
        servers=(BLKFERRY, QSD),
        target=ALLOCATING,
        most_bytes=256 << 20,
    ),
    Row(
        "qcow2-allocate-random-qd32",
        "4 KiB random write to a new qcow2 image, QD 32",
        "randwrite",
        K4,
        32,
        image=Image.QCOW2_FRESH,
        servers=(BLKFERRY, QSD),
        target=ALLOCATING,
        most_bytes=64 << 20,
        note="16,384 writes into 16,384 clusters, each block once: most of them allocate.",
    ),
    Row(
        "bitmaps-write-4k-qd32",
        "4 KiB random write, QD 32, page cache, recorded by 4 dirty bitmaps",
        "randwrite",
        K4,
        32,
        servers=WITH_BITMAPS,
        target=RECORDED,
        most_bytes=256 << 20,
        note="Of 65,536 writes some 16,000 are the first in their granule. The target is against us without bitmaps.",
    ),
    Row(
        "bitmaps-qcow2-allocate-random-qd32",
        "4 KiB random write to a new qcow2 image, QD 32, recorded by 4 dirty bitmaps",
        "randwrite",
        K4,
        32,
        image=Image.QCOW2_FRESH,
        servers=WITH_BITMAPS,
        target=RECORDED,
        most_bytes=256 << 20,
    ),
    Row(
        "tls-read-256k-qd8",
        "256 KiB sequential read, QD 8, page cache, TLS with certificates",
        "read",
        K256,
        8,
        tls=True,
        target=ENCRYPTED_READ,
    ),
    Row(
        "tls-read-4k-qd32", "4 KiB random read, QD 32, page cache, TLS with certificates", "randread", K4, 32, tls=True
    ),
    Row(
        "iothread-4k-qd32",
        "4 KiB random read, QD 32, page cache, in an iothread",
        "randread",
        K4,
        32,
        iothread=True,
        target=DEEP,
        note="nbdkit knows no iothreads and runs as ever.",
    ),
    *(
        Row(
            f"vhost-user-{image_name}{name}",
            f"vhost-user-blk, {title}, page cache{', qcow2' if image is Image.QCOW2 else ''}",
            pattern,
            block_size,
            depth,
            image=image,
            vhost_user=True,
            servers=(BLKFERRY, QSD),
            target=target,
        )
        for image, image_name in ((Image.RANDOM, ""), (Image.QCOW2, "qcow2-"))
        for name, title, pattern, block_size, depth, target in (
            ("read-4k-qd1", "4 KiB read, QD 1", "read", K4, 1, GUEST_SHALLOW),
            ("read-4k-qd32", "4 KiB read, QD 32", "read", K4, 32, GUEST),
            ("read-256k-qd8", "256 KiB read, QD 8", "read", K256, 8, GUEST),
            ("write-4k-qd32", "4 KiB write, QD 32", "write", K4, 32, GUEST),
        )
    ),
    fuse_row("fuse-read-4k", "4 KiB random read, psync", "randread", K4, 1, target=EQUAL),
    fuse_row("fuse-read-4k-4", "4 KiB random read, psync, 4 jobs", "randread", K4, 1, connections=4, target=EQUAL),
    fuse_row("fuse-read-4k-qd32", "4 KiB random read, io_uring, QD 32", "randread", K4, 32, target=TWICE),
    fuse_row("fuse-write-4k", "4 KiB random write, psync", "randwrite", K4, 1, target=EQUAL),
    fuse_row("fuse-write-4k-4", "4 KiB random write, psync, 4 jobs", "randwrite", K4, 1, connections=4, target=EQUAL),
    fuse_row("fuse-write-4k-qd32", "4 KiB random write, io_uring, QD 32", "randwrite", K4, 32, target=TWICE),
    fuse_row("fuse-read-256k", "256 KiB sequential read, psync", "read", K256, 1, target=TWICE),
    fuse_row("fuse-read-256k-qd8", "256 KiB sequential read, io_uring, QD 8", "read", K256, 8, target=TWICE),
    fuse_row("fuse-write-256k", "256 KiB sequential write, psync", "write", K256, 1, target=TWICE),
    Row(
        "fuse-passthrough-read-4k",
        "FUSE passthrough, 4 KiB random read, psync, page cache",
        "randread",
        K4,
        1,
        engine="psync",
        buffered=True,
        servers=PASSTHROUGH,
        target=NEAR,
        note="The bare file is the yardstick.",
    ),
    Row(
        "fuse-passthrough-read-256k",
        "FUSE passthrough, 256 KiB sequential read, psync, page cache",
        "read",
        K256,
        1,
        engine="psync",
        buffered=True,
        servers=PASSTHROUGH,
        target=NEAR,
    ),
)
