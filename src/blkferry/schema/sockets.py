"""Socket addresses, flat and legacy: two spellings of one value.

Nothing here resolves or checks an address; a port is text until the listener sees it.
"""

from typing import Annotated, Literal

import msgspec

from blkferry.schema.qapi import Doc, Form, Struct, Uint16, branch, union


@union("type", wrappable=True)
class SocketAddress(Struct):
    """Where a socket listens or connects."""

    type: Annotated[str, Doc("the kind of address", since="2.9")]


@branch
class SocketAddressInet(SocketAddress):
    """A TCP port."""

    type: Literal["inet"] = "inet"
    host: Annotated[str, Doc("host name or address; empty is all interfaces")]
    port: Annotated[str, Doc("port number or service name; 0 or empty is a free port")]
    numeric: Annotated[bool, Doc("host and port are numbers, resolve nothing", since="2.9")] = False
    to: Annotated[Uint16 | None, Doc("try the ports up to this one")] = None
    ipv4: Annotated[bool | None, Doc("use IPv4 addresses (default: both families)")] = None
    ipv6: Annotated[bool | None, Doc("use IPv6 addresses (default: both families)")] = None
    keep_alive: Annotated[bool, Doc("send keep-alive packets", since="4.2")] = False
    mptcp: Annotated[bool, Doc("use multi-path TCP", since="6.1")] = False


@branch
class SocketAddressUnix(SocketAddress):
    """A Unix domain socket."""

    type: Literal["unix"] = "unix"
    path: Annotated[str, Doc("path of the socket")]
    abstract: Annotated[bool, Doc("a name in the abstract namespace instead of a path", since="5.1")] = False
    tight: Annotated[bool, Doc("do not pad an abstract name with NUL bytes", since="5.1")] = True


@branch
class SocketAddressVsock(SocketAddress):
    """A port between host and guests."""

    type: Literal["vsock"] = "vsock"
    cid: Annotated[str, Doc("context id, a decimal number: 2 is the host, 4294967295 whichever is ours")]
    port: Annotated[str, Doc("port, a decimal number")]


@branch
class SocketAddressFd(SocketAddress):
    """A socket that the daemon inherited."""

    type: Literal["fd"] = "fd"
    fd: Annotated[str, Doc("number of the file descriptor")] = msgspec.field(name="str")


SocketAddressLegacy = Annotated[SocketAddress, Form.WRAPPED]
"""The same addresses as older commands spell them: `{"type": "unix", "data": {"path": "/s"}}`."""
