"""Commands about the daemon and the protocol itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import HANDLERS, command
from blkferry.errors import Error, ErrorKind
from blkferry.schema.control import Closefd, CommandInfo, Getfd, QmpCapabilities, VersionInfo, VersionTriple
from blkferry.schema.introspect import SchemaInfo, introspect
from blkferry.schema.registry import COMMANDS, EVENTS
from blkferry.sockets import descriptors
from blkferry.sockets.descriptors import Descriptors

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


@command("getfd")
async def getfd(daemon: Daemon, arguments: Getfd) -> None:
    del daemon
    if not arguments.fdname or arguments.fdname[0].isdigit():
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Parameter 'fdname' expects a name not starting with a digit",
            hint="Numbers stand for descriptors that the daemon inherited.",
        )
    _passed().name_arrived(arguments.fdname)


@command("closefd")
async def closefd(daemon: Daemon, arguments: Closefd) -> None:
    del daemon
    if not _passed().drop(arguments.fdname):
        raise Error(ErrorKind.NOT_FOUND, f"File descriptor named '{arguments.fdname}' not found")


def _passed() -> Descriptors:
    """What the monitor's client has passed; nothing where there is no monitor."""
    return descriptors.current() or Descriptors()


@command("quit")
async def quit_(daemon: Daemon, arguments: None) -> None:
    del arguments
    daemon.finished.set()
