"""Commands about nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.graph.node import Node
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.schema.block import (
    BlockdevCacheInfo,
    BlockdevDel,
    BlockDeviceInfo,
    BlockdevOptions,
    BlockResize,
    ImageInfo,
    QueryNamedBlockNodes,
)
from blkferry.units import SECTOR

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

_MAX_LENGTH = (1 << 63) - SECTOR


@command("blockdev-add")
async def blockdev_add(daemon: Daemon, options: BlockdevOptions) -> None:
    await daemon.graph.add(options)


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
    del arguments  # without backing chains there is nothing to leave out
    return [_describe(node) for node in reversed(daemon.graph.nodes.values())]


def _describe(node: Node) -> BlockDeviceInfo:
    cache = node.cache
    return BlockDeviceInfo(
        file=node.filename(),
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver,
        backing_file_depth=0,
        detect_zeroes=node.options.detect_zeroes,
        image=ImageInfo(
            filename=node.filename(),
            format=node.driver,
            virtual_size=node.length,
            actual_size=node.allocated_size(),
        ),
        cache=BlockdevCacheInfo(writeback=True, direct=cache.direct, no_flush=cache.no_flush),
    )
