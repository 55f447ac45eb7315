"""`raw`: another node's bytes as they are, or a window of them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content, Effort, Extent
from blkferry.graph import access
from blkferry.graph.graph import Opening
from blkferry.graph.node import Node
from blkferry.graph.reopen import Reopening
from blkferry.plane.engine import Done
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions, BlockdevRef
from blkferry.schema.qapi import Doc, branch
from blkferry.units import SECTOR, align_down


@branch
class BlockdevOptionsRaw(BlockdevOptions):
    """A raw image, or a window of one."""

    driver: Literal["raw"] = "raw"
    file: Annotated[BlockdevRef, Doc("the node that holds the bytes", since="2.9")]
    offset: Annotated[int | None, Doc("where the window begins, a multiple of 512 bytes (default 0)", since="2.10")] = (
        None
    )
    size: Annotated[
        int | None, Doc("length of the window, a multiple of 512 bytes (default: to the end)", since="2.10")
    ] = None


class Raw(Node):
    """A window of `file`."""

    driver: ClassVar[str] = "raw"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsRaw
    reopenable: ClassVar[frozenset[str]] = frozenset({"offset", "size"})
    options: BlockdevOptionsRaw

    async def open(self, opening: Opening) -> None:
        _check_multiples(self.options)
        child = await opening.child(self, "file", self.options.file)
        _check_window(self.options, child.length)
        self._offset = self.options.offset or 0
        self._measure()

    def _measure(self) -> None:
        child = self.children["file"].node
        self.alignment = child.alignment
        self.remap_alignment = child.remap_alignment
        self.length = _window_length(self.options, child.length)

    async def reopen_prepare(self, reopening: Reopening) -> None:
        options, child = reopening.options, reopening.child("file")
        assert isinstance(options, BlockdevOptionsRaw)
        if child is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Cannot change the option 'file'", hint="A raw node has a file.")
        _check_multiples(options)
        _check_window(options, child.length)
        reopening.length = _window_length(options, child.length)

    async def reopen_commit(self, reopening: Reopening) -> None:
        del reopening
        self._offset = self.options.offset or 0
        self._measure()

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        del effort
        return [Extent(start, length, Content.DATA, start + self._offset, "file", in_place=True)]

    async def write(self, start: int, view: memoryview) -> None:
        await access.write(self.children["file"].node, start + self._offset, view)

    def write_now(self, start: int, view: memoryview) -> bool:
        return access.write_now(self.children["file"].node, start + self._offset, view)

    def write_later(self, start: int, view: memoryview, done: Done) -> bool:
        return access.write_later(self.children["file"].node, start + self._offset, view, done)

    def flush_later(self, done: Done) -> bool:
        return self.children["file"].node.flush_later(done)

    async def resize(self, length: int) -> None:
        if self.options.size is not None:
            raise Error(ErrorKind.UNSUPPORTED, "Cannot resize fixed-size raw disks", node=self.name)
        await self.children["file"].node.resize(length + self._offset)

    def flush_target(self) -> Storage | None:
        return self.children["file"].node.flush_target()

    def grow(self, length: int) -> bool:
        if self.options.size is not None or not self.children["file"].node.grow(length + self._offset):
            return False
        self._measure()
        return True

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        del role
        if end is not None:
            self.retire(max(start - self._offset, 0), max(end - self._offset, 0))
            return
        self._measure()
        self.retire()


def _check_multiples(options: BlockdevOptionsRaw) -> None:
    for what, value in (("offset", options.offset), ("size", options.size)):
        if value is not None and (value < 0 or value % SECTOR):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Specified {what} is not multiple of {SECTOR}", value=value)


def _check_window(options: BlockdevOptionsRaw, containing: int) -> None:
    """Raise Error unless the window lies in the `containing` bytes."""
    offset = options.offset or 0
    if offset > containing:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Offset ({offset}) cannot be greater than size of the containing file ({containing})",
        )
    if options.size is not None and options.size > containing - offset:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"The sum of offset ({offset}) and size ({options.size}) has to be smaller or equal to the "
            f"actual size of the containing file ({containing})",
        )


def _window_length(options: BlockdevOptionsRaw, containing: int) -> int:
    available = align_down(max(containing - (options.offset or 0), 0), SECTOR)
    return available if options.size is None else min(options.size, available)
