"""A block driver of the tests: an overlay that keeps in memory which blocks it has, and some snapshots' names.

It lets the commands about overlays and snapshots be tested apart from any real format.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar, Literal

import msgspec
import pytest

from blkferry.daemon.branches import load_branches
from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content, Extent
from blkferry.graph import access, registry
from blkferry.graph.loan import lend
from blkferry.graph.node import Node
from blkferry.graph.permissions import Permission
from blkferry.schema.block import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import SnapshotInfo
from blkferry.schema.qapi import Doc, Size, branch, variants

BLOCK = 4096
MADE: dict[str, dict] = {}  # what images were made with, by their file


class CowOptions(BlockdevOptions):
    """An overlay."""

    driver: Literal["test-cow"] = "test-cow"
    file: Annotated[BlockdevRef, Doc("where its blocks are")]
    backing: Annotated[BlockdevRefOrNull | None, Doc("what shows through")] = None
    colour: Annotated[str, Doc("an option that can be changed")] = "red"
    shape: Annotated[str, Doc("an option that cannot be changed")] = "round"


class CowCreateOptions(BlockdevCreateOptions):
    """An overlay to make."""

    driver: Literal["test-cow"] = "test-cow"
    file: Annotated[BlockdevRef, Doc("where")]
    size: Annotated[Size, Doc("its size")]
    backing_file: Annotated[str | None, Doc("its backing file")] = None
    backing_fmt: Annotated[str | None, Doc("the format of that")] = None
    seconds: Annotated[int, Doc("how long it takes")] = 0


class Cow(Node):
    driver: ClassVar[str] = "test-cow"
    options_type: ClassVar[type[BlockdevOptions]] = CowOptions
    create_options: ClassVar[type[BlockdevCreateOptions] | None] = CowCreateOptions
    reopenable: ClassVar[frozenset[str]] = frozenset({"colour"})
    supports_backing: ClassVar[bool] = True
    supports_snapshots: ClassVar[bool] = True
    options: CowOptions

    @classmethod
    async def create(cls, graph, options):
        await asyncio.sleep(options.seconds)
        used = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        async with lend(graph, options.file, "the making of an image", used) as loan:
            await loan.run(loan.node.resize(options.size))
            name = loan.node.filename()
        MADE[name] = {"backing-file": options.backing_file, "backing-fmt": options.backing_fmt}

    async def open(self, opening):
        file = await opening.child(self, "file", self.options.file)
        if isinstance(self.options.backing, str | BlockdevOptions):
            await opening.child(self, access.BACKING, self.options.backing)
        self.length = file.length
        self.blocks = set()
        self.snapshots = []
        self.log = []
        self.backing_name = None

    def lookup(self, start, length, effort):
        extents = []
        end = start + length
        while start < end:
            stop = min(start // BLOCK * BLOCK + BLOCK, end)
            if start // BLOCK in self.blocks:
                extents.append(Extent(start, stop - start, Content.DATA, start, "file", in_place=True))
            else:
                extents.append(Extent(start, stop - start, Content.BELOW, start, allocated=False))
            start = stop
        return extents

    async def write(self, start, view):
        done = 0
        while done < len(view):
            block = (start + done) // BLOCK
            skip = start + done - block * BLOCK
            part = view[done : done + BLOCK - skip]
            data = bytearray(BLOCK)
            await access.read(self, block * BLOCK, memoryview(data)[: min(BLOCK, self.length - block * BLOCK)])
            data[skip : skip + len(part)] = part
            await access.write(self.children["file"].node, block * BLOCK, memoryview(data))
            self.blocks.add(block)
            done += len(part)
        self.retire()

    async def reopen_prepare(self, reopening):
        self.log.append(("prepare", self.options.colour, reopening.options.colour))
        if reopening.options.colour == "black":
            raise Error(ErrorKind.INVALID_ARGUMENT, "There is no black")

    async def reopen_commit(self, reopening):
        self.log.append(("commit", self.options.colour))

    async def reopen_abort(self, reopening):
        self.log.append(("abort", self.options.colour))

    async def snapshot_create(self, name):
        assert Permission.WRITE in self.children["file"].used
        self.snapshots.append(
            SnapshotInfo(
                id=str(len(self.snapshots) + 1),
                name=name,
                vm_state_size=0,
                date_sec=1,
                date_nsec=2,
                vm_clock_sec=3,
                vm_clock_nsec=4,
            )
        )

    async def snapshot_delete(self, snapshot_id, name):
        (found,) = (each for each in self.snapshots if snapshot_id in (None, each.id) and name in (None, each.name))
        self.snapshots.remove(found)
        return found

    async def change_backing_file(self, backing_file, backing_format):
        assert Permission.WRITE in self.children["file"].used
        self.backing_name = backing_file, backing_format

    def image_info(self):
        return msgspec.structs.replace(super().image_info(), cluster_size=BLOCK, snapshots=list(self.snapshots) or None)


class _Entry:
    def load(self):
        return Cow


@pytest.fixture
def cow_driver():
    """The driver `test-cow` is there during the test."""
    load_branches()
    registry.plugins("drivers")["test-cow"] = _Entry()
    branch(CowOptions)
    branch(CowCreateOptions)
    yield
    del registry.plugins("drivers")["test-cow"]
    for base in (BlockdevOptions, BlockdevCreateOptions):
        del variants(base).known["test-cow"]
