"""What the words of a `SocketAddress` mean to the kernel: hosts, services, paths and numbers.

Opens no socket; only `look_up` may ask a name server, and blocks meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import sys

from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import SocketAddressInet, SocketAddressUnix, SocketAddressVsock

MAX_PORT = 65535
SUN_PATH = 108  # sizeof(sockaddr_un.sun_path), of which a path needs one byte for its NUL
MAX_UINT32 = (1 << 32) - 1

Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]
"""One answer of getaddrinfo."""


def family(address: SocketAddressInet) -> socket.AddressFamily:
    """Return the one family that `address` allows, or AF_UNSPEC for both."""
    if address.ipv4 is False and address.ipv6 is False:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Cannot disable IPv4 and IPv6 at same time")
    if address.ipv4 and address.ipv6:
        return socket.AF_UNSPEC
    if address.ipv6 or address.ipv4 is False:
        return socket.AF_INET6
    if address.ipv4 or address.ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC


def port_number(port: str) -> int | None:
    """Return the number that `port` is, or None for a service name."""
    if not port:
        return 0
    digits = port.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        return None
    # The length is checked first: Python refuses to convert absurdly long numbers in its own words.
    significant = port.lstrip("0") or "0"
    if len(significant) > len(str(MAX_PORT)) or not 0 <= int(significant) <= MAX_PORT:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Port '{port[:20]}' is not between 0 and {MAX_PORT}")
    return int(significant)


def look_up(address: SocketAddressInet, *, passive: bool) -> list[Found]:
    """Return all addresses of a host and service, at least one; `passive` for listening. Blocks."""
    flags = socket.AI_PASSIVE if passive else 0
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    number = port_number(address.port)
    service = address.port if number is None else str(number)
    try:
        found = socket.getaddrinfo(address.host or None, service, family(address), socket.SOCK_STREAM, 0, flags)
    except OSError as error:
        reason = error.strerror
    except ValueError:  # the name cannot even be encoded
        reason = "not a valid host name"
    else:
        usable: list[Found] = [each for each in found if each[0] in (socket.AF_INET, socket.AF_INET6)]  # type: ignore[misc]
        if usable:
            return usable
        reason = "no address of a usable family"
    raise Error(ErrorKind.NOT_FOUND, f"address resolution failed for {address.host}:{address.port}: {reason}")


def unix_path(path: str) -> bytes:
    """Return what bind and connect take for a path."""
    name = _encode(path)
    if b"\0" in name:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"UNIX socket path {path!r} contains a NUL byte")
    return name


def abstract_name(address: SocketAddressUnix) -> bytes:
    """Return what bind and connect take for a name that is no path; an empty one stays empty."""
    name = _encode(address.path)
    if not name:
        return b""
    name = b"\0" + name
    return name if address.tight else name.ljust(SUN_PATH, b"\0")


def _encode(path: str) -> bytes:
    room = SUN_PATH - 1
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"UNIX socket path {path!r} is not valid text") from None
    if len(name) > room:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"UNIX socket path '{path}' is too long",
            hint=f"it has {len(name)} bytes, the limit is {room}",
        )
    return name


def vsock_numbers(address: SocketAddressVsock) -> tuple[int, int]:
    """Return context id and port."""
    return _uint32("cid", address.cid), _uint32("port", address.port)


def local_cid() -> int:
    """The context id of this machine, by which others reach it; where nothing tells, the one that guests have for
    their host.
    """
    with contextlib.suppress(OSError), open("/dev/vsock", "rb", buffering=0) as device:
        cid = int.from_bytes(fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4)), sys.byteorder)
        if cid != socket.VMADDR_CID_ANY:
            return cid
    return socket.VMADDR_CID_HOST


def _uint32(what: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > MAX_UINT32:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Failed to parse {what} '{text[:20]}'",
            hint=f"it is a decimal number from 0 to {MAX_UINT32}, which stands for any",
        )
    return int(text)
