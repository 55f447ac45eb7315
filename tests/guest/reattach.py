"""Attach an NBD export to the kernel, and again whenever its server has gone: what nbd-client cannot do.

    python3 reattach.py ADDRESS PORT EXPORT INDEX CONNECTIONS

It runs in the guest, on any Python. With CONNECTIONS sockets it makes /dev/nbdINDEX, says "attached", and gives the
kernel new sockets as soon as the server answers again, which it says too. Until then the kernel keeps its requests:
those without an answer for REQUEST_SECONDS, before it sends them again, and all for at most DEAD_SECONDS. The sockets
are the kernel's; this program has them only to hear that they end, so it may be killed before the device is detached.

The messages are those of Linux include/uapi/linux/nbd-netlink.h and genetlink.h, the handshake is that of the NBD
protocol, doc/proto.md, "Newstyle negotiation" with NBD_OPT_EXPORT_NAME.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time

REQUEST_SECONDS = 5
DEAD_SECONDS = 60

NETLINK_GENERIC = 16
NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 1, 4, 2
GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2
CMD_CONNECT, CMD_RECONFIGURE = 1, 3
INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, TIMEOUT, SERVER_FLAGS, SOCKETS, DEAD_CONN_TIMEOUT = 1, 2, 3, 4, 5, 7, 8
SOCK_ITEM, SOCK_FD = 1, 1
NLA_F_NESTED = 1 << 15


def attribute(number: int, value: bytes) -> bytes:
    """An attribute of a netlink message."""
    head = struct.pack("=HH", 4 + len(value), number)
    return head + value + bytes(-len(value) % 4)


def nested(number: int, *attributes: bytes) -> bytes:
    return attribute(number | NLA_F_NESTED, b"".join(attributes))


class Netlink:
    """The kernel's NBD driver, as it can be spoken to. Raises OSError for what it refuses."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        answer = self._ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
        self._family = struct.unpack("=H", find(answer, CTRL_ATTR_FAMILY_ID))[0]

    def command(self, number: int, *attributes: bytes) -> None:
        self._ask(self._family, number, *attributes)

    def _ask(self, family: int, command: int, *attributes: bytes) -> bytes:
        """Return the attributes of the answer, if there is more to it than a yes."""
        body = struct.pack("=BBH", command, 1, 0) + b"".join(attributes)
        self._socket.send(struct.pack("=IHHII", 16 + len(body), family, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body)
        answer = b""
        while True:
            received = self._socket.recv(1 << 16)
            while received:
                length, kind = struct.unpack_from("=IH", received)
                if kind == NLMSG_ERROR:
                    (error,) = struct.unpack_from("=i", received, 16)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return answer
                answer, received = received[20:length], received[length + -length % 4 :]


def find(attributes: bytes, wanted: int) -> bytes:
    while attributes:
        length, number = struct.unpack_from("=HH", attributes)
        if number == wanted:
            return attributes[4:length]
        attributes = attributes[length + -length % 4 :]
    raise LookupError(wanted)


def negotiate(address: str, port: int, export: str) -> tuple[socket.socket, int, int]:
    """Return a socket in transmission, the export's size in bytes and its flags. Raises OSError, or EOFError."""
    connection = socket.create_connection((address, port), timeout=10)
    receive(connection, 18)  # NBDMAGIC, IHAVEOPT, flags
    name = export.encode()
    fixed_newstyle, no_zeroes, export_name = 1, 2, 1
    connection.sendall(struct.pack(">I8sII", fixed_newstyle | no_zeroes, b"IHAVEOPT", export_name, len(name)) + name)
    size, flags = struct.unpack(">QH", receive(connection, 10))
    connection.settimeout(None)
    return connection, size, flags


def receive(connection: socket.socket, length: int) -> bytes:
    received = connection.recv(length, socket.MSG_WAITALL)
    if len(received) < length:
        raise EOFError
    return received


def give(kernel: Netlink, command: int, index: int, sockets: list[socket.socket], *others: bytes) -> None:
    items = [nested(SOCK_ITEM, attribute(SOCK_FD, struct.pack("=I", each.fileno()))) for each in sockets]
    kernel.command(command, attribute(INDEX, struct.pack("=I", index)), *others, nested(SOCKETS, *items))


def all_ended(sockets: list[socket.socket]) -> None:
    """Wait until the other side of each has gone."""
    for each in sockets:
        poll = select.poll()
        poll.register(each, select.POLLRDHUP)
        poll.poll()
        each.close()


def main(address: str, port: str, export: str, index: str, connections: str) -> None:
    kernel = Netlink()
    opened = [negotiate(address, int(port), export) for _ in range(int(connections))]
    sockets = [connection for connection, _, _ in opened]
    _, size, flags = opened[0]
    others = [
        attribute(SIZE_BYTES, struct.pack("=Q", size)),
        attribute(BLOCK_SIZE_BYTES, struct.pack("=Q", 512)),
        attribute(TIMEOUT, struct.pack("=Q", REQUEST_SECONDS)),
        attribute(SERVER_FLAGS, struct.pack("=Q", flags)),
        attribute(DEAD_CONN_TIMEOUT, struct.pack("=Q", DEAD_SECONDS)),
    ]
    give(kernel, CMD_CONNECT, int(index), sockets, *others)
    print("attached", flush=True)
    while True:
        all_ended(sockets)
        time.sleep(0.2)  # until the kernel has seen it too
        sockets = []
        while len(sockets) < int(connections):
            with contextlib.suppress(OSError, EOFError):
                sockets.append(negotiate(address, int(port), export)[0])
                continue
            time.sleep(0.1)
        give(kernel, CMD_RECONFIGURE, int(index), sockets)
        print("attached again", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
