"""Commands about the NBD server and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.exports.nbd import NbdExport
from blkferry.schema.export import (
    BlockExportDel,
    BlockExportInfo,
    BlockExportOptions,
    BlockExportOptionsNbd,
    NbdServerAdd,
    NbdServerInfo,
    NbdServerRemove,
    NbdServerStart,
    NbdServerStop,
)

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("nbd-server-start")
async def nbd_server_start(daemon: Daemon, arguments: NbdServerStart) -> None:
    await daemon.nbd_servers.start([arguments.addr], arguments)


@command("nbd-server-stop")
async def nbd_server_stop(daemon: Daemon, arguments: NbdServerStop) -> None:
    if not await daemon.nbd_servers.stop(arguments.id):
        daemon.nbd_servers.get(arguments.id)  # says that it does not run


@command("query-nbd-servers")
async def query_nbd_servers(daemon: Daemon, arguments: None) -> list[NbdServerInfo]:
    del arguments
    return daemon.nbd_servers.query()


@command("nbd-server-add")
async def nbd_server_add(daemon: Daemon, arguments: NbdServerAdd) -> None:
    node = daemon.graph.find(arguments.device, device=arguments.device)
    name = arguments.name if arguments.name is not None else arguments.device
    options = BlockExportOptionsNbd(
        id=name,
        node_name=node.name,
        name=name,
        description=arguments.description,
        writable=arguments.writable and not node.read_only,
        bitmaps=None if arguments.bitmap is None else [arguments.bitmap],
    )
    await daemon.exports.add(options)


@command("nbd-server-remove")
async def nbd_server_remove(daemon: Daemon, arguments: NbdServerRemove) -> None:
    if not isinstance(daemon.exports.get(arguments.name), NbdExport):
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Block export '{arguments.name}' is not an NBD export")
    await daemon.exports.remove(arguments.name, arguments.mode)


@command("block-export-add")
async def block_export_add(daemon: Daemon, options: BlockExportOptions) -> None:
    await daemon.exports.add(options)


@command("block-export-del")
async def block_export_del(daemon: Daemon, arguments: BlockExportDel) -> None:
    await daemon.exports.remove(arguments.id, arguments.mode)


@command("query-block-exports")
async def query_block_exports(daemon: Daemon, arguments: None) -> list[BlockExportInfo]:
    del arguments
    return daemon.exports.query()
