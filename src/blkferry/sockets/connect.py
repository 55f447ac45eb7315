"""Connecting to a `SocketAddress`, without blocking the loop.

There is no time limit here: who cannot wait for the kernel's (minutes) uses `asyncio.timeout`; a cancelled
`connect` leaves no socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)
from blkferry.sockets import descriptors, names

BACKLOG_PAUSE_S = 0.02  # before asking again a unix socket whose backlog is full: the kernel would not tell


async def connect(address: SocketAddress) -> socket.socket:
    """Return a non-blocking stream socket that is connected to `address`, the caller's to close. Raises Error.

    All addresses of a host are tried, one after the other; a TCP socket sends at once what it is given.
    """
    match address:
        case SocketAddressInet():
            return await _connect_inet(address)
        case SocketAddressUnix():
            name = names.abstract_name(address) if address.abstract else names.unix_path(address.path)
            if not name:
                raise Error(ErrorKind.INVALID_ARGUMENT, "unix connect: no path specified")
            return await _connect(f"Failed to connect to '{address.path}'", socket.AF_UNIX, 0, name)
        case SocketAddressVsock():
            where = names.vsock_numbers(address)
            return await _connect(f"Failed to connect to '{address.cid}:{address.port}'", socket.AF_VSOCK, 0, where)
        case SocketAddressFd():
            return _connected(address.fd)
    raise Error(ErrorKind.UNSUPPORTED, f"Connecting to an address of type '{address.type}' is not supported")


async def _connect_inet(address: SocketAddressInet) -> socket.socket:
    if not address.host or not address.port:
        raise Error(ErrorKind.INVALID_ARGUMENT, "host and/or port not specified")
    found = await asyncio.to_thread(names.look_up, address, passive=False)
    doing = f"Failed to connect to '{address.host}:{address.port}'"
    failure: Error | None = None
    for family, _, _, _, where in found:
        protocol = socket.IPPROTO_MPTCP if address.mptcp else socket.IPPROTO_TCP
        try:
            sock = await _connect(doing, family, protocol, where)
        except Error as error:
            failure = error
            continue
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, address.keep_alive)
        except OSError as error:
            sock.close()
            raise Error.from_oserror(doing, error) from error
        return sock
    assert failure is not None
    raise failure


async def _connect(doing: str, family: socket.AddressFamily, protocol: int, where: Any) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    except OSError as error:
        raise Error.from_oserror(doing, error) from error
    try:
        sock.setblocking(False)
        code = sock.connect_ex(where)
        while code == errno.EAGAIN and family == socket.AF_UNIX:
            await asyncio.sleep(BACKLOG_PAUSE_S)
            code = sock.connect_ex(where)
        if code == errno.EINPROGRESS:
            await _writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise Error.from_oserror(doing, OSError(code, os.strerror(code)))
    except BaseException:
        sock.close()
        raise
    return sock


async def _writable(sock: socket.socket) -> None:
    """Wait for the kernel to have connected or given up."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock.fileno())


def _connected(text: str) -> socket.socket:
    def check(sock: socket.socket) -> None:
        try:
            sock.getpeername()
        except OSError as error:
            raise Error.from_oserror(f"File descriptor '{text}' is not connected", error) from error

    sock, *others = descriptors.take(text, check)
    for other in others:
        other.close()
    return sock
