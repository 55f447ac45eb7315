"""Images to damage, ways to damage them, and what is on their disks."""

from __future__ import annotations

import os
from pathlib import Path

import qcow2_images as images

import peers
from blkferry.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET

MIB = 1 << 20
CLUSTER = 65536
BLOCK = ">H"  # an entry of a refcount block

SOUND = {
    "empty": ("", []),
    "v2": ("compat=0.10", ["write -P 1 0 1M", "write -P 2 3M 100k"]),
    "plain": ("", ["write -P 1 0 1M", "write -P 2 7M 100k", "write -z 5M 200k", "discard 0 128k"]),
    "small clusters": ("cluster_size=512", ["write -P 1 0 1M", "write -P 2 7M 100k"]),
    "large clusters": ("cluster_size=2M", ["write -P 1 0 1M", "write -P 2 7M 100k"]),
    "compressed": ("", ["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 1M 64k"]),
    "compressed, 4K": ("cluster_size=4k", [f"write -c -P {n} {n * 4}k 4k" for n in range(40)]),
    "zstd": ("compression_type=zstd", ["write -c -P 1 0 64k", "write -c -P 2 64k 64k"]),
    "extended": ("extended_l2=on", ["write -P 1 0 3k", "write -P 2 1M 200k", "write -z 1M 4k", "write -c -P 4 5M 64k"]),
    "1 bit": ("refcount_bits=1", ["write -P 1 0 1M", "write -P 2 7M 100k"]),
    "2 bits": ("refcount_bits=2", ["write -P 1 0 1M", "snapshot a", "write -P 2 0 100k"]),
    "64 bits": ("refcount_bits=64,cluster_size=512", ["write -P 1 0 1M", "snapshot a", "write -P 2 0 100k"]),
    "snapshots": ("", ["write -P 1 0 1M", "snapshot a", "write -P 2 0 100k", "snapshot b", "write -P 3 64k 1M"]),
    "bitmaps": ("", ["write -P 1 0 1M", "bitmap a", "bitmap b", "write -P 2 0 100k"]),
    "data file": ("data_file=data", ["write -P 1 0 1M", "write -P 2 7M 100k"]),
    "preallocated": ("preallocation=metadata", ["write -P 1 0 1M"]),
    "fragmented": ("", [f"write -P {n} {(n * 7 % 64) * 64}k 64k" for n in range(60)]),
}


def make(path: Path, options: str = "", commands: tuple[str, ...] | list[str] = (), size: str = "8M") -> Path:
    create = ["-o", options] if options else []
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *create, path, size)
    waiting: list[str] = []
    for command in [*commands, ""]:
        if command.startswith(("write", "discard")):
            waiting.append(command)
            continue
        if waiting:
            images.qemu_io(path, *waiting, options="driver=qcow2,discard=unmap")
            waiting = []
        what, _, name = command.partition(" ")
        if what == "snapshot":
            peers.run("qemu-img", "snapshot", "-c", name, path)
        elif what == "bitmap":
            peers.run("qemu-img", "bitmap", "--add", path, name)
    return path


class Patient:
    """An image with data, snapshots and compressed clusters, and where its structures are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read()

    def read(self) -> None:
        header = images.read_header(self.path)
        self.l1 = header.l1_table_offset
        self.table = header.refcount_table_offset
        self.block = images.get(self.path, self.table)
        self.l2 = images.get(self.path, self.l1) & OFFSET
        self.end = os.path.getsize(self.path)

    def entry(self, index: int) -> int:
        return images.get(self.path, self.l2 + index * 8)

    def set_entry(self, index: int, value: int) -> None:
        images.put(self.path, self.l2 + index * 8, value)

    def refcount_at(self, offset: int) -> int:
        return self.block + offset // CLUSTER * 2

    def set_refcount(self, offset: int, count: int) -> None:
        images.put(self.path, self.refcount_at(offset), count, BLOCK)

    def feature(self, bit: int) -> None:
        images.put(self.path, 72, images.get(self.path, 72) | bit)


COMMANDS = [
    "write -P 1 0 1M",  # clusters 0 to 15
    "write -P 2 4M 128k",  # 64 and 65
    "write -c -P 3 6M 64k",  # 96
    "write -c -P 4 6208k 64k",  # 97
    "snapshot one",
    "write -P 5 512k 128k",  # 8 and 9 are the active disk's own now
    "write -P 6 7M 64k",  # 112
]


def zero(path, offset, length):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))


# What is done to the image; the guest clusters whose content is not what it was when all is repaired.
DAMAGE = {
    "refcount too low": (lambda it: it.set_refcount(it.entry(112) & OFFSET, 0), ()),
    "refcount of a shared cluster too low": (lambda it: it.set_refcount(it.entry(0) & OFFSET, 1), ()),
    "refcount too high": (lambda it: it.set_refcount(it.entry(112) & OFFSET, 2), ()),
    "refcount much too high": (lambda it: it.set_refcount(it.entry(0) & OFFSET, 65535), ()),
    "leaked cluster": (lambda it: it.set_entry(112, 0), (112,)),
    "header's refcount": (lambda it: it.set_refcount(0, 0), ()),
    "refcount table's refcount": (lambda it: it.set_refcount(it.table, 3), ()),
    "refcount block's refcount": (lambda it: it.set_refcount(it.block, 0), ()),
    "L1 table's refcount": (lambda it: it.set_refcount(it.l1, 2), ()),
    "L2 table's refcount": (lambda it: it.set_refcount(it.l2, 2), ()),
    "copied is missing": (lambda it: it.set_entry(112, it.entry(112) & ~COPIED), ()),
    "copied is set": (lambda it: it.set_entry(0, it.entry(0) | COPIED), ()),
    "copied is missing in L1": (lambda it: images.put(it.path, it.l1, it.l2), ()),
    "reserved bits of L2": (lambda it: it.set_entry(112, it.entry(112) | 1 << 57), ()),
    "reserved bits of L1": (lambda it: images.put(it.path, it.l1, it.l2 | COPIED | 4), ()),
    "data behind the end": (lambda it: it.set_entry(112, 1 << 40 | COPIED), (112,)),
    "data at the end": (lambda it: it.set_entry(112, (it.end + CLUSTER - 1) // CLUSTER * CLUSTER | COPIED), (112,)),
    "compressed behind the end": (lambda it: it.set_entry(96, COMPRESSED | 1 << 40), (96,)),
    "copied compressed cluster": (lambda it: it.set_entry(96, it.entry(96) | COPIED), ()),
    "preallocated, misaligned": (lambda it: it.set_entry(112, it.entry(112) + 512 | 1), (112,)),
    "data, misaligned": (lambda it: it.set_entry(112, it.entry(112) + 512), (112,)),
    "two guest clusters share one": (lambda it: it.set_entry(113, it.entry(112)), (113,)),
    "data in an L2 table": (lambda it: it.set_entry(112, it.l2 | COPIED), (112,)),
    "data in the header": (lambda it: it.set_entry(111, it.l1 | COPIED), (111,)),
    "data in the refcount table": (lambda it: it.set_entry(112, it.table | COPIED), (112,)),
    "data in a refcount block": (lambda it: it.set_entry(112, it.block | COPIED), (112,)),
    "L2 behind the end": (lambda it: images.put(it.path, it.l1, 1 << 40), None),
    "refcount table is empty": (lambda it: zero(it.path, it.table, 8), ()),
    "refcount block is empty": (lambda it: zero(it.path, it.block, CLUSTER), ()),
    "refcount table has reserved bits": (lambda it: images.put(it.path, it.table, it.block | 8), ()),
    "refcount block in the header": (lambda it: images.put(it.path, it.table + 8, it.block), ()),
    "refcount block behind the end": (lambda it: images.put(it.path, it.table + 8, 1 << 40), ()),
    "dirty": (lambda it: it.feature(1), ()),
    "corrupt": (lambda it: it.feature(2), ()),
    "dirty, refcounts missing": (lambda it: (it.feature(1), zero(it.path, it.block, 60)), ()),
}


def disk(path: Path, name: str | None = None) -> list[bytes]:
    """The disk's clusters, in a snapshot of it or now."""
    raw = path.with_suffix(".raw")
    snapshot = ["-l", f"snapshot.name={name}"] if name else []
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *snapshot, path, raw)
    data = raw.read_bytes()
    return [data[at : at + CLUSTER] for at in range(0, len(data), CLUSTER)]
