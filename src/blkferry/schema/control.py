"""Commands about the daemon and the protocol itself, and the options of a monitor."""

import enum
from typing import Annotated

from blkferry.schema.introspect import SchemaInfo
from blkferry.schema.qapi import Command, Doc, Struct


class QmpCapability(enum.StrEnum):
    """What a client may switch on while negotiating."""

    OOB = "oob"


class QmpCapabilities(Struct):
    """Arguments of qmp_capabilities."""

    enable: Annotated[list[QmpCapability] | None, Doc("capabilities to switch on", since="2.12")] = None


class VersionTriple(Struct):
    """A version number."""

    major: Annotated[int, Doc("major version")]
    minor: Annotated[int, Doc("minor version")]
    micro: Annotated[int, Doc("micro version")]


class VersionInfo(Struct):
    """The version of QEMU whose protocol is spoken, and what speaks it."""

    qemu: Annotated[VersionTriple, Doc("the version of QEMU this daemon behaves as")]
    package: Annotated[str, Doc("the daemon and its own version")]


class CommandInfo(Struct):
    """A command, as query-commands lists it."""

    name: Annotated[str, Doc("name of the command")]


class MonitorMode(enum.StrEnum):
    """The protocol of a monitor."""

    READLINE = "readline"
    CONTROL = "control"


class MonitorOptions(Struct):
    """A monitor (`--monitor`)."""

    chardev: Annotated[str, Doc("the character device to talk over", since="5.0")]
    id: Annotated[str | None, Doc("name of the monitor", since="5.0")] = None
    mode: Annotated[MonitorMode, Doc("control is QMP, and all there is", since="5.0")] = MonitorMode.CONTROL
    pretty: Annotated[bool, Doc("indent what is sent", since="5.0")] = False


class Getfd(Struct):
    """Arguments of getfd."""

    fdname: Annotated[str, Doc("its name from now on, which does not begin with a digit")]


class Closefd(Struct):
    """Arguments of closefd."""

    fdname: Annotated[str, Doc("the name that getfd gave it")]


COMMANDS = (
    Command("qmp_capabilities", "End negotiation.", QmpCapabilities, since="0.13"),
    Command("query-version", "Say which version is spoken.", returns=VersionInfo, since="0.14"),
    Command("query-commands", "List the commands.", returns=list[CommandInfo], since="0.14"),
    Command("query-qmp-schema", "Describe commands and events.", returns=list[SchemaInfo], since="2.5"),
    Command("getfd", "Name the file descriptor that came with this message.", Getfd, since="0.14"),
    Command("closefd", "Close a file descriptor that was passed with getfd.", Closefd, since="0.14"),
    Command("quit", "End the daemon.", since="0.14"),
)
