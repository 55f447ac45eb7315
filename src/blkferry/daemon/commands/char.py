"""Commands about character devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon import chardev
from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import well_formed
from blkferry.schema.char import ChardevAdd, ChardevInfo, ChardevRemove, ChardevReturn

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("chardev-add")
async def chardev_add(daemon: Daemon, arguments: ChardevAdd) -> ChardevReturn:
    if not well_formed(arguments.id):
        raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'id' expects an identifier", hint="Like 'qmp0'.")
    if arguments.id in daemon.chardevs:
        raise Error(ErrorKind.EXISTS, f"chardev '{arguments.id}' is already in use", hint="Choose another id.")
    device = chardev.make(arguments.id, arguments.backend)
    await device.start()
    daemon.chardevs[arguments.id] = device
    return ChardevReturn()


@command("chardev-remove")
async def chardev_remove(daemon: Daemon, arguments: ChardevRemove) -> None:
    device = daemon.chardevs.get(arguments.id)
    if device is None:
        raise Error(ErrorKind.NOT_FOUND, f"Chardev '{arguments.id}' not found")
    if device.claimed:
        raise Error(ErrorKind.BUSY, f"Chardev '{arguments.id}' is busy", hint="A monitor uses it.")
    del daemon.chardevs[arguments.id]
    device.stop()


@command("query-chardev")
async def query_chardev(daemon: Daemon, arguments: None) -> list[ChardevInfo]:
    del arguments
    return [
        ChardevInfo(label=name, filename=device.filename, frontend_open=device.claimed)
        for name, device in daemon.chardevs.items()
    ]
