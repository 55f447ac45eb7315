"""The kernel's end of a FUSE device, for tests that ask what the real kernel never would.

A socket that keeps messages apart stands in for the device: one read, one request; one write, one reply. Messages of
more than some 200 KiB do not fit into it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any, NamedTuple, Self

from blkferry.exports.fuse.export import FuseExport
from blkferry.exports.fuse.mounting import Mount
from blkferry.graph.root import Root
from blkferry.schema.export import BlockExportOptionsFuse
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.fuse.constants import MAJOR, MINOR, ROOT_ID, Opcode
from blkferry.wire.fuse.replies import OUT_HEADER
from blkferry.wire.fuse.requests import IN_HEADER

TIMEOUT = 10.0
"""Seconds that a reply may take."""

_ALL_FLAGS = (1 << 32) - 1
_INIT = struct.Struct("=IIIII44x")


class Reply(NamedTuple):
    """`error` is an errno or 0; of a notification `unique` is 0 and `error` its code, negated."""

    unique: int
    error: int
    payload: bytes


class SimulatedMount(Mount):
    """Something mounted nowhere."""

    async def detach(self) -> None:
        """There is nothing to unmount."""


class Kernel:
    """Asks for what it is told to. Made by `mount`, and still to `agree`."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self._socket.settimeout(TIMEOUT)
        self.device = theirs.detach()
        self.export: FuseExport
        self._daemon: DaemonThread
        self._next = 2

    @classmethod
    def mount(cls, daemon: DaemonThread, node: str, **options: Any) -> Self:
        """Let a daemon export a node to a new kernel, which has agreed with it already."""
        kernel = cls()
        wanted = BlockExportOptionsFuse(id="e", node_name=node, mountpoint="nowhere", **{"writable": True} | options)

        async def add() -> FuseExport:
            def retired(start: int, end: int | None) -> None:
                export.retired(start, end)

            root = Root(daemon.daemon.graph.find(node), "a simulated kernel", retired)
            export = FuseExport(daemon.daemon, wanted, root)
            await root.attach(*FuseExport.permissions(wanted))
            serving = asyncio.ensure_future(export.serve(SimulatedMount(kernel.device, "nowhere", 0, True)))
            try:
                await asyncio.get_running_loop().run_in_executor(None, kernel.agree)
                await serving
            except BaseException:
                await root.detach()
                raise
            return export

        try:
            kernel.export = daemon.call(add)
        except BaseException:
            kernel._socket.close()
            raise
        kernel._daemon = daemon
        return kernel

    def agree(self, *, major: int = MAJOR, minor: int = MINOR) -> Reply:
        """Ask INIT, with all flags there are."""
        return self.ask(Opcode.INIT, _INIT.pack(major, minor, 1 << 17, _ALL_FLAGS, _ALL_FLAGS), nodeid=0)

    def send(self, opcode: int, body: bytes = b"", *, nodeid: int = ROOT_ID) -> int:
        """Send a request; returns its number."""
        unique, self._next = self._next, self._next + 2
        header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, nodeid, 0, 0, os.getpid(), 0, 0)
        self.send_message(header + body)
        return unique

    def send_message(self, message: bytes) -> None:
        """Send anything."""
        self._socket.send(message)

    def receive(self, timeout: float = TIMEOUT) -> Reply:
        """The next reply or notification. Raises TimeoutError."""
        self._socket.settimeout(timeout)
        message = self._socket.recv(2 << 20)
        length, error, unique = OUT_HEADER.unpack_from(message)
        assert length == len(message)
        return Reply(unique, -error, message[OUT_HEADER.size :])

    def ask(self, opcode: int, body: bytes = b"", *, nodeid: int = ROOT_ID) -> Reply:
        """Send a request and wait for its reply, which must be the next but for notifications."""
        unique = self.send(opcode, body, nodeid=nodeid)
        reply = self.receive()
        while not reply.unique:
            reply = self.receive()
        assert reply.unique == unique
        return reply

    def close(self) -> None:
        """End it from this side, as an unmount does, and let the node go."""

        async def stop() -> None:
            await self.export.stop()
            await self.export.root.detach()

        self._socket.close()
        self._daemon.call(stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
