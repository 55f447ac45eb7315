"""Commands about nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.graph.access import BACKING
from blkferry.graph.graph import refuse_backing
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.reopen import reopen
from blkferry.graph.root import Root
from blkferry.schema.block import (
    BlockdevCacheInfo,
    BlockdevDel,
    BlockDeviceInfo,
    BlockdevOptions,
    BlockdevReopen,
    BlockDirtyInfo,
    BlockResize,
    QueryNamedBlockNodes,
)
from blkferry.schema.image import ImageInfo
from blkferry.units import SECTOR

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

_MAX_LENGTH = (1 << 63) - SECTOR


@command("blockdev-add")
async def blockdev_add(daemon: Daemon, options: BlockdevOptions) -> None:
    await daemon.graph.add(options)


@command("blockdev-reopen")
async def blockdev_reopen(daemon: Daemon, arguments: BlockdevReopen) -> None:
    async with daemon.graph.changing:
        await reopen(daemon.graph, arguments.options)


@command("blockdev-del")
async def blockdev_del(daemon: Daemon, arguments: BlockdevDel) -> None:
    await daemon.graph.remove(arguments.node_name)


@command("block_resize")
async def block_resize(daemon: Daemon, arguments: BlockResize) -> None:
    name = arguments.node_name or arguments.device or ""
    node = daemon.graph.find(name)
    if arguments.size < 0 or arguments.size > _MAX_LENGTH:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Parameter 'size' expects a >0 size",
            hint="A number of bytes.",
            size=arguments.size,
        )
    refuse_backing(node)
    root = Root(node, "block_resize")

    async def resize() -> None:
        await root.attach(Permission.RESIZE | Permission.CONSISTENT_READ, ALL)
        try:
            await node.resize(arguments.size)
        finally:
            await root.detach()

    async with daemon.graph.changing:
        await node.services.run(resize())


@command("query-named-block-nodes")
async def query_named_block_nodes(daemon: Daemon, arguments: QueryNamedBlockNodes) -> list[BlockDeviceInfo]:
    return [_describe(node, flat=arguments.flat) for node in reversed(daemon.graph.nodes.values())]


def _describe(node: Node, *, flat: bool) -> BlockDeviceInfo:
    cache = node.cache
    chain = [node, *_backing_chain(node)]
    image: ImageInfo | None = None
    for each in reversed(chain[:1] if flat else chain):
        image = msgspec.structs.replace(each.image_info(), backing_image=image)
    assert image is not None
    return BlockDeviceInfo(
        file=node.filename(),
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver,
        backing_file=chain[1].filename() if len(chain) > 1 else None,
        backing_file_depth=0 if flat else len(chain) - 1,
        encrypted=bool(image.encrypted),
        detect_zeroes=node.options.detect_zeroes,
        dirty_bitmaps=_dirty_bitmaps(node) or None,
        image=image,
        cache=BlockdevCacheInfo(writeback=True, direct=cache.direct, no_flush=cache.no_flush),
    )


def _dirty_bitmaps(node: Node) -> list[BlockDirtyInfo]:
    return [
        BlockDirtyInfo(
            name=bitmap.name,
            count=bitmap.dirty_bytes,
            granularity=bitmap.granularity,
            recording=bitmap.enabled,
            busy=bitmap.busy,
            persistent=bitmap.persistent,
            inconsistent=bitmap.inconsistent or None,
        )
        for bitmap in reversed([*node.dirty_bitmaps.values()])
    ]


def _backing_chain(node: Node) -> list[Node]:
    """The backing file of a node, that one's backing file, and so on."""
    chain: list[Node] = []
    while (edge := node.children.get(BACKING)) is not None:
        node = edge.node
        chain.append(node)
    return chain
