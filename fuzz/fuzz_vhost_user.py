"""Invariant: whatever a vhost-user front end does, it costs nobody but itself; no descriptor stays open.

    python fuzz/fuzz_vhost_user.py [seconds] [seed]

Real front ends' conversations (fuzz/corpus/vhost_user) and those of one that knows what it does are damaged: numbers
and addresses, the descriptors that come along (memory, events, files, sockets), lost, doubled and disordered messages,
and the rings themselves. After each, the daemon must serve an honest front end of the same export, or of another one,
and must not have met an error of its own. A failure prints the seed and the number of the session that reproduce it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import random
import socket
import struct
import sys
import tempfile
import time

from blkferry.testing.daemon import DaemonThread
from blkferry.testing.vhost_user import FEATURES, USER_START, FrontEnd
from blkferry.testing.virtio import GUEST_START, DriverMemory
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import PROTOCOL_FEATURES, Request
from blkferry.wire.vhost_user.messages import build
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import HEADER, Type

CORPUS = [
    [(int(fds), bytes.fromhex(data)) for fds, data in map(str.split, file.read_text().splitlines())]
    for file in sorted((pathlib.Path(__file__).parent / "corpus" / "vhost_user").glob("*.txt"))
]
SIZE = 1 << 20
MEMORY = 1 << 20
NUMBERS = [0, 1, 2, 7, 64, 255, 256, 1 << 15, 0x80008000, 1 << 30, 1 << 32, USER_START, GUEST_START, (1 << 64) - 1]
ANSWERS = 0.02
"""Seconds to wait for answers that may not come."""


class Things:
    """Descriptors of all kinds to send along."""

    def __init__(self, memory):
        self.memory = memory
        self.file = os.open(__file__, os.O_RDONLY)
        self.pipe = os.pipe()
        self.sockets = socket.socketpair()
        self.event = os.eventfd(0, os.EFD_NONBLOCK)

    def right(self, request):
        """What belongs to this message."""
        if request in {Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD}:
            return self.memory.fd
        return self.sockets[1].fileno() if request == Request.SET_BACKEND_REQ_FD else self.event

    def any(self, rng):
        return rng.choice([self.memory.fd, self.file, *self.pipe, self.sockets[1].fileno(), self.event])

    def close(self):
        for fd in (self.file, *self.pipe, self.event):
            os.close(fd)
        for sock in self.sockets:
            sock.close()


def honest(rng, memory):
    """The messages with which a ring is started, with our own memory."""
    features = FEATURES | (int(Feature.RING_PACKED) if rng.random() < 0.3 else 0)
    region = wire.MemoryRegion(memory.start, memory.size, USER_START, 0)
    where = [USER_START + offset for offset in (0, 0x4000, 0x2000)]
    base = 0x80008000 if features & Feature.RING_PACKED else 0
    messages = [
        (0, build(Request.SET_FEATURES, wire.U64(features | PROTOCOL_FEATURES | rng.choice([0, 0, 1 << 26])))),
        (1, build(Request.ADD_MEM_REG, wire.SingleRegion(region))),
        (0, build(Request.SET_VRING_NUM, wire.VringState(0, rng.choice([8, 64, 256])))),
        (0, build(Request.SET_VRING_BASE, wire.VringState(0, base))),
        (0, build(Request.SET_VRING_ADDR, wire.VringAddr(0, rng.randrange(2), *where, memory.start + 0x4000))),
        (1, build(Request.SET_VRING_CALL, wire.VringFd(0, has_fd=True))),
        (1, build(Request.SET_VRING_KICK, wire.VringFd(0, has_fd=True))),
        (0, build(Request.SET_VRING_ENABLE, wire.VringState(0, 1))),
    ]
    also = [
        (0, build(Request.GET_VRING_BASE, wire.VringState(0, 0))),
        (0, build(Request.RESET_DEVICE)),
        (0, build(Request.REM_MEM_REG, wire.SingleRegion(region))),
        (1, build(Request.SET_MEM_TABLE, wire.MemoryTable((region,)))),
        (0, build(Request.GET_INFLIGHT_FD, wire.Inflight(0, 0, rng.randrange(3), rng.choice([8, 64])))),
        (1, build(Request.SET_INFLIGHT_FD, wire.Inflight(rng.choice([MEMORY, 40000]), 0, 1, rng.choice([8, 64])))),
        (1, build(Request.SET_LOG_BASE, wire.Log(1 << 15, 0))),
        (0, build(Request.SET_CONFIG, wire.Config(32, 0, b"\1"))),
        (0, build(Request.GET_CONFIG, wire.Config(rng.randrange(100), 0, bytes(rng.randrange(100))))),
        (0, build(Request.SET_STATUS, wire.U64(rng.randrange(2)))),
    ]
    for message in rng.sample(also, rng.randrange(4)):
        messages.insert(rng.randrange(len(messages) + 1), message)
    return messages


def damaged(rng, messages):
    """Some of them changed, lost, doubled or moved."""
    messages = list(messages)
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        at = rng.randrange(len(messages))
        fds, data = messages[at]
        match rng.randrange(6):
            case 0:
                del messages[at]
                if not messages:
                    return [(fds, data)]
            case 1:
                messages.insert(rng.randrange(len(messages)), messages[at])
            case 2:
                messages[at] = max(0, fds + rng.choice([-1, 1, 7])), data
            case 3 if len(data) > 12:
                position = rng.randrange(12, len(data) - 3)
                messages[at] = fds, data[:position] + struct.pack("<I", rng.getrandbits(32)) + data[position + 4 :]
            case 4 if len(data) >= 20:
                position = rng.randrange(12, len(data) - 7, 4)
                messages[at] = fds, data[:position] + struct.pack("<Q", rng.choice(NUMBERS)) + data[position + 8 :]
            case _:
                position = rng.randrange(len(data))
                messages[at] = fds, data[:position] + rng.randbytes(1) + data[position + 1 :]
    return messages


def scribble(rng, memory):
    """Something in the rings: requests that make sense, and then whatever."""
    memory.view[:0x8000] = bytes(0x8000)
    memory.write(memory.start + 0x8000, HEADER.pack(rng.choice([*Type, 99]), 0, rng.randrange(SIZE // 512 + 10)))
    for index in range(8):
        address = memory.start + rng.choice([0x8000, 0x9000, MEMORY - 16, rng.randrange(1 << 62)])
        flags = rng.choice([1, 1, 1, 2, 3, 3, 4, rng.getrandbits(16)]) | rng.choice([0, 0x80])
        fields = address, rng.choice([16, 512, 1, 4096, 1 << 31]), flags, rng.randrange(9)
        struct.pack_into("<QIHH", memory.view, 16 * index, *fields)
    struct.pack_into(
        "<HH8H", memory.view, 0x2000, 0, rng.choice([1, 3, 8, 9, 999]), *(rng.randrange(10) for _ in range(8))
    )


def session(rng, path, things):
    """One front end's life."""
    with FrontEnd(path, memory=things.memory) as front:
        front.sock.settimeout(ANSWERS)
        messages = honest(rng, things.memory) if rng.random() < 0.7 else rng.choice(CORPUS)
        with contextlib.suppress(OSError):
            for fds, data in damaged(rng, messages):
                if rng.random() < 0.2:
                    scribble(rng, things.memory)
                    os.eventfd_write(things.event, 1)
                request = int.from_bytes(data[:4], "little")
                sent = [things.right(request) if rng.random() < 0.9 else things.any(rng) for _ in range(fds)]
                front.send_bytes(data, sent)
            front.sock.recv(4096)


def served(path):
    """Whether an honest front end is served."""
    with FrontEnd(path, memory=DriverMemory(MEMORY)) as front:
        vring = front.run()
        assert vring.run(Type.OUT, 1, b"x" * 512) == (0, b"")
        assert vring.run(Type.IN, 1, length=512) == (0, b"x" * 512)
        front.memory.close()


class Bugs(logging.Handler):
    """What the daemon says of errors of its own."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.records = []

    def emit(self, record):
        self.records.append(logging.Formatter().format(record))


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def main(seconds=10.0, seed=None):
    bugs = Bugs()
    logging.basicConfig(handlers=[bugs])
    seed = random.randrange(1 << 32) if seed is None else seed
    sessions = 0
    with tempfile.TemporaryDirectory(prefix="blkferry-") as directory, DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="disk", size=SIZE)
        paths = [f"{directory}/{number}" for number in range(2)]
        for number, path in enumerate(paths):
            options = {"id": f"e{number}", "addr": {"type": "unix", "path": path}, "writable": True}
            daemon.execute("block-export-add", type="vhost-user-blk", node_name="disk", num_queues=2, **options)
        served(paths[1])
        before = descriptors()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                rng = random.Random(f"{seed} {sessions}")
                things = Things(DriverMemory(MEMORY))
                session(rng, paths[0], things)
                things.memory.close()
                things.close()
                served(paths[sessions % 2])
                assert not bugs.records, bugs.records[0]
                sessions += 1
            while descriptors() > before:
                assert time.monotonic() < deadline + 10, f"{descriptors() - before} descriptors are left"
                time.sleep(0.01)
        except BaseException:
            sys.stderr.write(f"seed {seed}, session {sessions}\n")
            raise
    sys.stdout.write(f"seed {seed}: {sessions} front ends\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
