"""The laws that every block driver keeps, whatever it is made of. A registered driver without a case here fails."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2.creation import CreateSpec, create
from blkferry.errors import Error
from blkferry.graph import registry
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.testing import record

MIB = 1 << 20
SIZE = 2 * MIB
FORGETFUL = {"null-co"}  # reads zeroes whatever was written
FIXED = {"null-co", "host_device", "memory", "nbd"}  # may refuse to change their size


def file_of(tmp_path, size=SIZE) -> str:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, size)
    return str(path)


class Outside:
    """What drivers need that is not a file: it is made when it is asked for, and ends with the test."""

    def __init__(self, directory) -> None:
        self._directory = directory
        self._devices: list[str] = []
        self._servers: list[subprocess.Popen[str]] = []

    def device(self) -> str:
        """The path of a block device; the test is skipped where none can be made."""
        if os.geteuid() != 0:
            pytest.skip("only root can set up loop devices")
        command = ["losetup", "--find", "--show", file_of(self._directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no loop device to be had: {done.stderr}")
        self._devices.append(done.stdout.strip())
        return self._devices[-1]

    def server(self) -> dict[str, Any]:
        """How to connect to an NBD server that exports an empty disk."""
        path = self._directory / "server.sock"
        command = [Path(sys.executable).with_name("blkferry"), "serve", "-q", "--socket", path, f"memory:{SIZE}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._servers.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("nbd+unix:")
        return {"server": {"type": "unix", "path": str(path)}, "export": "memory"}

    def end(self) -> None:
        for device in self._devices:
            subprocess.run(["losetup", "--detach", device], check=True)
        for process in self._servers:
            process.terminate()
            process.communicate()


@pytest.fixture
def outside(tmp_path):
    made = Outside(tmp_path)
    yield made
    made.end()


def qcow2_of(tmp_path, *, backing: int = 0, data_file: bool = False, **spec) -> dict[str, Any]:
    """Options for a new qcow2 image; `backing` is the length of a backing file."""
    path = tmp_path / "disk.qcow2"
    wanted = CreateSpec(size=SIZE, data_file_name="data" if data_file else None, **spec)

    async def make() -> bytes:
        async with Daemon() as daemon:
            image, data = (record.insert(daemon.graph, name, record.Bytes) for name in ("image", "data"))
            image.fill(b"")
            data.fill(b"")
            await create(image, data if data_file else None, wanted)
            return image.content()

    with ThreadPoolExecutor(1) as pool:
        path.write_bytes(pool.submit(asyncio.run, make()).result())
    options: dict[str, Any] = {"file": {"driver": "file", "filename": str(path)}}
    if data_file:
        options["data-file"] = {"driver": "file", "filename": file_of(tmp_path, 0)}
    if backing:
        below = file_of(tmp_path, 0)
        with open(below, "wb") as file:
            file.write(bytes(backing))  # what a new disk has to read as
        options["backing"] = {"driver": "file", "filename": below, "read-only": True}
    return options


CASES = {
    "file": lambda path, _: {"filename": file_of(path)},
    "file, direct": lambda path, _: {"filename": file_of(path), "cache": {"direct": True}},
    "file, odd": lambda path, _: {"filename": file_of(path, SIZE - 300)},
    "file, direct, odd": lambda path, _: {"filename": file_of(path, SIZE - 300), "cache": {"direct": True}},
    "file, threads": lambda path, _: {"filename": file_of(path), "aio": "threads"},
    "host_device": lambda _, outside: {"filename": outside.device()},
    "host_device, direct": lambda _, outside: {"filename": outside.device(), "cache": {"direct": True}},
    "memory": lambda *_: {"size": SIZE},
    "memory, odd": lambda *_: {"size": SIZE - 511},
    "null-co": lambda *_: {"size": SIZE},
    "null-co, slow": lambda *_: {"size": SIZE, "latency-ns": 100_000},
    "nbd": lambda _, outside: outside.server(),
    "raw": lambda path, _: {"file": {"driver": "file", "filename": file_of(path)}},
    "raw, window": lambda path, _: {
        "file": {"driver": "file", "filename": file_of(path, 2 * SIZE)},
        "offset": 1536,
        "size": SIZE,
    },
    "raw, direct window": lambda path, _: {
        "file": {"driver": "file", "filename": file_of(path, 2 * SIZE)},
        "offset": 1536,
        "size": SIZE,
        "cache": {"direct": True},
    },
    "raw on memory": lambda *_: {"file": {"driver": "memory", "size": SIZE}},
    "qcow2": lambda path, _: qcow2_of(path),
    "qcow2, direct": lambda path, _: qcow2_of(path, cluster_size=4096) | {"cache": {"direct": True}},
    "qcow2, 512": lambda path, _: qcow2_of(path, cluster_size=512, refcount_bits=64),
    "qcow2, 2M": lambda path, _: qcow2_of(path, cluster_size=2 * MIB),
    "qcow2, v2": lambda path, _: qcow2_of(path, cluster_size=4096, version=2),
    "qcow2, lazy, small caches": lambda path, _: (
        qcow2_of(path, cluster_size=1024, lazy_refcounts=True) | {"l2-cache-size": 0, "refcount-cache-size": 0}
    ),
    "qcow2, subclusters": lambda path, _: qcow2_of(path, cluster_size=16384, extended_l2=True),
    "qcow2, backing": lambda path, _: qcow2_of(path, backing=MIB + 512),
    "qcow2, data file": lambda path, _: qcow2_of(path, data_file=True, cluster_size=4096),
    "qcow2, short raw data file": lambda path, _: qcow2_of(path, data_file=True, data_file_raw=True),
}


def test_every_driver_has_a_case():
    assert set(registry.plugins("drivers")) == {case.partition(",")[0].partition(" ")[0] for case in CASES}


class Subject:
    def __init__(self, daemon: Daemon, driver: str, root: Root) -> None:
        self.daemon = daemon
        self.driver = driver
        self.root = root
        self.size = root.node.length

    async def read(self, start: int, length: int) -> bytes:
        data = bytearray(b"\xa5" * length)
        await self.root.read(start, memoryview(data))
        return bytes(data)

    async def write(self, start: int, data: bytes, **options: bool) -> None:
        await self.root.write(start, memoryview(data), **options)


@pytest.fixture(params=CASES)
async def subject(request, tmp_path, outside) -> AsyncIterator[Subject]:
    driver = request.param.partition(",")[0].partition(" ")[0]
    options = CASES[request.param](tmp_path, outside)
    async with Daemon() as daemon:
        await daemon.execute("query-version")
        files = os.listdir("/proc/self/fd")
        await daemon.execute("blockdev-add", {"driver": driver, "node-name": "n", "discard": "unmap"} | options)
        root = Root(daemon.graph.find("n"), "the test")
        await root.attach(Permission.WRITE | Permission.CONSISTENT_READ, ALL)
        yield Subject(daemon, driver, root)
        await root.detach()
        await daemon.execute("blockdev-del", {"node-name": "n"})
        assert daemon.graph.nodes == {}
        assert daemon.services.buffers.used == 0
        assert len(os.listdir("/proc/self/fd")) == len(files)


RANGES = [(0, 1), (0, 512), (511, 2), (4095, 4098), (1000, 100_000), (65536, 65536), (MIB - 1, MIB // 2)]


async def test_the_length_is_whole_sectors(subject):
    assert subject.size % 512 == 0
    assert SIZE - 512 <= subject.size <= SIZE


async def test_a_new_disk_reads_zero(subject):
    assert await subject.read(0, subject.size) == bytes(subject.size)


async def test_what_was_written_is_read(subject):
    rng = random.Random(1)
    model = bytearray(subject.size)
    for start, length in [*RANGES, (subject.size - 1000, 1000), (subject.size - 1, 1)]:
        data = bytes(length) if subject.driver in FORGETFUL else rng.randbytes(length)
        await subject.write(start, data, fua=bool(length % 2))
        model[start : start + length] = data
        assert await subject.read(start, length) == data
    assert await subject.read(0, subject.size) == model
    await subject.root.flush()
    assert await subject.read(0, subject.size) == model


@pytest.mark.parametrize("unmap", [False, True])
async def test_zeroes_read_zero_and_touch_nothing_else(subject, unmap):
    fill = b"\0" if subject.driver in FORGETFUL else b"\x77"
    for start, length in [*RANGES, (subject.size - 700, 700), (0, subject.size)]:
        await subject.write(0, fill * subject.size)
        await subject.root.write_zeroes(start, length, unmap=unmap)
        content = await subject.read(0, subject.size)
        assert content[start : start + length] == bytes(length)
        assert content[:start] + content[start + length :] == fill * (subject.size - length)


async def test_fast_zeroes_are_done_or_refused(subject):
    fill = b"\0" if subject.driver in FORGETFUL else b"\x77"
    await subject.write(0, fill * subject.size)
    refused = 0
    try:
        await subject.root.write_zeroes(65536, 65536, unmap=True, fast=True)
    except OSError as error:
        refused = error.errno
    if refused:
        assert refused == errno.ENOTSUP
        assert await subject.read(0, subject.size) == fill * subject.size
    else:
        assert await subject.read(65536, 65536) == bytes(65536)


async def test_discarded_bytes_are_old_or_zero_and_stay_so(subject):
    fill = 0 if subject.driver in FORGETFUL else 0x77
    await subject.write(0, bytes([fill]) * subject.size)
    for start, length in RANGES:
        await subject.root.discard(start, length)
        content = await subject.read(0, subject.size)
        assert set(content[start : start + length]) <= {0, fill}
        assert await subject.read(0, subject.size) == content
    await subject.root.discard(0, subject.size)
    assert set(await subject.read(0, subject.size)) <= {0, fill}


async def test_status_covers_and_does_not_lie(subject):
    fill = b"\0" if subject.driver in FORGETFUL else b"\x77"
    await subject.write(MIB, fill * 65536)
    await subject.root.write_zeroes(MIB + 8192, 8192, unmap=True)
    at = 0
    while at < subject.size:
        stretches = await subject.root.status(at, subject.size - at)
        assert stretches
        for length, says_zero, allocated in stretches:
            assert length > 0
            if says_zero:
                assert await subject.read(at, length) == bytes(length)
            assert allocated or says_zero
            at += length
    assert at == subject.size


async def test_prefetching_changes_nothing(subject):
    before = await subject.read(0, 65536)
    await subject.root.prefetch(0, subject.size)
    assert await subject.read(0, 65536) == before


@pytest.mark.parametrize("new", [SIZE // 2, SIZE * 2, SIZE - 512, 0])
async def test_resizing_keeps_what_is_below_and_reads_zero_above(subject, new):
    fill = b"\0" if subject.driver in FORGETFUL else b"\x77"
    await subject.write(0, fill * subject.size)
    refusal = None
    try:
        await subject.daemon.execute("block_resize", {"node-name": "n", "size": new})
    except Error as error:
        refusal = error
    if refusal:
        assert subject.driver in FIXED or getattr(subject.root.node.options, "size", None) is not None, refusal
        assert subject.root.node.length == subject.size
        return
    length = subject.root.node.length
    if subject.driver != "host_device":
        assert length == new
    kept = min(subject.size, length)
    assert await subject.read(0, kept) == fill * kept
    if length > subject.size:
        assert await subject.read(subject.size, length - subject.size) == bytes(length - subject.size)
        await subject.write(length - 10, b"0123456789")


async def test_read_only_nodes_refuse_writers(tmp_path):
    async with Daemon() as daemon:
        await daemon.execute(
            "blockdev-add", {"driver": "file", "node-name": "n", "filename": file_of(tmp_path), "read-only": True}
        )
        root = Root(daemon.graph.find("n"), "the test")
        with pytest.raises(Error, match="read-only"):
            await root.attach(Permission.WRITE, ALL)
        await root.attach(Permission.CONSISTENT_READ, ALL)
        await root.detach()
