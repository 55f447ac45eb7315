"""What the options of `blkferry-qsd` do to a daemon, one by one, and what they answer when asked for help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from blkferry.cli.options import Given
from blkferry.daemon.commands.char import chardev_add
from blkferry.daemon.daemon import Daemon
from blkferry.errors import Error
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.char import ChardevAdd, parse_chardev
from blkferry.schema.control import MonitorOptions
from blkferry.schema.export import BlockExportOptions, NbdServerOptions
from blkferry.schema.keyval import Help, parse_option
from blkferry.schema.qom import ObjectOptions


class HelpWanted(Exception):  # noqa: N818 - it is no error
    """An option asked for its help, which is the argument."""


async def carry_out(daemon: Daemon, given: Given) -> None:
    """Do what an option says. Raises HelpWanted, or Error beginning with the option as it was written."""
    parse, apply = _ACTIONS[given.name]
    try:
        options = parse(given.argument)
        if isinstance(options, Help):
            raise HelpWanted(options.text)
        await apply(daemon, options)
    except Error as error:
        written = given.written
        if given.name == "object" and "secret" in written:  # its key may be a part of it
            written = f"--{given.name}"
        raise Error(error.kind, f"{written}: {error.message}", hint=error.hint, **error.facts) from error


async def _blockdev(daemon: Daemon, options: BlockdevOptions) -> None:
    await daemon.graph.add(options)


async def _export(daemon: Daemon, options: BlockExportOptions) -> None:
    await daemon.exports.add(options)


async def _nbd_server(daemon: Daemon, options: NbdServerOptions) -> None:
    await daemon.nbd_servers.start([options.addr], options)


async def _object(daemon: Daemon, options: ObjectOptions) -> None:
    await daemon.objects.add(options)


async def _chardev(daemon: Daemon, options: ChardevAdd) -> None:
    await chardev_add(daemon, options)


async def _monitor(daemon: Daemon, options: MonitorOptions) -> None:
    await daemon.add_monitor(options)


_ACTIONS: dict[str, tuple[Callable[[str], Any], Callable[[Daemon, Any], Awaitable[None]]]] = {
    "blockdev": (partial(parse_option, BlockdevOptions, implied="driver"), _blockdev),
    "export": (partial(parse_option, BlockExportOptions, implied="type"), _export),
    "nbd-server": (partial(parse_option, NbdServerOptions), _nbd_server),
    "object": (partial(parse_option, ObjectOptions, implied="qom-type"), _object),
    "chardev": (parse_chardev, _chardev),
    "monitor": (partial(parse_option, MonitorOptions, implied="chardev"), _monitor),
}
"""For each option, what reads its argument and what is done with that."""
