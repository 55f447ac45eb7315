"""Commands about the NBD server and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.schema.export import BlockExportDel, BlockExportInfo, BlockExportOptions, NbdServerStart

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("nbd-server-start")
async def nbd_server_start(daemon: Daemon, arguments: NbdServerStart) -> None:
    await daemon.start_nbd_server(
        arguments.addr,
        max_connections=arguments.max_connections,
        handshake_seconds=arguments.handshake_max_seconds,
    )


@command("nbd-server-stop")
async def nbd_server_stop(daemon: Daemon, arguments: None) -> None:
    del arguments
    if not await daemon.stop_nbd_server():
        raise Error(ErrorKind.NOT_FOUND, "NBD server not running")


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
