"""Persistent dirty bitmaps of an image that nobody uses meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from blkferry.daemon.commands import HANDLERS
from blkferry.daemon.daemon import Daemon
from blkferry.daemon.imaging.names import ImageName, opened
from blkferry.schema.bitmap import BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapOrStr


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
