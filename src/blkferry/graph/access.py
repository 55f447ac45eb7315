"""Generic reading and writing of any node: where ranges live, resolved through all layers, and the bytes moved there.

Roots use it for their users, and drivers for their children. Exports take short cuts only where a run says that one
system call does the same. Failures are OSError.

A lookup is good for one turn of the loop. Whoever goes on using a place after that counts as a reader or writer of its
storage meanwhile, so that a driver can wait for those who may still use what it takes away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from blkferry.extent import Content, Effort, Status, coalesce
from blkferry.graph.node import MAX_TRANSFER, Node
from blkferry.plane.drain import Uses
from blkferry.units import SECTOR, align_down, align_up

if TYPE_CHECKING:
    from blkferry.plane.engine import Done
    from blkferry.plane.storage import Storage

BACKING = "backing"
"""The role of the child that BELOW asks."""

_ZERO_CHUNK = 1 << 20


class Run(NamedTuple):
    """A resolved extent: `length` bytes of a node from `start`, at `offset` of `storage` when the content is DATA.

    For OPAQUE content `node` can read it, at `offset`. `in_place`: overwriting there changes no metadata. Whoever does
    so has the nodes in `marks` note it first (`mark`), each with where the run begins in it. Otherwise `writer` takes
    what is written, at `writer_offset`. `depth` counts the backing files between the node that was asked and the one
    that answered.
    """

    start: int
    length: int
    content: Content
    node: Node
    offset: int
    storage: Storage | None
    in_place: bool
    allocated: bool
    writer: Node
    writer_offset: int
    depth: int = 0
    marks: tuple[tuple[Node, int], ...] = ()

    def mark(self) -> None:
        """All of it is about to be overwritten in place."""
        for node, at in self.marks:
            node.mark_dirty_bitmaps(at, at + self.length)


class Miss(NamedTuple):
    """`node` has to `load` the metadata for this range of it first."""

    node: Node
    start: int
    length: int

    async def load(self) -> None:
        await self.node.load(self.start, self.length)


def resolve(node: Node, start: int, length: int, effort: Effort) -> list[Run] | Miss:
    """Runs from `start`, over `length` bytes at most, or what has to be loaded before the first can be told."""
    extents = node.lookup(start, length, effort)
    if extents is None:
        return Miss(node, start, length)
    records = node.dirty_bitmaps.written is not None
    runs: list[Run] = []
    marks: tuple[tuple[Node, int], ...]
    for extent in extents:
        at, run_length, content, offset, child, in_place, allocated, settled = extent
        if content is Content.DATA and child is not None:
            child_node = node.children[child].node
            below = resolve(child_node, offset, run_length, Effort.PLACE if settled else effort)
            shift, depth = at - offset, 0
        elif content is Content.BELOW:
            below = _resolve_backing(node, at, run_length, effort)
            shift, depth = 0, 1
        else:
            storage = node.storage if content is Content.DATA else None
            here = in_place and storage is not None
            marks = ((node, at),) if here and records else ()
            runs.append(Run(at, run_length, content, node, offset, storage, here, allocated, node, at, marks=marks))
            continue
        if isinstance(below, Miss):
            return runs or below
        for run in below:
            run_at = run.start + shift
            if in_place and run.in_place:
                marks = ((node, run_at), *run.marks) if records else run.marks
                runs.append(run._replace(start=run_at, marks=marks))
            else:  # spelled out, as _replace takes more than twice as long
                _, size, kind, source, at_source, storage, _, is_allocated, _, _, layer, _ = run
                layer += depth
                runs.append(
                    Run(run_at, size, kind, source, at_source, storage, False, is_allocated, node, run_at, layer)
                )
        if below[-1].start + below[-1].length + shift < at + run_length:
            break  # the child did not answer for all of it
    return runs


def _resolve_backing(node: Node, start: int, length: int, effort: Effort) -> list[Run] | Miss:
    """What shows through from the backing child; behind its end there are zeroes."""
    edge = node.children.get(BACKING)
    available = edge.node.length - start if edge is not None else 0
    if edge is None or available <= 0:
        return [Run(start, length, Content.ZERO, node, start, None, False, False, node, start)]
    return resolve(edge.node, start, min(length, available), effort)


async def load_runs(node: Node, start: int, length: int, effort: Effort = Effort.PLACE) -> list[Run]:
    """Runs from `start`, as many as are at hand once the first is; loads what that takes."""
    while isinstance(found := resolve(node, start, length, effort), Miss):
        await found.load()
    return found


async def status(node: Node, start: int, length: int) -> list[Status]:
    """What is there, from `start`, covering at most `length` bytes and at least one."""
    runs = await load_runs(node, start, length, Effort.ALLOCATION)
    return coalesce([Status(run.length, run.content is Content.ZERO, run.allocated) for run in runs])


# Reading -------------------------------------------------------------------------------------------------------


async def read(node: Node, start: int, view: memoryview) -> None:
    """Fill `view` from offset `start`. The range must lie inside the node."""
    done = 0
    while done < len(view):
        runs = await load_runs(node, start + done, len(view) - done)
        with _counted(
            run.node.readers if run.storage is None else run.storage.readers
            for run in runs
            if run.storage is not None or run.content is Content.OPAQUE
        ):
            for run in runs:
                part = view[done : done + run.length]
                if run.storage is not None:
                    await _read_storage(run.storage, run.offset, part)
                elif run.content is Content.OPAQUE:
                    await run.node.read(run.offset, part)
                else:
                    part[:] = bytes(len(part))
                done += run.length


def read_later(node: Node, start: int, view: memoryview, done: Done) -> bool:
    """Begin to read what is one piece of OPAQUE content, if its driver can; tells whether it was begun (see Node)."""
    runs = resolve(node, start, len(view), Effort.PLACE)
    if isinstance(runs, Miss):
        return False
    run = runs[0]
    if run.content is not Content.OPAQUE or run.length < len(view):
        return False
    readers = run.node.readers
    use = readers.begin()

    def finish(result: int) -> None:
        readers.end(use)
        done(result)

    begun = run.node.read_later(run.offset, view, finish)
    if not begun:
        readers.end(use)
    return begun


@contextmanager
def _counted(uses: Iterator[Uses]) -> Iterator[None]:
    held = [(each, each.begin()) for each in {id(each): each for each in uses}.values()]
    try:
        yield
    finally:
        for each, epoch in held:
            each.end(epoch)


async def _read_storage(storage: Storage, offset: int, view: memoryview) -> None:
    """Read with whatever alignment the storage wants; zeroes follow the end of the file up to the next sector."""
    done = 0
    while done < len(view):
        length = min(len(view) - done, MAX_TRANSFER)
        first = align_down(offset + done, storage.alignment)
        last = align_up(offset + done + length, storage.alignment)
        buffer = storage.services.buffers.acquire(last - first)
        try:
            count = await storage.aread(buffer, 0, last - first, first)
            skip = offset + done - first
            if count < skip + length:
                _fill_tail(storage, first, count, skip + length, buffer.view)
            view[done : done + length] = buffer.view[skip : skip + length]
        finally:
            buffer.release()
        done += length


def _fill_tail(storage: Storage, offset: int, count: int, wanted: int, view: memoryview) -> None:
    """The sector that the file's last bytes begin reads as zeroes after them; any other short read is an I/O error."""
    if offset + wanted > align_up(storage.size, SECTOR) or offset + count < storage.size:
        raise OSError(errno.EIO, "the image is shorter than it was when it was opened")
    view[count:wanted] = bytes(wanted - count)


# Writing -------------------------------------------------------------------------------------------------------


async def write(node: Node, start: int, view: memoryview, *, fua: bool = False) -> None:
    """Write `view` at offset `start`. With `fua` it is durable on return."""
    done = 0
    flush = fua
    while done < len(view):
        runs = await load_runs(node, start + done, len(view) - done)
        if not runs[0].in_place:
            length = _same_writer(runs)
            writer, at = runs[0].writer, runs[0].writer_offset
            writer.mark_dirty_bitmaps(at, at + length)
            await writer.write(at, view[done : done + length])
            done += length
            flush = fua
            continue  # the writer took its time: what was looked up is stale
        with _counted(run.storage.writers for run in runs if run.in_place and run.storage is not None):
            for run in runs:
                if not run.in_place or run.storage is None:
                    break
                run.mark()
                through = fua and node.flush_target() is run.storage
                await _write_storage(run.storage, run.offset, view[done : done + run.length], through)
                flush = flush and not through
                done += run.length
    if flush:
        await node.flush()


def _same_writer(runs: list[Run]) -> int:
    """How many bytes the first run's writer takes in one piece."""
    first = runs[0]
    length = 0
    for run in runs:
        if run.in_place or run.writer is not first.writer or run.writer_offset != first.writer_offset + length:
            break
        length += run.length
    return length


def write_now(node: Node, start: int, view: memoryview) -> bool:
    """`write`, if it can be done at once, without sleeping longer than a buffered write does; tells whether it was.

    When it was not, a part may have been written all the same: `write` does it again.
    """
    if node.writes_now:
        node.mark_dirty_bitmaps(start, start + len(view))
        return node.write_now(start, view)
    done = 0
    while done < len(view):
        runs = resolve(node, start + done, len(view) - done, Effort.PLACE)
        if isinstance(runs, Miss):
            return False
        if not runs[0].in_place:
            length = _same_writer(runs)
            writer, at = runs[0].writer, runs[0].writer_offset
            writer.mark_dirty_bitmaps(at, at + length)
            if not writer.write_now(at, view[done : done + length]):
                return False
            done += length
            continue
        for run in runs:
            if not run.in_place or run.storage is None:
                break
            if run.storage.direct:
                return False
            run.mark()
            run.storage.write_now(view[done : done + run.length], run.offset)
            done += run.length
    return True


def write_later(node: Node, start: int, view: memoryview, done: Done) -> bool:
    """Begin to write where one driver takes all of it, if it can; tells whether it was begun (see Node)."""
    runs = resolve(node, start, len(view), Effort.PLACE)
    if isinstance(runs, Miss) or runs[0].in_place or _same_writer(runs) < len(view):
        return False
    writer, at = runs[0].writer, runs[0].writer_offset
    writer.mark_dirty_bitmaps(at, at + len(view))
    return writer.write_later(at, view, done)


async def _write_storage(storage: Storage, offset: int, view: memoryview, fua: bool) -> None:
    """Write with whatever alignment the storage wants, reading the edges first where that is needed."""
    done = 0
    while done < len(view):
        length = min(len(view) - done, MAX_TRANSFER)
        first = align_down(offset + done, storage.alignment)
        last = align_up(offset + done + length, storage.alignment)
        buffer = storage.services.buffers.acquire(last - first)
        try:
            async with storage.exclusive(first, last):
                if last - first != length:
                    count = await storage.aread(buffer, 0, last - first, first)
                    buffer.view[count : last - first] = bytes(last - first - count)
                skip = offset + done - first
                buffer.view[skip : skip + length] = view[done : done + length]
                await storage.awrite(buffer, 0, last - first, first, fua=fua)
        finally:
            buffer.release()
        done += length


async def write_zeroes(node: Node, start: int, length: int, *, unmap: bool, fast: bool = False) -> None:
    """Make the range read as zeroes; `unmap` allows holes, `fast` refuses (ENOTSUP) to write them."""
    node.mark_dirty_bitmaps(start, start + length)
    alignment = node.remap_alignment
    first, last = align_up(start, alignment), align_down(start + length, alignment)
    if first >= last:
        if fast:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        await _write_plain_zeroes(node, start, start + length)
        return
    try:
        await node.remap(first, last - first, unmap=unmap, fast=fast)
    except OSError as error:
        if fast or error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        await _write_plain_zeroes(node, first, last)
    await _write_plain_zeroes(node, start, first)
    await _write_plain_zeroes(node, last, start + length)


async def _write_plain_zeroes(node: Node, start: int, end: int) -> None:
    zeroes = memoryview(bytes(min(_ZERO_CHUNK, max(end - start, 0))))
    while start < end:
        part = zeroes[: end - start]
        await write(node, start, part)
        start += len(part)


async def discard(node: Node, start: int, length: int) -> None:
    """Give space back where the nodes' `discard` options want that; otherwise do nothing."""
    alignment = node.remap_alignment
    first, last = align_up(start, alignment), align_down(start + length, alignment)
    if first < last:
        if node.unmaps:
            node.mark_dirty_bitmaps(first, last)
        await node.discard(first, last - first)
