"""Another backing file for an image, with the same content as before: what differs is copied into the image first."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple

from blkferry.daemon.imaging.copying import (
    Buffers,
    Progress,
    all_zero,
    ignore_progress,
    joined,
    pipelined,
    put,
    runs_of,
    whole_units,
)
from blkferry.daemon.imaging.information import chain
from blkferry.daemon.imaging.names import ImageName, opened
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error, ErrorKind
from blkferry.graph import filename
from blkferry.graph.access import BACKING

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.loan import Loan
    from blkferry.graph.node import Node


async def rebase(
    daemon: Daemon,
    image: ImageName,
    backing: str | None,
    backing_format: str | None = None,
    *,
    unsafe: bool = False,
    progress: Progress = ignore_progress,
) -> int:
    """Give an image the backing file `backing`, as the image shall name it; None for none. How many bytes were copied.

    With `unsafe` nothing is copied or looked at: for a backing file that was moved or renamed. Raises Error.
    """
    if backing and backing_format is None:
        path = filename.full_path(backing, image.name)
        guess = f" (It looks like {filename.probe(path)}.)" if os.path.isfile(path) else ""
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Could not change the backing file to '{backing}': backing format must be specified",
            hint=f"Say which it is with -F.{guess}",
        )
    new = None
    if backing and not unsafe:
        new = ImageName(name=filename.full_path(backing, image.name), image_format=backing_format)
        await _refuse_loop(daemon, image, new)
    async with AsyncExitStack() as stack:
        top = await stack.enter_async_context(opened(daemon, image, "rebase", writable=True, chain=not unsafe))
        if not top.node.supports_backing:
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"Images of format '{top.node.driver}' have no backing file",
                hint="Convert it first: blkferry image convert -O qcow2.",
            )
        copied = 0
        if not unsafe:
            below = None
            if new is not None:
                below = await stack.enter_async_context(opened(daemon, new, "rebase"))
            copied = await top.run(_Rebase(top, below, progress).run())
        await top.run(top.node.change_backing_file(backing or None, backing_format if backing else None))
    return copied


async def _refuse_loop(daemon: Daemon, image: ImageName, new: ImageName) -> None:
    """Refuse a backing file that is based on the image itself."""
    for facts, _ in await chain(daemon, new):
        if _same_path(facts.filename, image.name):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"'{new}' cannot be the backing file of '{image}': it is that image, or based on it",
            )


def _same_path(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


class _Part(NamedTuple):
    start: int
    length: int


class _Rebase:
    """One rebase at work."""

    def __init__(self, top: Loan, below: Loan | None, progress: Progress) -> None:
        self._top = top
        self._below = below
        self._progress = progress
        self._buffers = Buffers()
        self._copied = 0
        assert isinstance(top.node, Qcow2)
        self._unit = top.node.metadata.geometry.unit
        self._same_depth = self._depth_of(below.node) if below is not None else None

    def _depth_of(self, wanted: Node) -> int | None:
        """How deep the new backing file is in the old chain: what comes from there is the same anyway."""
        node, depth = self._top.node, 0
        while (edge := node.children.get(BACKING)) is not None:
            node, depth = edge.node, depth + 1
            if node.driver == wanted.driver and _same_path(node.filename(), wanted.filename()):
                return depth if node.length == wanted.length else None
        return None

    async def run(self) -> int:
        total = self._top.node.length
        self._progress(0, total)
        await pipelined(self._parts(), self._read, self._write)
        await self._top.root.flush()
        self._progress(total, total)
        return self._copied

    async def _parts(self) -> AsyncIterator[_Part]:
        async for start, length in whole_units(joined(self._inherited()), self._unit, self._top.node.length):
            yield _Part(start, length)

    async def _inherited(self) -> AsyncIterator[tuple[int, int, None]]:
        """Ranges that the image has from its backing files, as far as the new one may differ there."""
        total = self._top.node.length
        async for run in runs_of(self._top.node):
            end = run.start + run.length
            if run.depth and (self._same_depth is None or run.depth < self._same_depth):
                yield run.start, end, None
            else:
                self._progress(end, total)

    async def _read(self, part: _Part) -> tuple[bytearray, bytearray]:
        old, new = self._buffers.take(), self._buffers.take()
        try:
            await self._top.root.read(part.start, memoryview(old)[: part.length])
            inside = 0
            if self._below is not None:
                inside = max(min(part.length, self._below.node.length - part.start), 0)
                if inside:
                    await self._below.root.read(part.start, memoryview(new)[:inside])
            new[inside : part.length] = bytes(part.length - inside)
        except OSError as error:
            raise Error.from_oserror(f"error while reading at byte {part.start}", error) from error
        return old, new

    async def _write(self, part: _Part, found: tuple[bytearray, bytearray]) -> None:
        old, new = found
        view, other = memoryview(old), memoryview(new)
        at = 0
        while at < part.length:
            end = at
            while end < part.length and bytes(view[end : end + self._unit]) != bytes(other[end : end + self._unit]):
                end += self._unit
            if end > at:
                end = min(end, part.length)
                await self._keep(part.start + at, old, at, end)
            at = end + self._unit if end < part.length else end
        self._buffers.give_back(old)
        self._buffers.give_back(new)
        self._progress(part.start + part.length, self._top.node.length)

    async def _keep(self, start: int, buffer: bytearray, at: int, end: int) -> None:
        """Store in the image itself what it had from below."""
        part = buffer[at:end]
        self._copied += len(part)
        try:
            if all_zero(part, len(part)):
                await self._top.root.write_zeroes(start, len(part), unmap=True)
            else:
                await put(self._top.root, start, memoryview(part))
        except OSError as error:
            raise Error.from_oserror(f"error while writing at byte {start}", error) from error
