"""Commands about the daemon and the protocol itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import HANDLERS, command
from blkferry.schema.control import CommandInfo, QmpCapabilities, VersionInfo, VersionTriple
from blkferry.schema.introspect import SchemaInfo, introspect
from blkferry.schema.registry import COMMANDS, EVENTS

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("qmp_capabilities")
async def qmp_capabilities(daemon: Daemon, arguments: QmpCapabilities) -> None:
    """The monitor's session negotiates and answers this itself; a Python caller has nothing to negotiate."""
    del daemon, arguments


@command("query-version")
async def query_version(daemon: Daemon, arguments: None) -> VersionInfo:
    del arguments
    major, minor, micro = daemon.version
    return VersionInfo(qemu=VersionTriple(major=major, minor=minor, micro=micro), package=daemon.package)


@command("query-commands")
async def query_commands(daemon: Daemon, arguments: None) -> list[CommandInfo]:
    del daemon, arguments
    return [CommandInfo(name=name) for name in COMMANDS if name in HANDLERS]


@command("query-qmp-schema")
async def query_qmp_schema(daemon: Daemon, arguments: None) -> list[SchemaInfo]:
    del daemon, arguments
    return introspect(COMMANDS.values(), EVENTS.values())


@command("quit")
async def quit_(daemon: Daemon, arguments: None) -> None:
    del arguments
    daemon.finished.set()
