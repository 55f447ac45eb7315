"""Character devices: the channels that monitors talk over.

They are spelled twice: `ChardevAdd` is chardev-add's form, `ChardevOptions` the flat one of `--chardev`,
which `parse_chardev` reads and turns into the former.
"""

from typing import Annotated, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.schema.keyval import Help, parse_option
from blkferry.schema.qapi import Command, Doc, Form, Struct, Uint16, branch, union
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressLegacy,
    SocketAddressUnix,
)


@union("type", wrappable=True)
class ChardevBackend(Struct):
    """What a character device is made of."""

    type: Annotated[str, Doc("the kind of back end", since="1.4")]


@branch
class ChardevSocket(ChardevBackend):
    """A stream socket."""

    type: Literal["socket"] = "socket"
    addr: Annotated[SocketAddressLegacy, Doc("where to listen, or to connect to", since="1.4")]
    server: Annotated[bool, Doc("listen rather than connect", since="1.4")] = True
    wait: Annotated[bool, Doc("ignored: start-up never waits for a client", since="1.4")] = False


@branch
class ChardevStdio(ChardevBackend):
    """Standard input and output of the daemon."""

    type: Literal["stdio"] = "stdio"
    signal: Annotated[bool, Doc("let the terminal's keys send signals", since="1.5")] = True


@branch
class ChardevNull(ChardevBackend):
    """Discards output and never has input."""

    type: Literal["null"] = "null"


class ChardevAdd(Struct):
    """Arguments of chardev-add."""

    id: Annotated[str, Doc("name of the character device")]
    backend: Annotated[ChardevBackend, Form.WRAPPED, Doc("what it is made of")]


@union("backend")
class ChardevOptions(Struct):
    """A character device."""

    backend: Annotated[str, Doc("the kind of back end")]
    id: Annotated[str, Doc("name of the character device")]

    def to_backend(self) -> ChardevBackend:
        """The same in chardev-add's terms."""
        raise NotImplementedError


@branch
class ChardevOptionsSocket(ChardevOptions):
    """A stream socket: path, fd, or host and port say where."""

    backend: Literal["socket"] = "socket"
    path: Annotated[str | None, Doc("path of a Unix socket")] = None
    abstract: Annotated[bool, Doc("the path is an abstract name")] = False
    tight: Annotated[bool, Doc("do not pad an abstract name")] = True
    host: Annotated[str, Doc("host name or address; empty is all interfaces")] = ""
    port: Annotated[str | None, Doc("TCP port number or service name")] = None
    to: Annotated[Uint16 | None, Doc("try the ports up to this one")] = None
    ipv4: Annotated[bool | None, Doc("use IPv4 addresses")] = None
    ipv6: Annotated[bool | None, Doc("use IPv6 addresses")] = None
    fd: Annotated[str | None, Doc("number of an inherited socket")] = None
    server: Annotated[bool, Doc("listen rather than connect")] = False
    wait: Annotated[bool, Doc("ignored: start-up never waits for a client")] = False

    def to_backend(self) -> ChardevBackend:
        given = [name for name in ("path", "fd", "port") if getattr(self, name) is not None]
        if len(given) != 1:
            message = f"chardev '{self.id}' needs exactly one of 'path', 'port' and 'fd'"
            hint = f"There are {', '.join(given)}." if given else "There is none."
            raise Error(ErrorKind.INVALID_ARGUMENT, message, hint=hint)
        address: SocketAddress
        if self.path is not None:
            address = SocketAddressUnix(path=self.path, abstract=self.abstract, tight=self.tight)
        elif self.fd is not None:
            address = SocketAddressFd(fd=self.fd)
        else:
            address = SocketAddressInet(
                host=self.host, port=self.port or "", to=self.to, ipv4=self.ipv4, ipv6=self.ipv6
            )
        return ChardevSocket(addr=address, server=self.server, wait=self.wait)


@branch
class ChardevOptionsStdio(ChardevOptions):
    """Standard input and output of the daemon."""

    backend: Literal["stdio"] = "stdio"
    signal: Annotated[bool, Doc("let the terminal's keys send signals")] = True

    def to_backend(self) -> ChardevBackend:
        return ChardevStdio(signal=self.signal)


@branch
class ChardevOptionsNull(ChardevOptions):
    """Discards output and never has input."""

    backend: Literal["null"] = "null"

    def to_backend(self) -> ChardevBackend:
        return ChardevNull()


def parse_chardev(text: str) -> ChardevAdd | Help:
    """The argument of `--chardev`; its switches may stand alone (`server`, `nowait`), as they ever could."""
    options = parse_option(
        ChardevOptions,
        text,
        "backend",
        bare=("server", "wait", "abstract", "tight", "ipv4", "ipv6", "signal"),
    )
    if isinstance(options, Help):
        return options
    return ChardevAdd(id=options.id, backend=options.to_backend())


class ChardevReturn(Struct):
    """What chardev-add made."""

    pty: Annotated[str | None, Doc("name of the pseudo-terminal; never here")] = None


class ChardevRemove(Struct):
    """Arguments of chardev-remove."""

    id: Annotated[str, Doc("the character device to remove")]


class ChardevInfo(Struct):
    """A character device, as query-chardev lists it."""

    label: Annotated[str, Doc("name of the character device")]
    filename: Annotated[str, Doc("its channel, readable")]
    frontend_open: Annotated[bool, Doc("whether a monitor uses it", since="2.1")]


COMMANDS = (
    Command("chardev-add", "Create a character device.", ChardevAdd, ChardevReturn, since="1.4"),
    Command("chardev-remove", "Remove a character device that nothing uses.", ChardevRemove, since="1.4"),
    Command("query-chardev", "List the character devices.", returns=list[ChardevInfo], since="0.14"),
)
