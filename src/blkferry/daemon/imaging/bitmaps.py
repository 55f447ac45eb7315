"""Persistent dirty bitmaps of images that nobody uses meanwhile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from blkferry.daemon.commands import HANDLERS
from blkferry.daemon.daemon import Daemon
from blkferry.daemon.imaging.names import ImageName, opened
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import DirtyBitmap
from blkferry.graph.node import Node
from blkferry.schema.bitmap import BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapOrStr

log = logging.getLogger(__name__)


async def change(
    daemon: Daemon,
    image: ImageName,
    name: str,
    actions: list[str],
    *,
    granularity: int | None = None,
    sources: list[str] | None = None,
    source_image: ImageName | None = None,
) -> None:
    """Do `actions` (add, remove, clear, enable, disable, merge), in their order, to the bitmap called `name`.

    merge takes `sources`, one for every time that it is named; they are bitmaps of `source_image`, or the image's own.
    Raises Error.
    """
    left = list(sources or [])
    async with opened(daemon, image, "bitmap", writable=True) as loan, _source(daemon, source_image) as other:
        node = loan.node.name
        for action in actions:
            arguments: object = BlockDirtyBitmap(node=node, name=name)
            if action == "add":
                arguments = BlockDirtyBitmapAdd(node=node, name=name, granularity=granularity, persistent=True)
            elif action == "merge":
                bitmap = left.pop(0)
                source: BlockDirtyBitmapOrStr = BlockDirtyBitmap(node=other, name=bitmap) if other else bitmap
                arguments = BlockDirtyBitmapMerge(node=node, target=name, bitmaps=[source])
            await HANDLERS[f"block-dirty-bitmap-{action}"](daemon, arguments)


@asynccontextmanager
async def _source(daemon: Daemon, image: ImageName | None) -> AsyncIterator[str | None]:
    """The name of the node whose bitmaps are merged, None if it is the target itself."""
    if image is None:
        yield None
        return
    async with opened(daemon, image, "bitmap", writable=False) as loan:
        yield loan.node.name


def keeps_bitmaps(node: Node) -> bool:
    """Whether the image has room for bitmaps."""
    return isinstance(node, Qcow2) and node.header.version >= 3


def to_copy(node: Node, *, skip_broken: bool) -> list[DirtyBitmap]:
    """The persistent bitmaps of the image itself. Of those that are no good any more it warns, or raises Error."""
    if not keeps_bitmaps(node):
        raise Error(
            ErrorKind.UNSUPPORTED,
            "Source lacks bitmap support",
            hint="qcow2 images have it, but not those of version 2.",
        )
    found = []
    for bitmap in node.dirty_bitmaps.values():
        if not bitmap.inconsistent:
            found.append(bitmap)
        elif skip_broken:
            log.warning("Skipping inconsistent bitmap '%s'", bitmap.name)
        else:
            raise Error(
                ErrorKind.CORRUPT,
                f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                hint="Try --skip-broken-bitmaps, or use 'blkferry image bitmap --remove' to delete it.",
                bitmap=bitmap.name,
            )
    return found


@asynccontextmanager
async def copied(daemon: Daemon, source: Node, bitmaps: list[DirtyBitmap], target: Node) -> AsyncIterator[None]:
    """Let `target` have these bitmaps of `source` too; what is written to it here, they do not record.

    It has none of them if this fails. Raises Error.
    """
    if not keeps_bitmaps(target):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Format driver '{target.driver}' does not support bitmaps",
            hint="qcow2 does, but not in version 2 (compat=0.10).",
        )
    added = []
    try:
        for bitmap in bitmaps:
            name = bitmap.name
            add = BlockDirtyBitmapAdd(
                node=target.name, name=name, granularity=bitmap.granularity, persistent=True, disabled=True
            )
            await _do(daemon, "add", add, f"Failed to create bitmap {name}")
            added.append(name)
            origin = BlockDirtyBitmap(node=source.name, name=name)
            merge = BlockDirtyBitmapMerge(node=target.name, target=name, bitmaps=[origin])
            await _do(daemon, "merge", merge, f"Failed to populate bitmap {name}")
        yield
    except BaseException:
        for name in added:
            del target.dirty_bitmaps[name]  # it is not in the file yet: that happens when the image is closed
        raise
    for bitmap in bitmaps:
        target.dirty_bitmaps[bitmap.name].enabled = bitmap.enabled


async def _do(daemon: Daemon, action: str, arguments: object, doing: str) -> None:
    try:
        await HANDLERS[f"block-dirty-bitmap-{action}"](daemon, arguments)
    except Error as error:
        raise Error(error.kind, f"{doing}: {error.message}", hint=error.hint, **error.facts) from error
