"""Histories of requests that are played to our driver and to QEMU, and what the two images must have in common.

A history is plain data: tuples that begin with what is done. Byte ranges need no alignment; patterns fill a range. All
requests of one `together` are in flight at once in our driver, so they must not touch the same cluster; QEMU gets them
one after the other.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import peers
from blkferry.drivers.qcow2 import compression, snapshots
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client

Step = tuple[Any, ...]
KIB = 1 << 10
MIB = 1 << 20
PASSWORD = "a password"


@dataclass(frozen=True)
class Case:
    """One kind of image. `node` are options of the node that QEMU has too, under the same names."""

    create: str = ""
    size: int = MIB
    cluster: int = 64 * KIB
    backing: str = ""  # the format of the backing file
    backing_size: int = MIB
    data_file: bool = False
    encrypt: str = ""
    node: dict[str, Any] = field(default_factory=dict)
    direct: bool = False

    @property
    def old(self) -> bool:
        return "compat=0.10" in self.create

    @property
    def snapshots(self) -> bool:
        # QEMU 10.0.2 with discard-no-unref punches holes into what snapshots still have.
        return (
            not self.data_file and "refcount_bits=1," not in self.create + "," and not self.node.get("discard-no-unref")
        )

    @property
    def compresses(self) -> bool:
        return not self.data_file and not self.encrypt and "refcount_bits=2" not in self.create


CASES = {
    "plain": Case(),
    "512": Case("cluster_size=512", 300 * KIB, 512),
    "4k": Case("cluster_size=4k", MIB + 512, 4 * KIB),
    "2M": Case("cluster_size=2M", 9 * MIB + 1536, 2 * MIB),
    "v2": Case("compat=0.10,cluster_size=4k", MIB, 4 * KIB),
    "v2, backing": Case("compat=0.10,cluster_size=4k", MIB, 4 * KIB, backing="qcow2", backing_size=MIB),
    "v2, short backing": Case("compat=0.10,cluster_size=8k", MIB, 8 * KIB, backing="raw", backing_size=MIB // 2 + 512),
    "1 bit": Case("refcount_bits=1,cluster_size=1k", 300 * KIB, KIB),
    "2 bits": Case("refcount_bits=2,cluster_size=1k", 300 * KIB, KIB),
    "8 bits": Case("refcount_bits=8,cluster_size=2k", 300 * KIB, 2 * KIB),
    "64 bits": Case("refcount_bits=64,cluster_size=512", 300 * KIB, 512),
    "lazy": Case("lazy_refcounts=on,cluster_size=4k", MIB, 4 * KIB),
    "extended": Case("extended_l2=on", 4 * MIB),
    "extended, 16k": Case("extended_l2=on,cluster_size=16k", MIB, 16 * KIB),
    "extended, backing": Case("extended_l2=on,cluster_size=16k", MIB, 16 * KIB, backing="qcow2", backing_size=MIB),
    "extended, short backing": Case(
        "extended_l2=on,cluster_size=32k", MIB, 32 * KIB, backing="raw", backing_size=MIB // 2 + 512
    ),
    "extended, long backing": Case("extended_l2=on", MIB, backing="qcow2", backing_size=2 * MIB),
    "zstd": Case("compression_type=zstd"),
    "zstd, extended": Case("compression_type=zstd,extended_l2=on,cluster_size=16k", MIB, 16 * KIB),
    "backing": Case("", MIB, backing="raw", backing_size=MIB),
    "short backing": Case("cluster_size=4k", MIB, 4 * KIB, backing="qcow2", backing_size=MIB // 2 + 512),
    "long backing": Case("cluster_size=4k", MIB, 4 * KIB, backing="raw", backing_size=2 * MIB),
    "data file": Case("", MIB, data_file=True),
    "data file, 4k": Case("cluster_size=4k", MIB, 4 * KIB, data_file=True),
    "data file, raw": Case("data_file_raw=on,cluster_size=4k", MIB, 4 * KIB, data_file=True),
    "data file, extended": Case("extended_l2=on,cluster_size=16k", MIB, 16 * KIB, data_file=True),
    "data file, backing": Case("cluster_size=4k", MIB, 4 * KIB, data_file=True, backing="raw", backing_size=MIB),
    "luks, backing": Case("cluster_size=4k", MIB, 4 * KIB, encrypt="luks", backing="raw", backing_size=MIB),
    "aes": Case("cluster_size=4k", MIB, 4 * KIB, encrypt="aes"),
    "small caches": Case(
        "cluster_size=512,refcount_bits=64",
        300 * KIB,
        512,
        node={"l2-cache-size": 512, "refcount-cache-size": 2048, "l2-cache-entry-size": 512},
    ),
    "small slices": Case("cluster_size=4k", MIB, 4 * KIB, node={"l2-cache-entry-size": 512, "l2-cache-size": 2048}),
    "direct": Case("cluster_size=4k", MIB, 4 * KIB, direct=True),
    "direct, extended, backing": Case(
        "extended_l2=on,cluster_size=16k", MIB, 16 * KIB, backing="raw", backing_size=MIB, direct=True
    ),
    "no unref": Case("cluster_size=4k", MIB, 4 * KIB, node={"discard-no-unref": True}),
}


# Making histories ------------------------------------------------------------------------------------------------


class Author:
    """Writes histories that make sense for a kind of image."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        self.case = case
        self.rng = rng
        self.size = case.size
        self.fresh: set[int] = set(range(case.size // case.cluster))  # QEMU compresses only into these
        self.taken: dict[str, int] = {}
        self.pattern = 0
        self.names = 0
        self.packed: set[int] = set()
        self.unpacked = False

    def history(self, steps: int) -> list[Step]:
        return [step for _ in range(steps) for step in self._step()]

    def _range(self, start: int = 0, end: int | None = None) -> tuple[int, int]:
        rng, cluster = self.rng, self.case.cluster
        end = self.size if end is None else end
        at = rng.randrange(start, end)
        length = rng.choice([1, 7, 512, 1000, 4096, cluster // 32, cluster - 1, cluster, 2 * cluster + 3, 5 * cluster])
        unit = rng.choice([1, 1, 512, max(cluster // 32, 1), cluster])
        at = max(at // unit * unit, start)
        length = -(-min(length, 3 * MIB) // unit) * unit
        return at, max(min(length, end - at), 1)

    def _touch(self, at: int, length: int) -> None:
        cluster = self.case.cluster
        touched = set(range(at // cluster, -(-(at + length) // cluster)))
        self.fresh -= touched
        self.unpacked = self.unpacked or bool(self.packed & touched)

    def _simple(self, start: int = 0, end: int | None = None) -> Step:
        rng = self.rng
        at, length = self._range(start, end)
        kind = rng.choices(["write", "zero", "discard"], [6, 3, 3])[0]
        if kind == "zero" and self.case.encrypt:  # QEMU makes whole sectors of these, and writes them
            at, length = at // 512 * 512, -(-length // 512) * 512
        if kind == "zero" and "extended" in self.case.create:
            cluster = self.case.cluster
            if self.packed & set(range(at // cluster, -(-(at + length) // cluster))):
                kind = "write"  # QEMU gives up and writes all of a request that begins in a compressed cluster
        self._touch(at, length)
        if kind == "write":
            self.pattern = self.pattern % 255 + 1
            return ("write", at, length, self.pattern, rng.choice(["root", "now", "now", "nbd"]))
        if kind == "zero":
            return ("zero", at, length, rng.random() < 0.5)
        return ("discard", at, length)

    def _step(self) -> Iterator[Step]:
        rng, case = self.rng, self.case
        shares = {
            "simple": 20,
            "flush": 2,
            "reopen": 1,
            "compress": 4 * case.compresses,
            "together": 3,
            "snapshot": 4 * case.snapshots,
            "resize": 2 * (not case.old or not (self.taken or case.backing)),
        }
        match rng.choice([kind for kind, share in shares.items() for _ in range(share)]):
            case "simple":
                yield self._simple()
            case "flush":
                yield ("flush",)
            case "reopen":
                yield ("reopen",)
            case "compress" if self.fresh:
                if self.unpacked:  # QEMU 10.0.2 would pack more bytes into a cluster that it has given to somebody else
                    self.unpacked = False
                    yield ("reopen",)
                first = rng.choice(sorted(self.fresh))
                for cluster in range(first, first + rng.choice([1, 1, 4])):
                    if cluster in self.fresh:
                        self.fresh.remove(cluster)
                        self.packed.add(cluster)
                        self.pattern = self.pattern % 255 + 1
                        yield ("compress", cluster * case.cluster, self.pattern)
            case "together":
                cluster = case.cluster
                count = self.size // cluster
                if count > 3:
                    cuts = sorted(rng.sample(range(1, count), min(4, count - 1)))
                    bounds = [0, *cuts, count]
                    parts = pairwise(bounds)
                    yield ("together", [self._simple(low * cluster, high * cluster) for low, high in parts])
            case "snapshot":
                yield from self._snapshot()
            case "resize":
                unit = rng.choice([512, case.cluster])
                change = rng.choice([-1, 1]) * rng.choice([unit, 3 * unit, self.size // 3 // unit * unit])
                size = max(self.size + change, 64 * KIB) // 512 * 512
                self._touch(min(size, self.size), abs(size - self.size))
                old, self.size = self.size, size
                yield ("resize", size)
                edge = min(-(-old // case.cluster) * case.cluster, size)
                if edge > old:  # QEMU shows what was there before the disk was cut off
                    yield ("write", old, edge - old, 255, "root")
            case _:
                yield ("flush",)

    def _snapshot(self) -> Iterator[Step]:
        rng = self.rng
        kind = rng.choice(["take", "take", "apply", "delete"])
        if kind == "take" and len(self.taken) < (1 if "refcount_bits=2" in self.case.create else 4):
            self.names += 1
            self.taken[f"s{self.names}"] = self.size
            yield ("take", f"s{self.names}")
        elif self.taken:
            name = rng.choice(list(self.taken))
            self.fresh.clear()
            if kind == "delete":
                del self.taken[name]
                yield ("delete", name)
            elif not self.case.old or self.size == self.taken[name]:
                self.size = self.taken[name]
                yield ("apply", name)


# Images ----------------------------------------------------------------------------------------------------------


def make(case: Case, directory: Path, rng: random.Random) -> Path:
    """An image, and what it names, in a directory of its own."""
    directory.mkdir()
    options = case.create.split(",") if case.create else []
    if case.data_file:
        options.append(f"data_file={directory / 'data'}")
    if case.backing:
        raw = directory / "base.raw"
        pieces = range(-(-case.backing_size // 4096))
        raw.write_bytes(b"".join(rng.choice([bytes(4096), rng.randbytes(4096)]) for _ in pieces))
        with raw.open("r+b") as file:
            file.truncate(case.backing_size)
        if case.backing == "qcow2":
            peers.run("qemu-img", "convert", "-O", "qcow2", raw, directory / "base.qcow2")
        options += [f"backing_file=base.{case.backing}", f"backing_fmt={case.backing}"]
    secret: list[str] = []
    if case.encrypt:
        secret = ["--object", f"secret,id=s,data={PASSWORD}"]
        options += [f"encrypt.format={case.encrypt}", "encrypt.key-secret=s"]
        if case.encrypt == "luks":
            options.append("encrypt.iter-time=10")
    path = directory / "image.qcow2"
    wanted = ["-o", ",".join(options)] if options else []
    peers.run("qemu-img", "create", "-q", *secret, "-f", "qcow2", *wanted, path, str(case.size))
    return path


class Theirs:
    """QEMU's programs on an image."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case = case
        self.path = path
        self._waiting: list[str] = []

    def image(self, **options: Any) -> list[str]:
        """How to name the image on a command line."""
        named = {"driver": "qcow2", "file.filename": str(self.path), **options}
        if self.case.data_file:  # the image names that of the other side
            named |= {"data-file.driver": "file", "data-file.filename": str(self.path.with_name("data"))}
        arguments = ["--image-opts", ",".join(f"{key}={_said(value)}" for key, value in named.items())]
        if self.case.encrypt:
            arguments[1] += f",encrypt.format={self.case.encrypt},encrypt.key-secret=s"
            return ["--object", f"secret,id=s,data={PASSWORD}", *arguments]
        return arguments

    def play(self, history: Iterable[Step]) -> None:
        for step in history:
            self._play(step)
        self._run()

    def _play(self, step: Step) -> None:
        match step:
            case ("write", at, length, pattern, _):
                self._waiting.append(f"write -q -P {pattern} {at} {length}")
            case ("zero", at, length, unmap):
                self._waiting.append(f"write -q -z {'-u ' if unmap else ''}{at} {length}")
            case ("discard", at, length):
                self._waiting.append(f"discard -q {at} {length}")
            case ("flush",):
                self._waiting.append("flush")
            case ("compress", at, pattern):
                self._waiting.append(f"write -q -c -P {pattern} {at} {self.case.cluster}")
            case ("resize", size):
                self._waiting.append(f"truncate {size}")
            case ("together", steps):
                for each in steps:
                    self._play(each)
            case ("reopen",):
                self._run()
            case ("take" | "apply" | "delete" as verb, name):
                self._run()
                letter = {"take": "-c", "apply": "-a", "delete": "-d"}[verb]
                peers.run("qemu-img", "snapshot", *self.image(), letter, name)

    def _run(self) -> None:
        commands, self._waiting = self._waiting, []
        if commands:
            argv = [part for command in commands for part in ("-c", command)]
            done = peers.run("qemu-io", *argv, *self.image(discard="unmap", **self.case.node))
            assert not done.stdout.strip(), done.stdout

    def map(self) -> list[dict[str, Any]]:
        """What qemu-img map says, apart from where things are in the file."""
        stretches = json.loads(peers.run("qemu-img", "map", "--output=json", *self.image()).stdout)
        found: list[dict[str, Any]] = []
        for stretch in stretches:
            stretch.pop("offset", None)
            stretch["zero"] &= not stretch["data"]  # what is a hole in the file is no matter of the image
            start, length = stretch.pop("start"), stretch.pop("length")
            if found and {**found[-1], "start": 0, "length": 0} == {**stretch, "start": 0, "length": 0}:
                found[-1]["length"] += length
            else:
                found.append({"start": start, "length": length, **stretch})
        return found

    def check(self) -> None:
        done = peers.run("qemu-img", "check", *self.image(), expect=None)
        assert done.returncode == 0, done.stdout + done.stderr


def _said(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# Our side --------------------------------------------------------------------------------------------------------


class Ours:
    """An image that our driver has open. A model of the disk goes along, for the steps that only one side can take."""

    def __init__(self, daemon: DaemonThread, case: Case, path: Path) -> None:
        self.daemon = daemon
        self.case = case
        self.path = path
        self.client: Client | None = None
        self.model = bytearray()
        self.models: dict[str, bytes] = {}
        self.open()
        self.model = bytearray(self.content())

    def options(self, **more: Any) -> dict[str, Any]:
        case = self.case
        file = {"driver": "file", "filename": str(self.path)}
        wanted = {"driver": "qcow2", "node-name": "n", "discard": "unmap", "file": file, **case.node, **more}
        if case.data_file:
            wanted["data-file"] = {"driver": "file", "filename": str(self.path.with_name("data"))}
        if case.encrypt:
            wanted["encrypt"] = {"format": case.encrypt, "key-secret": "s"}
        if case.direct:
            wanted["cache"] = {"direct": True}
        return wanted

    def open(self, **more: Any) -> None:
        if self.case.encrypt and "s" not in self.daemon.daemon.objects:
            self.daemon.execute("object-add", qom_type="secret", id="s", data=PASSWORD)
        self.daemon.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in self.options(**more).items()})
        read_only = more.get("read-only", False)
        self.root = Root(self.daemon.daemon.graph.find("n"), "the test")
        used = Permission.CONSISTENT_READ
        if not read_only:
            used |= Permission.WRITE
        self.daemon.call(lambda: self.root.attach(used, ALL))

    def close(self) -> None:
        self._hang_up()
        self.daemon.call(self.root.detach)
        self.daemon.execute("blockdev-del", node_name="n")

    def _hang_up(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
            self.daemon.execute("block-export-del", id="e", mode="hard")
            self.daemon.call(self._gone)

    async def _gone(self) -> None:
        while any(  # noqa: ASYNC110 - nobody tells
            parent.user is not self.root for parent in self.root.node.parents
        ):
            await asyncio.sleep(0.001)

    def content(self) -> bytes:
        async def read() -> bytes:
            data = bytearray(self.root.node.length)
            await self.root.read(0, memoryview(data))
            return bytes(data)

        return self.daemon.call(read)

    def play(self, history: Iterable[Step]) -> None:
        for step in history:
            self._play(step)

    def _play(self, step: Step) -> None:
        node: Any = self.root.node
        match step:
            case ("write", at, length, pattern, "nbd"):
                if self.client is None:
                    self.daemon.export("n")
                    self.client = self.daemon.client()
                self.client.write(at, bytes([pattern]) * length)
                self.model[at : at + length] = bytes([pattern]) * length
            case ("write" | "zero" | "discard" | "flush", *_):
                self.daemon.call(lambda: self._request(step))
                self._learn(step)
            case ("together", steps):

                async def together() -> None:
                    await asyncio.gather(*(self._request(each) for each in steps))

                self.daemon.call(together)
                for each in steps:
                    self._learn(each)
            case ("compress", at, pattern):
                data = bytes([pattern]) * self.case.cluster
                packed = compression.compress(node.header.compression_type, data)
                assert packed is not None
                self.daemon.call(lambda: node.writing.write_compressed(at, packed))
                self.model[at : at + len(data)] = data
            case ("resize", size):
                self._hang_up()
                self.daemon.call(lambda: node.resize(size))
                del self.model[size:]
                self.model.extend(bytes(size - len(self.model)))
            case ("reopen",):
                self.close()
                self.open()
            case ("take", name):
                self.daemon.call(lambda: snapshots.create(node, name))
                self.models[name] = bytes(self.model)
            case ("delete", name):
                self.daemon.call(lambda: snapshots.delete(node, None, name))
                del self.models[name]
            case ("apply", name):
                self._hang_up()
                self.daemon.call(lambda: snapshots.apply(node, name))
                self.model = bytearray(self.models[name])

    async def _request(self, step: Step) -> None:
        root = self.root
        match step:
            case ("write", at, length, pattern, how):
                view = memoryview(bytes([pattern]) * length)
                if how != "now" or not root.write_now(at, view):
                    await root.write(at, view)
            case ("zero", at, length, unmap):
                await root.write_zeroes(at, length, unmap=unmap)
            case ("discard", at, length):
                await root.discard(at, length)
            case ("flush",):
                await root.flush()

    def _learn(self, step: Step) -> None:
        match step:
            case ("write", at, length, pattern, _):
                self.model[at : at + length] = bytes([pattern]) * length
            case ("zero", at, length, _):
                self.model[at : at + length] = bytes(length)
            case ("discard", at, length):
                # Whole clusters read as zeroes then, unless there is a backing file that version 2 cannot hide.
                if self.case.old and self.case.backing:
                    return
                cluster, end = self.case.cluster, at + length
                first = -(-at // cluster) * cluster
                last = end if end == len(self.model) else end // cluster * cluster
                if first < last:
                    self.model[first:last] = bytes(last - first)


# Comparing -------------------------------------------------------------------------------------------------------


def compare(daemon: DaemonThread, case: Case, directory: Path, history: list[Step], seed: Any = 0) -> None:
    """Play a history to both, and fail where the images differ."""
    mine = make(case, directory / "ours", random.Random(f"base {seed}"))
    shutil.copytree(directory / "ours", directory / "theirs")
    other = directory / "theirs" / mine.name
    theirs = Theirs(case, other)
    theirs.play(history)

    ours = Ours(daemon, case, mine)
    try:
        ours.play(history)
        _same("ours, played", ours.content(), ours.model)
    finally:
        ours.close()
    result = Theirs(case, mine)
    result.check()
    theirs.check()
    _same_map(result.map(), theirs.map())

    peers.run("qemu-img", "convert", "-O", "raw", *theirs.image(), directory / "theirs.raw")
    _same("theirs, read by QEMU", (directory / "theirs.raw").read_bytes(), ours.model)
    reader = Ours(daemon, replace(case, node={}), other)
    try:
        _same("theirs, read by us", reader.model, ours.model)
    finally:
        reader.close()
    peers.run("qemu-img", "convert", "-O", "raw", *result.image(), directory / "ours.raw")
    _same("ours, read by QEMU", (directory / "ours.raw").read_bytes(), ours.model)
    for name, model in ours.models.items():
        peers.run("qemu-img", "convert", "-O", "raw", "-l", name, *result.image(), directory / "snapshot.raw")
        content = (directory / "snapshot.raw").read_bytes()
        _same(f"snapshot {name}, read by QEMU", content[: len(model)], model[: len(content)])  # it has the disk's size


def _same(what: str, found: bytes | bytearray, wanted: bytes | bytearray) -> None:
    assert len(found) == len(wanted), f"{what}: {len(found)} bytes, not {len(wanted)}"
    if found != wanted:
        at = next(n for n in range(len(found)) if found[n] != wanted[n])
        shown = f"{found[at : at + 8].hex()}, not {wanted[at : at + 8].hex()}"
        raise AssertionError(f"{what}: at {at:#x} there is {shown}")


def _same_map(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    strange = [stretch for stretch in found if stretch not in wanted]
    missing = [stretch for stretch in wanted if stretch not in found]
    assert not strange, f"the map has {strange}, not {missing}"
    assert found == wanted
