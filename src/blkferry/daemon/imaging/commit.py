"""Bringing what an image holds into its backing file, or into one further down."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from blkferry.daemon.imaging.copying import Buffers, Progress, ignore_progress, joined, pieces, pipelined, put, runs_of
from blkferry.daemon.imaging.information import chain
from blkferry.daemon.imaging.names import ImageName, opened, options_of, with_key
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.loan import Loan

_BASE = "commit-base"


async def commit(
    daemon: Daemon,
    image: ImageName,
    *,
    base: str | None = None,
    keep: bool = False,
    progress: Progress = ignore_progress,
) -> int:
    """Write what `image` holds into its backing file, or what it and those below it hold into `base`. Bytes written.

    Then the image is emptied, unless `keep` or `base` says otherwise. Raises Error.
    """
    layers = await _layers(daemon, image)
    depth = _depth_of(base, layers) if base is not None else 1
    empties = not keep and depth == 1
    async with AsyncExitStack() as stack:
        lower = await stack.enter_async_context(
            opened(daemon, layers[depth], "commit", writable=True, more={"node-name": _BASE})
        )
        backing = await daemon.services.in_thread(_nested, daemon, layers[1:depth])
        upper = await stack.enter_async_context(
            opened(daemon, image, "commit", writable=empties, more={"backing": backing})
        )
        written = await upper.run(_Commit(upper, lower, depth, progress).run())
        if empties:
            assert isinstance(upper.node, Qcow2)
            await upper.run(_empty(upper.node))
    return written


async def _layers(daemon: Daemon, image: ImageName) -> list[ImageName]:
    """The image and everything below it."""
    found = await chain(daemon, image)
    if len(found) < 2:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Image does not have a backing file",
            hint=f"'{image}' has everything itself: there is nothing to commit it to.",
        )
    layers = [image]
    for facts, _ in found[:-1]:
        assert facts.full_backing_filename is not None
        layers.append(
            replace(
                image,
                name=facts.full_backing_filename,
                image_format=facts.backing_filename_format,
                as_options=False,
            )
        )
    return layers


def _depth_of(base: str, layers: list[ImageName]) -> int:
    for depth, layer in enumerate(layers[1:], 1):
        if layer.name == base or os.path.realpath(layer.name) == os.path.realpath(base):
            return depth
    raise Error(
        ErrorKind.NOT_FOUND,
        f"Did not find '{base}' in the backing chain of '{layers[0]}'",
        hint=f"Below it are: {', '.join(layer.name for layer in layers[1:])}.",
    )


def _nested(daemon: Daemon, layers: list[ImageName]) -> dict[str, Any] | str:
    """The options of the layers in between, one inside the other, down to the base."""
    below: dict[str, Any] | str = _BASE
    for layer in reversed(layers):
        below = with_key({**options_of(replace(layer, snapshot=None)), "backing": below}, daemon)
    return below


class _Part(NamedTuple):
    start: int
    length: int
    zero: bool


class _Commit:
    """One commit at work."""

    def __init__(self, upper: Loan, lower: Loan, depth: int, progress: Progress) -> None:
        self._upper = upper
        self._lower = lower
        self._depth = depth
        self._progress = progress
        self._buffers = Buffers()
        self._written = 0

    async def run(self) -> int:
        total = self._upper.node.length
        if self._lower.node.length < total:
            await self._lower.node.resize(total)
        self._progress(0, total)
        await pipelined(self._parts(), self._read, self._write)
        await self._lower.root.flush()
        self._progress(total, total)
        return self._written

    async def _parts(self) -> AsyncIterator[_Part]:
        async for start, end, zero in joined(self._held()):
            if zero:
                yield _Part(start, end - start, zero=True)
                continue
            for at, length in pieces(start, end):
                yield _Part(at, length, zero=False)

    async def _held(self) -> AsyncIterator[tuple[int, int, bool]]:
        """Ranges (start, end, zero) of which an image above the base says what they are."""
        async for run in runs_of(self._upper.node):
            if run.depth < self._depth:
                yield run.start, run.start + run.length, run.content is Content.ZERO

    async def _read(self, part: _Part) -> bytearray | None:
        if part.zero:
            return None
        buffer = self._buffers.take()
        try:
            await self._upper.root.read(part.start, memoryview(buffer)[: part.length])
        except OSError as error:
            raise Error.from_oserror(f"error while reading at byte {part.start}", error) from error
        return buffer

    async def _write(self, part: _Part, buffer: bytearray | None) -> None:
        try:
            if buffer is None:
                await self._lower.root.write_zeroes(part.start, part.length, unmap=True)
            else:
                await put(self._lower.root, part.start, memoryview(buffer)[: part.length])
                self._buffers.give_back(buffer)
        except OSError as error:
            raise Error.from_oserror(f"error while writing at byte {part.start}", error) from error
        self._written += part.length
        self._progress(part.start + part.length, self._upper.node.length)


async def _empty(node: Qcow2) -> None:
    """Let the backing file show through everywhere."""
    try:
        with node.marking_corruption():
            async with node.frozen():
                await node.remapping.forget(0, align_up(node.length, node.header.cluster_size))
                await node.metadata.commit()
    except OSError as error:
        raise Error.from_oserror(f"Could not empty '{node.filename()}'", error) from error
