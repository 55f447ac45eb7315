"""Making, reading and damaging qcow2 images in tests, by our own code and by QEMU's."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import peers
from blkferry.daemon.daemon import Daemon
from blkferry.drivers.qcow2.checking import Repair, check
from blkferry.drivers.qcow2.creation import CreateSpec, create
from blkferry.drivers.qcow2.findings import CheckResult
from blkferry.drivers.qcow2.header import Header
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root

_USED = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


@asynccontextmanager
async def opened(*paths: Path) -> AsyncIterator[list[Node]]:
    """Nodes over files, with the right to change them."""
    async with Daemon() as daemon:
        roots = []
        for number, path in enumerate(paths):
            options = {"driver": "file", "node-name": f"n{number}", "filename": str(path)}
            await daemon.execute("blockdev-add", options)
            root = Root(daemon.graph.find(f"n{number}"), "the test")
            await root.attach(_USED, ALL)
            roots.append(root)
        yield [root.node for root in roots]
        for root in roots:
            await root.detach()


async def make(path: Path, spec: CreateSpec, data: Path | None = None) -> None:
    """Create an image, and its data file where it has one."""
    paths = [path] if data is None else [path, data]
    for each in paths:
        each.touch()
    async with opened(*paths) as nodes:
        await create(nodes[0], nodes[1] if data is not None else None, spec)


async def checked(path: Path, repair: Repair = Repair.NONE) -> CheckResult:
    """What our check says."""
    async with opened(path) as (node,):
        with path.open("rb") as file:
            header = Header.parse(file.read(2 << 20), file_size=node.length)
        return await check(node, header, repair=repair)


def qemu_check(path: Path, *options: str) -> dict[str, int]:
    """What qemu-img check says; all of its numbers, 0 where it has none."""
    done = peers.run("qemu-img", "check", "--output=json", *options, str(path), expect=None)
    if not done.stdout.strip():
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


NUMBERS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check-errors": "check_errors",
    "image-end-offset": "image_end_offset",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}


def same_numbers(ours: CheckResult, theirs: dict[str, int]) -> None:
    """Fail unless both checks have found the same."""
    assert {key: getattr(ours, name) for key, name in NUMBERS.items()} == {
        key: theirs.get(key, 0) for key in NUMBERS
    }, ours.messages


def qemu_io(path: Path, *commands: str, options: str = "driver=qcow2") -> None:
    """Run qemu-io commands on an image."""
    argv = [part for command in commands for part in ("-c", command)]
    done = peers.run("qemu-io", *argv, "--image-opts", f"{options},file.filename={path}")
    assert "failed" not in done.stdout, done.stdout


def info(path: Path) -> dict[str, object]:
    return json.loads(peers.run("qemu-img", "info", "--output=json", str(path)).stdout)


def read_header(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.parse(file.read(2 << 20), file_size=os.path.getsize(path))


def get(path: Path, offset: int, form: str = ">Q") -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def put(path: Path, offset: int, value: int, form: str = ">Q") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))
