"""Where every byte of a disk is: what `qemu-img map` says, of any image and its backing files.

This is for people and programs that look at an image from outside, so it tells more than a lookup on the data path:
which layer answers, where zeroes keep their space, what is compressed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.layout import is_sparse, layout
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.extent import Content, Effort
from blkferry.graph import access
from blkferry.graph.access import BACKING

if TYPE_CHECKING:
    from blkferry.graph.node import Node

_STEP = 1 << 34  # bytes asked for at once


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes that are alike. `present`: some layer says what they are. `offset` in `filename`, if it has one."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    filename: str | None = None

    def follows(self, other: Stretch) -> bool:
        """Whether this is the same thing going on behind `other`."""
        if self.offset is not None and other.offset is not None and other.offset + other.length != self.offset:
            return False
        same = ("depth", "present", "zero", "data", "compressed", "filename")
        return (self.offset is None) == (other.offset is None) and all(
            getattr(self, name) == getattr(other, name) for name in same
        )


async def stretches(node: Node, start: int = 0, end: int | None = None) -> AsyncIterator[Stretch]:
    """What a disk consists of, neighbours that are alike put together."""
    end = node.length if end is None else min(end, node.length)
    look = _Look()
    last: Stretch | None = None
    while start < end:
        found = await look.at(node, start, min(end - start, _STEP), 0)
        start += found.length
        if last is not None and found.follows(last):
            last = replace(last, length=last.length + found.length)
            continue
        if last is not None:
            yield last
        last = found
    if last is not None:
        yield last


class _Look:
    """One look at an image and what is below it."""

    def __init__(self) -> None:
        self._sparse: dict[Qcow2, bool] = {}

    async def at(self, node: Node, start: int, length: int, depth: int) -> Stretch:
        """The first stretch of a range."""
        if isinstance(node, Qcow2):
            return await self._qcow2(node, start, length, depth)
        (run, *_) = await access.load_runs(node, start, length, Effort.ALLOCATION)
        zero = run.content is Content.ZERO
        packed = run.content is Content.OPAQUE and isinstance(run.node, Qcow2)
        present = run.allocated or zero
        return Stretch(
            start,
            run.length,
            depth,
            present=present,
            zero=zero,
            data=run.allocated,
            compressed=False,
            offset=run.offset if present and not packed else None,
            filename=run.node.filename() or None,
        )

    async def _qcow2(self, node: Qcow2, start: int, length: int, depth: int) -> Stretch:
        found = await layout(node, start, length)
        file = (node.data_file or node.file).node
        here = Stretch(
            start,
            found.length,
            depth,
            present=found.data or found.zero,
            zero=found.zero,
            data=found.data,
            compressed=found.compressed,
            offset=found.offset,
            filename=file.filename() if found.offset is not None else None,
        )
        if found.data:
            return await self._beneath(here, node, file)
        if found.zero:
            return here
        edge = node.children.get(BACKING)
        if edge is None or start >= edge.node.length:
            return replace(here, zero=True)
        available = min(found.length, edge.node.length - start)
        return await self.at(edge.node, start, available, depth + 1)

    async def _beneath(self, here: Stretch, node: Qcow2, file: Node) -> Stretch:
        """Allocated clusters, of which a sparse file may hold less: see which of them are holes there."""
        if here.offset is None:
            return here
        if node not in self._sparse:
            self._sparse[node] = await is_sparse(node)
        if not self._sparse[node]:
            return here
        inside = min(here.length, file.length - here.offset)
        if inside <= 0:
            return replace(here, zero=True)
        (run, *_) = await access.load_runs(file, here.offset, inside, Effort.ALLOCATION)
        return replace(here, length=run.length, zero=run.content is Content.ZERO)
