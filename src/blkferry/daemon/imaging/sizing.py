"""The size of disks, and of the files they will need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from blkferry.daemon.imaging import creating
from blkferry.daemon.imaging.bitmaps import keeps_bitmaps
from blkferry.daemon.imaging.copying import runs_of
from blkferry.daemon.imaging.creating import NewImage
from blkferry.daemon.imaging.names import QCOW2, RAW, ImageName, opened
from blkferry.drivers.qcow2 import making, measuring
from blkferry.drivers.qcow2.measuring import Measured
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.drivers.qcow2.options import BlockdevCreateOptionsQcow2
from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content
from blkferry.graph import access
from blkferry.schema.create import PreallocMode
from blkferry.units import SECTOR, align_up

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.node import Node

_PIECE = 1 << 20


async def resize(
    daemon: Daemon,
    image: ImageName,
    size: str,
    *,
    shrink: bool = False,
    preallocation: PreallocMode = PreallocMode.OFF,
) -> tuple[int, int]:
    """Make a disk `size` long, or by so much longer or shorter ("+1G", "-1G"): old and new size. Raises Error."""
    async with opened(daemon, image, "resize", writable=True) as loan:
        node = loan.node
        old, new = node.length, _new_size(node.length, size)
        if new < old and not shrink:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Use the --shrink option to perform a shrink operation.",
                hint=f"It deletes all data behind the new end, {old - new} bytes. Before performing such an operation, "
                "make sure there is no important data there.",
            )
        if new < old and preallocation is not PreallocMode.OFF:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Preallocation can only be used for growing images")
        _check_preallocation(node, preallocation)
        await loan.run(node.resize(new))
        if new > old:
            await loan.run(_allocate(node, old, new, preallocation))
        await loan.run(loan.root.flush())
        return old, new


def _new_size(old: int, text: str) -> int:
    sign = text[0] if text[:1] in ("+", "-") else ""
    size = creating.size_of(text[1:] if sign else text)
    if sign:
        size = old + size if sign == "+" else old - size
    if size <= 0:
        raise Error(ErrorKind.INVALID_ARGUMENT, "New image size must be positive", hint=f"It has {old} bytes now.")
    return align_up(size, SECTOR)


def _check_preallocation(node: Node, wanted: PreallocMode) -> None:
    possible = {PreallocMode.OFF, PreallocMode.FULL}
    if not isinstance(node, Qcow2):
        possible.add(PreallocMode.FALLOC)
    if wanted not in possible:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Unsupported preallocation mode '{wanted}' for growing images of format '{node.driver}'",
            hint=f"There is: {', '.join(sorted(possible))}.",
        )


async def _allocate(node: Node, start: int, end: int, wanted: PreallocMode) -> None:
    if wanted is PreallocMode.FALLOC:
        await access.write_zeroes(node, start, end - start, unmap=False)
    elif wanted is PreallocMode.FULL:
        zeroes = memoryview(bytes(_PIECE))
        while start < end:
            await access.write(node, start, zeroes[: end - start])
            start += _PIECE


async def measure(
    daemon: Daemon, new: NewImage, source: ImageName | None = None, *, size: int | None = None
) -> Measured:
    """How large the file of `new` will be, for `size` bytes or for what `source` holds. Raises Error."""
    if new.image_format not in (RAW, QCOW2):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Format driver '{new.image_format}' does not support size measurement",
            hint=f"There is: {RAW}, {QCOW2}.",
        )
    if source is None:
        if size is None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Either --size N or one filename must be specified",
                hint="Like: blkferry image measure -O qcow2 disk.img",
            )
        return await _measured(daemon, new, align_up(size, SECTOR), None, None)
    async with opened(daemon, source, "measure") as loan:
        node = loan.node
        allocated = [each async for each in _data(node)] if new.image_format == QCOW2 else []
        bitmaps = None
        if isinstance(node, Qcow2) and keeps_bitmaps(node):
            bitmaps = [(entry.name, entry.granularity_bits) for entry in node.bitmaps.entries if entry.usable]
        return await _measured(daemon, new, node.length, allocated, bitmaps)


async def _data(node: Node) -> AsyncIterator[tuple[int, int]]:
    async for run in runs_of(node):
        if run.content is not Content.ZERO:
            yield run.start, run.length


async def _measured(
    daemon: Daemon,
    new: NewImage,
    size: int,
    allocated: list[tuple[int, int]] | None,
    bitmaps: list[tuple[str, int]] | None,
) -> Measured:
    if new.image_format == RAW:
        return Measured(size, size)
    sized = NewImage(name=new.name, image_format=QCOW2, size=size, options={**new.options, "size": str(size)})
    options = await creating.create_options(daemon, sized)
    assert isinstance(options, BlockdevCreateOptionsQcow2)
    spec = await making.spec_of(daemon.graph, options)
    header = spec.encryption(spec.cluster_size) if callable(spec.encryption) else b""
    return measuring.measure(spec, allocated, encryption_length=len(header), bitmaps=bitmaps)
