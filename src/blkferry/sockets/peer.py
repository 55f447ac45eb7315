"""Who is at the other end of a connection."""

from __future__ import annotations

import os
import socket
import sys


def describe_peer(sock: socket.socket, address: object) -> str:
    """Who a peer is, for the log: an address, or the process at the other end of a unix socket."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = int.from_bytes(credentials[:4], sys.byteorder)
        return f"pid {pid}"
    if sock.family == socket.AF_VSOCK and isinstance(address, tuple):
        return f"vsock {address[0]}:{address[1]}"
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return os.fsdecode(address) if isinstance(address, bytes) else str(address)
