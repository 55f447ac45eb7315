"""A vhost-user front end for tests: it says what it is told to, and has the drivers of its rings.

What it sends need not make sense; `build` and `send_bytes` take anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeVar

from blkferry.testing.virtio import GUEST_START, BlockDriver, DriverMemory, Requester, ring_driver
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import PROTOCOL_FEATURES, HeaderFlag, ProtocolFeature, Request
from blkferry.wire.vhost_user.messages import HEADER, build
from blkferry.wire.vhost_user.payloads import Payload
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import Feature as Blk

Kind = TypeVar("Kind", wire.U64, wire.VringState, wire.Config, wire.Inflight)

USER_START = 0x7F00_0000_0000
"""Where the front end says that it has its memory."""

FEATURES = int(
    Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Blk.FLUSH | Blk.DISCARD | Blk.WRITE_ZEROES
)
PROTOCOL = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG | ProtocolFeature.CONFIGURE_MEM_SLOTS
TIMEOUT = 10.0


def user(guest_address: int) -> int:
    """The user address of what the guest has at another one."""
    return guest_address - GUEST_START + USER_START


class Vring(Requester):
    """One ring of the front end, with its descriptors, and requests over it."""

    def __init__(self, index: int, memory: DriverMemory, size: int, features: int) -> None:
        self.index = index
        self.ring = ring_driver(memory, size, features)
        self.block = BlockDriver(self.ring)
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class FrontEnd:
    """A connection to a back end; a context manager. `memory` is what `share` shares of it."""

    def __init__(self, path: str | Path, *, memory: DriverMemory | None = None) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(path))
        self.memory = memory or DriverMemory(16 << 20)
        self.features = 0
        self.vrings: list[Vring] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away, without a word."""
        self.sock.close()
        for vring in self.vrings:
            vring.close()
        self.vrings.clear()

    # Messages ------------------------------------------------------------------------------------------------------

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Anything at all."""
        socket.send_fds(self.sock, [data], fds)

    def send(
        self, request: Request, payload: Payload = None, fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> None:
        self.send_bytes(build(request, payload, need_reply=need_reply), fds)

    def receive(self, request: Request, kind: type[Kind]) -> tuple[Kind, list[int]]:
        """The reply to a request, and the descriptors with it."""
        head, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, 8)
        if len(head) < HEADER.size:
            raise ConnectionError("the back end has hung up")
        answered, flags, size = HEADER.unpack(head)
        if answered != request or not flags & HeaderFlag.REPLY:
            raise ConnectionError(f"{request.name} is answered by {answered} with flags {flags:#x}")
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError("the back end has hung up in the middle of a reply")
            data += part
        return kind.parse(data), list(fds)

    def ask(self, request: Request, kind: type[Kind], payload: Payload = None) -> Kind:
        """A request that is answered with a value."""
        self.send(request, payload)
        return self.receive(request, kind)[0]

    def tell(self, request: Request, payload: Payload = None, fds: Sequence[int] = ()) -> None:
        """A request that must succeed (REPLY_ACK)."""
        self.send(request, payload, fds, need_reply=True)
        result = self.receive(request, wire.U64)[0].value
        if result:
            raise ConnectionError(f"{request.name} failed with {result}")

    def hung_up(self) -> bool:
        """Whether the back end ends the connection, now or soon; what it still had to say is lost."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(4096):
                pass
        return True

    # What front ends do with them ------------------------------------------------------------------------------------

    def negotiate(self, features: int = FEATURES, protocol: ProtocolFeature = PROTOCOL) -> None:
        """Up to the point where memory is shared."""
        self.ask(Request.GET_FEATURES, wire.U64)
        self.ask(Request.GET_PROTOCOL_FEATURES, wire.U64)
        self.send(Request.SET_PROTOCOL_FEATURES, wire.U64(protocol))
        self.send(Request.SET_OWNER)
        self.features = features
        self.tell(Request.SET_FEATURES, wire.U64(features | PROTOCOL_FEATURES))

    def region(self) -> wire.MemoryRegion:
        """All of `memory`."""
        return wire.MemoryRegion(self.memory.start, self.memory.size, user(self.memory.start), 0)

    def share(self) -> None:
        """Let the back end have the memory."""
        self.tell(Request.SET_MEM_TABLE, wire.MemoryTable((self.region(),)), [self.memory.fd])

    def make_vring(self, index: int = 0, size: int = 64) -> Vring:
        """A ring that the back end knows nothing of yet."""
        vring = Vring(index, self.memory, size, self.features)
        self.vrings.append(vring)
        return vring

    def describe(self, vring: Vring, *, base: int | None = None, flags: int = 0) -> None:
        """Say where a ring is, and where in it to begin, which is its start by default."""
        ring = vring.ring
        if base is None:
            base = 0x8000_8000 if self.features & Feature.RING_PACKED else 0  # both wrap counters
        self.send(Request.SET_VRING_NUM, wire.VringState(vring.index, ring.size))
        self.send(Request.SET_VRING_BASE, wire.VringState(vring.index, base))
        where = wire.VringAddr(
            vring.index,
            flags,
            user(ring.descriptor_address),
            user(ring.device_address),
            user(ring.driver_address),
            ring.device_address,
        )
        self.tell(Request.SET_VRING_ADDR, where)

    def start(self, vring: Vring, *, base: int | None = None, flags: int = 0) -> None:
        """Have a ring served."""
        self.describe(vring, base=base, flags=flags)
        for request, fd in (
            (Request.SET_VRING_ERR, vring.err_fd),
            (Request.SET_VRING_CALL, vring.call_fd),
            (Request.SET_VRING_KICK, vring.kick_fd),
        ):
            self.send(request, wire.VringFd(vring.index, has_fd=True), [fd])
        self.tell(Request.SET_VRING_ENABLE, wire.VringState(vring.index, 1))

    def stop(self, vring: Vring) -> int:
        """Have a ring served no longer; where to go on."""
        return self.ask(Request.GET_VRING_BASE, wire.VringState, wire.VringState(vring.index, 0)).num

    def run(self, *, size: int = 64) -> Vring:
        """All of it, with one ring."""
        self.negotiate()
        self.share()
        vring = self.make_vring(size=size)
        self.start(vring)
        return vring
