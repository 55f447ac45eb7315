"""Listening sockets for a `SocketAddress`: the one place that resolves, binds and cleans up.

Used by every server of the daemon; knows neither what is served nor who may connect.

Invariants: what is at a Unix path is removed only if it is a socket that nobody listens on; a socket file of
ours is removed only while it still is ours; all families of one listener share one port; a failure leaves no
socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
import stat
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)
from blkferry.sockets import descriptors, names

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKLOG = socket.SOMAXCONN
PROBE_PAUSE_S = 0.02  # between bind and listen a live socket refuses, too: one that refuses twice is dead
EPHEMERAL_ATTEMPTS = 32  # a port the kernel picks for one family may be taken in the other
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this host lacks the family or the address


@dataclass(frozen=True, slots=True)
class _SocketFile:
    path: bytes  # absolute, since the working directory may change
    identity: tuple[int, int]  # st_dev, st_ino

    def unlink(self) -> None:
        with contextlib.suppress(OSError):
            if _identity(os.lstat(self.path)) == self.identity:
                os.unlink(self.path)


@dataclass(frozen=True, slots=True)
class Listener:
    """Non-blocking sockets that listen, and the file that goes with them."""

    sockets: tuple[socket.socket, ...]
    _file: _SocketFile | None = None

    @property
    def addresses(self) -> list[SocketAddress]:
        """Where the sockets are bound, with the ports that the kernel chose; paths are absolute."""
        if self._file:
            return [SocketAddressUnix(path=os.fsdecode(self._file.path))]
        return describe(self.sockets)

    def close(self) -> None:
        # The file goes first: in the other order a successor could meet it as a dead socket and replace it.
        if self._file and any(sock.fileno() >= 0 for sock in self.sockets):
            self._file.unlink()
        for sock in self.sockets:
            sock.close()


async def listen(address: SocketAddress, *, backlog: int = BACKLOG) -> Listener:
    """Listen at `address`, or raise `Error` and leave everything as it was."""
    match address:
        case SocketAddressInet():
            return await _listen_inet(address, backlog)
        case SocketAddressUnix(abstract=True):
            return _listen_abstract(address, backlog)
        case SocketAddressUnix():
            return await _listen_unix(address.path, backlog)
        case SocketAddressFd():
            return _listen_inherited(address.fd, backlog)
        case SocketAddressVsock():
            return _listen_vsock(address, backlog)
    raise Error(ErrorKind.UNSUPPORTED, f"Listening on an address of type '{address.type}' is not supported")


def describe(sockets: Sequence[socket.socket]) -> list[SocketAddress]:
    """Return the addresses that sockets are bound to; a Unix path is as it was given to bind."""
    return [_describe(sock) for sock in sockets]


def _describe(sock: socket.socket) -> SocketAddress:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if name.startswith("\0"):
            padded = len(os.fsencode(name)) == names.SUN_PATH
            return SocketAddressUnix(path=name[1:].rstrip("\0"), abstract=True, tight=not padded)
        return SocketAddressUnix(path=name)
    if sock.family == socket.AF_VSOCK:
        return SocketAddressVsock(cid=str(name[0]), port=str(name[1]))
    return SocketAddressInet(host=name[0], port=str(name[1]))


# -- inet ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """One address to bind, its port still open."""

    family: socket.AddressFamily
    host: tuple[str, int, int]  # address, flow, scope; IPv4 uses the first
    v6only: bool

    def at(self, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
        host, flow, scope = self.host
        return (host, port) if self.family == socket.AF_INET else (host, port, flow, scope)


async def _listen_inet(address: SocketAddressInet, backlog: int) -> Listener:
    found = await asyncio.to_thread(names.look_up, address, passive=True)
    endpoints, port = _endpoints(address, found), found[0][4][1]
    ports = _candidates(address, port)
    protocol = socket.IPPROTO_MPTCP if address.mptcp else socket.IPPROTO_TCP
    for candidate in ports:
        try:
            listener = Listener(_bind_all(endpoints, candidate, protocol, backlog))
        except OSError as error:
            if error.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT) and address.mptcp:
                raise Error(ErrorKind.UNSUPPORTED, "This host has no multi-path TCP") from error
            if error.errno != errno.EADDRINUSE:
                raise Error.from_oserror(
                    "Failed to bind socket", error, hint=f"asked for {address.host}:{candidate}"
                ) from error
        else:
            for sock in listener.sockets:  # sockets that they accept have it from them
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, address.keep_alive)
            return listener
    in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if address.to is None:
        raise Error.from_oserror("Failed to bind socket", in_use, hint=f"port {port} is taken", address=address)
    raise Error.from_oserror(
        "Failed to find an available port", in_use, hint=f"all of {port} to {address.to} are taken"
    )


def _endpoints(address: SocketAddressInet, found: Sequence[names.Found]) -> list[_Endpoint]:
    # An explicit "both" of all interfaces is one dual-stack socket, otherwise each family has its own.
    dual = address.ipv4 and address.ipv6 and not address.host
    only_v6 = names.family(address) == socket.AF_INET6
    has_v4 = any(info[0] == socket.AF_INET for info in found)
    endpoints: dict[_Endpoint, None] = {}
    for family, _, _, _, where in found:
        if family == socket.AF_INET6:
            v6only = only_v6 or (has_v4 and not dual)
            endpoint = _Endpoint(family, (str(where[0]), *where[2:]), v6only)
        else:
            endpoint = _Endpoint(family, (where[0], 0, 0), v6only=False)
        if not (dual and family == socket.AF_INET):
            endpoints[endpoint] = None  # a dict, since names may resolve to the same address twice
    return list(endpoints)


def _candidates(address: SocketAddressInet, port: int) -> Sequence[int]:
    if address.to is None or port == 0:
        return (0,) * EPHEMERAL_ATTEMPTS if port == 0 else (port,)
    if not port <= address.to <= names.MAX_PORT:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Port range {port} to {address.to} is empty",
            hint=f"'to' is the last port to try, from {port} to {names.MAX_PORT}",
        )
    return range(port, address.to + 1)


def _bind_all(endpoints: list[_Endpoint], port: int, protocol: int, backlog: int) -> tuple[socket.socket, ...]:
    """Listen on every endpoint this host has, all on the same port; with 0 the first decides."""
    absent: OSError | None = None
    with contextlib.ExitStack() as on_failure:
        sockets: list[socket.socket] = []
        for endpoint in endpoints:
            try:
                sock = _bind(endpoint, port, protocol)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
                continue
            sockets.append(on_failure.enter_context(sock))
            sock.listen(backlog)
            port = port or sock.getsockname()[1]
        if not sockets:
            assert absent is not None
            raise absent
        on_failure.pop_all()
        return tuple(sockets)


def _bind(endpoint: _Endpoint, port: int, protocol: int) -> socket.socket:
    sock = socket.socket(endpoint.family, socket.SOCK_STREAM, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.v6only)
        sock.bind(endpoint.at(port))
    except BaseException:
        sock.close()
        raise
    return sock


# -- unix ----------------------------------------------------------------------------------------------------


def _unix_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _listen_abstract(address: SocketAddressUnix, backlog: int) -> Listener:
    name = names.abstract_name(address)
    sock = _unix_socket()
    try:
        sock.bind(name)  # an empty name lets the kernel choose one
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise Error.from_oserror(f"Failed to bind socket to {address.path}", error) from error
    return Listener((sock,))


async def _listen_unix(path: str, backlog: int) -> Listener:
    if not path:
        path = os.path.join(tempfile.gettempdir(), f"blkferry-socket-{secrets.token_hex(8)}")
    name = names.unix_path(path)
    absolute = os.path.abspath(name)
    sock = _unix_socket()
    file = None
    try:
        try:
            sock.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            await _remove_dead(name, path)
            sock.bind(name)
        file = _SocketFile(absolute, _identity(os.lstat(absolute)))
        sock.listen(backlog)
    except BaseException as error:
        if file:
            file.unlink()
        sock.close()
        if isinstance(error, OSError):
            raise Error.from_oserror(f"Failed to bind socket to {path}", error) from error
        raise
    return Listener((sock,), file)


async def _remove_dead(name: bytes, path: str) -> None:
    """Remove the socket at `name` if nobody listens on it; raise Error(EXISTS or BUSY) otherwise."""
    try:
        found = os.lstat(name)
    except FileNotFoundError:
        return  # it went by itself
    if not stat.S_ISSOCK(found.st_mode):
        raise Error(
            ErrorKind.EXISTS,
            f"Failed to bind socket to {path}: it exists and is not a socket",
            hint="choose another path, or remove what is there",
        )
    if _is_dead(name):
        await asyncio.sleep(PROBE_PAUSE_S)
        if _is_dead(name) and _identity(os.lstat(name)) == _identity(found):
            os.unlink(name)
            return
    raise Error(
        ErrorKind.BUSY,
        f"Failed to bind socket to {path}: another process listens there",
        hint="choose another path, or stop that process",
    )


def _is_dead(name: bytes) -> bool:
    with _unix_socket() as probe:
        return probe.connect_ex(name) == errno.ECONNREFUSED


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


# -- vsock ---------------------------------------------------------------------------------------------------


def _listen_vsock(address: SocketAddressVsock, backlog: int) -> Listener:
    where = names.vsock_numbers(address)
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise Error.from_oserror("Failed to create socket", error, hint="this kernel has no vsock") from error
    try:
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        hint = f"asked for {address.cid}:{address.port}; the cid {names.MAX_UINT32} stands for whichever is ours"
        raise Error.from_oserror("Failed to bind socket", error, hint=hint) from error
    return Listener((sock,))


# -- inherited -----------------------------------------------------------------------------------------------


def _listen_inherited(text: str, backlog: int) -> Listener:
    def check(sock: socket.socket) -> None:
        try:
            sock.listen(backlog)
        except OSError as error:
            hint = "a socket that is connected cannot; systemd passes such with Accept=yes"
            raise Error.from_oserror(f"Failed to listen on file descriptor '{text}'", error, hint=hint) from error

    return Listener(tuple(descriptors.take(text, check)))
