"""Copying images into another one, of any format: only what is not zero is read and written.

Reads run ahead; writes come in order, so that a new image is laid out like the disk. Compression happens in threads
meanwhile. A target that was made here goes away again when the copy fails.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from blkferry.daemon.imaging import bitmaps, creating
from blkferry.daemon.imaging.compressing import ZERO, Compressor, Packed
from blkferry.daemon.imaging.copying import (
    AHEAD,
    PIECE,
    Buffers,
    Progress,
    ignore_progress,
    joined,
    pieces,
    pipelined,
    put,
    runs_of,
    whole_units,
    zero_runs,
)
from blkferry.daemon.imaging.creating import NewImage
from blkferry.daemon.imaging.names import ImageName, opened, probed
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content
from blkferry.units import SECTOR, format_size

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.loan import Loan

log = logging.getLogger(__name__)

SPARSE = 4096
"""Zeroes of at least so many bytes become holes, as in QEMU."""


class Part(NamedTuple):
    """A stretch of a source that has to be written."""

    start: int
    length: int
    zero: bool


class Fetched(NamedTuple):
    """What was read of it: nothing for zeroes. With compression, `packed` has an item per cluster."""

    buffer: bytearray | None
    packed: list[Packed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What to copy, and into what. Several sources are put one behind the other.

    `create`: make the target; otherwise it is there, and long enough. `target_is_zero`: it reads as zeroes.
    `sparse_size` 0 copies zeroes as well. `salvage` replaces what cannot be read by zeroes. `rate` is bytes a second.
    `bitmaps` copies those that the source keeps too, `skip_broken_bitmaps` without the inconsistent ones.
    """

    sources: Sequence[ImageName]
    target: NewImage
    cache: str = "unsafe"
    compress: bool = False
    create: bool = True
    target_is_zero: bool = False
    sparse_size: int = SPARSE
    salvage: bool = False
    rate: int = 0
    threads: int = 0
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False


@dataclass(slots=True)
class Copied:
    """What a conversion did: the length of the disk, how much of it was written, how much could not be read."""

    length: int = 0
    written: int = 0
    unreadable: int = 0


async def convert(daemon: Daemon, work: Conversion, progress: Progress = ignore_progress) -> Copied:
    """Copy. Raises Error."""
    _check(work)
    async with AsyncExitStack() as stack:
        loans = [await stack.enter_async_context(opened(daemon, each, "convert")) for each in work.sources]
        total = sum(loan.node.length for loan in loans)
        source = loans[0].node
        wanted = bitmaps.to_copy(source, skip_broken=work.skip_broken_bitmaps) if work.bitmaps else []
        target = await _sized(daemon, work, loans, total)
        if work.create:
            await stack.enter_async_context(creating.making(daemon, target))
        name = ImageName(name=target.name, image_format=target.image_format or None, cache=work.cache)
        if not work.create:
            name = await daemon.services.in_thread(probed, name)
        more = _key(target) if work.create else {}
        loan = await stack.enter_async_context(opened(daemon, name, "convert", writable=True, more=more))
        if loan.node.length < total:
            raise Error(
                ErrorKind.NO_SPACE,
                f"'{target.name}' is smaller than what shall be copied: {loan.node.length} of {total} bytes",
                hint="Make it larger first: blkferry image resize.",
            )
        if work.bitmaps:
            await stack.enter_async_context(bitmaps.copied(daemon, source, wanted, loan.node))
        copy = _Copy(work, loans, loan, progress)
        return await loan.run(copy.run(total))


def _check(work: Conversion) -> None:
    if not work.create and work.target.options:
        log.warning("-o has no effect when skipping image creation")
    if work.target_is_zero and work.create:
        raise Error(ErrorKind.INVALID_ARGUMENT, "--target-is-zero requires -n", hint="A new image is zero anyway.")
    if work.skip_broken_bitmaps and not work.bitmaps:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Use of --skip-broken-bitmaps requires --bitmaps")
    if work.bitmaps and len(work.sources) > 1:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Copying bitmaps only possible with single source")
    if work.sparse_size % SECTOR or not 0 <= work.sparse_size <= PIECE:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Invalid buffer size for sparse output specified: {work.sparse_size}",
            hint=f"Valid sizes are multiples of {SECTOR} up to {format_size(PIECE)}. Select 0 to copy zeroes as well.",
        )
    if work.create:
        creating.check_creator(work.target.image_format)
    paths = [os.path.realpath(path) for each in work.sources if (path := each.path) is not None]
    if os.path.realpath(work.target.name) in paths:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{work.target.name}' is source and target at once")


async def _sized(daemon: Daemon, work: Conversion, loans: Sequence[Loan], total: int) -> NewImage:
    """The target with the size of what is copied, unless -o says another one."""
    target = work.target
    if not work.create:
        return target
    size = total
    if (text := target.option("size")) is not None:
        size = creating.size_of(text)
    backing = target.option("backing_file")
    if backing:
        if len(loans) > 1:
            raise Error(ErrorKind.INVALID_ARGUMENT, "A backing file cannot be used with more than one source image")
        await creating.backing_length(daemon, target.name, backing, target.option("backing_fmt"))
    return replace(target, size=size)


def _key(target: NewImage) -> dict[str, Any]:
    """What opens the encrypted target that was just made."""
    key, kind = target.option("encrypt.key-secret"), target.option("encrypt.format")
    return {"encrypt": {"format": kind or "luks", "key-secret": key}} if key is not None else {}


class _Copy:
    """One copy at work."""

    def __init__(self, work: Conversion, sources: Sequence[Loan], target: Loan, progress: Progress) -> None:
        self._work = work
        self._sources = sources
        self._root = target.root
        self._node = target.node
        self._progress = progress
        self._result = Copied()
        self._bases: list[int] = []
        at = 0
        for source in sources:
            self._bases.append(at)
            at += source.node.length
        backed = bool(work.target.option("backing_file"))
        fresh = work.create and not creating.is_fixed(work.target.name)
        self._skips_zeroes = not backed and (fresh or work.target_is_zero) and work.sparse_size > 0
        self._skips_below = backed and work.create
        self._unit = max(work.sparse_size, self._cluster() if fresh else 0) or PIECE
        self._compressing = self._compressor() if work.compress else None
        self._buffers = Buffers(max(PIECE, self._compressing.cluster if self._compressing is not None else 0))

    def _cluster(self) -> int:
        """What zeroes have to fill for a hole in the target."""
        return min(self._node.metadata.geometry.unit, PIECE) if isinstance(self._node, Qcow2) else 0

    def _compressor(self) -> Compressor:
        node = self._node
        if not isinstance(node, Qcow2):
            raise Error(
                ErrorKind.UNSUPPORTED,
                "Compression not supported for this file format",
                hint="qcow2 has it: -O qcow2.",
            )
        if node.cipher is not None or node.data_file is not None:
            what = "encrypted images" if node.cipher is not None else "images with an external data file"
            raise Error(ErrorKind.UNSUPPORTED, f"Compression and {what} do not go together")
        cluster = node.header.cluster_size
        if any(base % cluster for base in self._bases):
            raise Error(
                ErrorKind.UNSUPPORTED,
                "Sources that do not end at a cluster's end cannot be compressed into one image",
                hint="Put them together first, then compress the result.",
            )
        return Compressor(node.header.compression_type, cluster, self._work.threads)

    async def run(self, total: int) -> Copied:
        self._result.length = total
        self._total = total
        self._began = time.monotonic()
        self._progress(0, total)
        try:
            for number, source in enumerate(self._sources):
                self._source, self._base = source, self._bases[number]
                await pipelined(self._pieces(source), self._read, self._write, self._ahead())
            await self._root.flush()
        finally:
            if self._compressing is not None:
                self._compressing.close()
        self._progress(total, total)
        return self._result

    def _ahead(self) -> int:
        return AHEAD if self._compressing is None else self._compressing.threads + AHEAD // 2

    # What to copy ----------------------------------------------------------------------------------------------

    async def _pieces(self, source: Loan) -> AsyncIterator[Part]:
        """What has to be written, in order; zeroes in stretches of any length, data in pieces."""
        if self._compressing is not None:
            async for part in self._whole_clusters(source, self._compressing.cluster):
                yield part
            return
        async for start, end, zero in joined(self._wanted(source)):
            if zero:
                yield Part(start, end - start, zero=True)
                continue
            for at, length in pieces(start, end):
                yield Part(at, length, zero=False)

    async def _whole_clusters(self, source: Loan, cluster: int) -> AsyncIterator[Part]:
        """Clusters of the target in which there is anything, for what is compressed is compressed whole."""
        ranges = joined(self._wanted(source))
        async for start, length in whole_units(ranges, cluster, source.node.length):
            yield Part(start, length, zero=False)

    async def _wanted(self, source: Loan) -> AsyncIterator[tuple[int, int, bool]]:
        """Ranges (start, end, zero) that the target does not have anyway."""
        async for run in runs_of(source.node):
            end = run.start + run.length
            if self._passes_over(run.content, run.depth):
                self._tell(end)
            else:
                yield run.start, end, run.content is Content.ZERO and bool(self._work.sparse_size)

    def _passes_over(self, content: Content, depth: int) -> bool:
        return (self._skips_below and depth > 0) or (content is Content.ZERO and self._skips_zeroes)

    # Reading ---------------------------------------------------------------------------------------------------

    async def _read(self, part: Part) -> Fetched:
        if part.zero:
            return Fetched(None, [])
        buffer = self._buffers.take()
        view = memoryview(buffer)[: part.length]
        try:
            await self._source.root.read(part.start, view)
        except OSError as error:
            if not self._work.salvage:
                raise Error.from_oserror(f"error while reading at byte {part.start}", error) from error
            await self._salvage(part.start, view)
        if self._compressing is None:
            return Fetched(buffer, [])
        return Fetched(buffer, await self._compressing.compress(view))

    async def _salvage(self, start: int, view: memoryview) -> None:
        """Read what can be read, sector by sector."""
        for at in range(0, len(view), SECTOR):
            sector = view[at : at + SECTOR]
            try:
                await self._source.root.read(start + at, sector)
            except OSError:
                sector[:] = bytes(len(sector))
                self._result.unreadable += len(sector)

    # Writing ---------------------------------------------------------------------------------------------------

    async def _write(self, part: Part, fetched: Fetched) -> None:
        start = self._base + part.start
        try:
            if fetched.buffer is None:
                await self._root.write_zeroes(start, part.length, unmap=True)
            elif self._compressing is not None:
                await self._write_compressed(start, fetched, part.length)
            else:
                await self._write_data(start, fetched.buffer, part.length)
        except OSError as error:
            raise Error.from_oserror(f"error while writing at byte {start}", error) from error
        if fetched.buffer is not None:
            self._buffers.give_back(fetched.buffer)
        self._tell(part.start + part.length)
        await self._slow_down()

    async def _write_data(self, start: int, buffer: bytearray, length: int) -> None:
        view = memoryview(buffer)
        if not self._work.sparse_size:
            await put(self._root, start, view[:length])
            self._result.written += length
            return
        for at, size, zero in zero_runs(buffer, length, self._unit):
            if not zero:
                await put(self._root, start + at, view[at : at + size])
                self._result.written += size
            elif not self._skips_zeroes:
                await self._root.write_zeroes(start + at, size, unmap=True)

    async def _write_compressed(self, start: int, fetched: Fetched, length: int) -> None:
        assert isinstance(self._node, Qcow2)
        assert self._compressing is not None
        assert fetched.buffer is not None
        cluster = self._compressing.cluster
        for at, packed in zip(range(0, length, cluster), fetched.packed, strict=True):
            size = min(cluster, length - at)
            if packed is ZERO:
                if not self._skips_zeroes:
                    await self._root.write_zeroes(start + at, size, unmap=True)
                continue
            if packed is None:
                await put(self._root, start + at, memoryview(fetched.buffer)[at : at + size])
            else:
                with self._node.marking_corruption():
                    await self._node.writing.write_compressed(start + at, packed)
            self._result.written += size

    def _tell(self, done: int) -> None:
        self._progress(self._base + done, self._total)

    async def _slow_down(self) -> None:
        if self._work.rate:
            ahead = self._result.written / self._work.rate - (time.monotonic() - self._began)
            if ahead > 0:
                await asyncio.sleep(ahead)
