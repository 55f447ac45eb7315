"""Invariant: whatever comes from the device, each request gets one reply, nothing escapes and nothing stays behind.

    python fuzz/fuzz_fuse.py [seconds] [seed]

Plays requests that are right, nearly right and not right at all against a whole daemon, and those that a real kernel
had (fuzz/corpus/fuse), whole and damaged. What is read must be what was written. A failure prints seed and requests.
"""

from __future__ import annotations

import logging
import os
import pathlib
import random
import resource
import struct
import sys
import time

from complaints import Complaints

from blkferry.testing.daemon import DaemonThread
from blkferry.testing.fuse import Kernel
from blkferry.wire.fuse.constants import ROOT_ID, UNANSWERED, Fattr, Opcode
from blkferry.wire.fuse.requests import IN_HEADER, READ_SIZE, ProtocolError, parse

CORPUS = pathlib.Path(__file__).parent / "corpus" / "fuse"
SIZE = 128 << 10
LARGEST_FILE = 192 << 10  # nothing that is asked for may fill memory, or not fit into a reply
NUMBERS = (0, 1, 2, 511, 512, 4096, 65536, SIZE - 1, SIZE, SIZE + 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
LONGEST = 1 << 15  # of the data of a WRITE here
TRANSFER, RANGE = struct.Struct("=QQIIQI4x"), struct.Struct("=QQQI4x")
SETATTR = struct.Struct("=I4xQQQQQQIIII4xII4x")
SILENT = {Opcode.DESTROY}
MAX_REQUESTS = 30


def message(opcode, unique, body=b"", nodeid=ROOT_ID, length=None):
    length = IN_HEADER.size + len(body) if length is None else length
    return IN_HEADER.pack(length, opcode, unique, nodeid, 0, 0, 1, 0, 0) + body


def any_number(rng):
    return rng.choice(NUMBERS) if rng.random() < 0.5 else rng.randrange(SIZE)


def any_message(rng, unique):
    """A request that may well be right."""
    offset, length = any_number(rng), rng.choice((0, 1, 512, 4096, 10_000, LONGEST))
    match rng.randrange(12):
        case 0 | 1 | 2:
            return message(Opcode.READ, unique, TRANSFER.pack(1, offset, length, 0, 0, 0))
        case 3 | 4 | 5:
            data = rng.randbytes(min(length, LONGEST))
            return message(Opcode.WRITE, unique, TRANSFER.pack(1, offset, length, 0, 0, 0) + data)
        case 6:
            mode = rng.choice((0, 1, 3, 16, 17))
            return message(Opcode.FALLOCATE, unique, RANGE.pack(1, offset, any_number(rng), mode))
        case 7:
            valid = rng.choice((Fattr.SIZE, Fattr.MODE, Fattr.UID, rng.randrange(1 << 12)))
            return message(Opcode.SETATTR, unique, SETATTR.pack(valid, 1, offset, *(0,) * 7, 0o600, 0, 0))
        case 8:
            whence = rng.choice((os.SEEK_DATA, os.SEEK_HOLE, 0, 9))
            return message(Opcode.LSEEK, unique, struct.pack("=QQI4x", 1, offset, whence))
        case 9:
            return message(Opcode.OPEN, unique, struct.pack("=II", rng.choice((0, 1, 2, 0o1002)), 0))
        case 10:
            return message(Opcode.INTERRUPT, unique, struct.pack("=Q", rng.randrange(2, unique + 2)))
        case _:
            opcode = rng.choice((*Opcode, 0, 7, 19, 99, 1 << 31))
            return message(opcode, unique, rng.randbytes(rng.choice((0, 8, 16, 24, 40, 88))), rng.choice((0, 1, 1, 2)))


def damaged(rng, data):
    damage = bytearray(data)
    match rng.randrange(5):
        case 0:
            damage[rng.randrange(len(damage))] ^= 1 << rng.randrange(8)
        case 1:
            damage[: rng.randrange(4)] = b""
        case 2:
            del damage[rng.randrange(1, len(damage) + 1) :]
        case 3:
            damage += rng.randbytes(rng.randrange(1, 100))
        case _:
            at = rng.randrange(0, max(len(damage) - 8, 1), 8)
            damage[at : at + 8] = struct.pack("=Q", rng.choice(NUMBERS))
    return bytes(damage)


def expected(data):
    """The number of the reply that a message must get, None if it gets none."""
    try:
        request = parse(memoryview(data))
    except ProtocolError as error:
        return error.unique or None
    return None if request.header.opcode in UNANSWERED or not request.header.unique else request.header.unique


def play(kernel, messages):
    """Send them all, one after the other, and take the replies that each of them must get before the next."""
    for data in messages:
        wanted = expected(data)
        kernel.send_message(data)
        if wanted is None:
            continue
        reply = kernel.receive()
        while not reply.unique:  # a notification
            reply = kernel.receive()
        assert reply.unique == wanted, f"request {wanted} was answered as {reply.unique}"
        assert 0 <= reply.error < 512
        if len(data) == READ_SIZE and data[4] == Opcode.READ and not reply.error:
            assert len(reply.payload) <= struct.unpack_from("=I", data, 56)[0]


def read_back(kernel, rng):
    """The session still does what it is there for."""
    offset, data = rng.randrange(0, SIZE - LONGEST), rng.randbytes(rng.randrange(1, LONGEST))
    size = struct.unpack_from("=Q", kernel.ask(Opcode.GETATTR, bytes(16)).payload, 24)[0]
    if size < SIZE:
        body = SETATTR.pack(Fattr.SIZE, 1, SIZE, *(0,) * 10)
        assert not kernel.ask(Opcode.SETATTR, body).error
    reply = kernel.ask(Opcode.WRITE, TRANSFER.pack(1, offset, len(data), 0, 0, 0) + data)
    assert not reply.error
    assert struct.unpack_from("=I", reply.payload)[0] == len(data)
    assert kernel.ask(Opcode.READ, TRANSFER.pack(1, offset, len(data), 0, 0, 0)).payload == data


def corpus():
    """What real kernels have asked, by file; without INIT, which we ask ourselves."""
    sessions = []
    for path in sorted(CORPUS.iterdir()):
        data, messages = path.read_bytes(), []
        while data:
            length = struct.unpack_from("=I", data)[0]
            messages.append(data[:length])
            data = data[length:]
        sessions.append(messages[1:])
    return sessions


def add_nodes(daemon):
    daemon.execute("blockdev-add", driver="memory", node_name="plain", size=SIZE, discard="unmap")
    daemon.execute("blockdev-add", driver="memory", node_name="below", size=SIZE)
    daemon.execute("blockdev-add", driver="raw", node_name="window", file="below", offset=512, size=SIZE - 1024)


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    rng = random.Random(seed)
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    logging.getLogger("blkferry").setLevel(logging.ERROR)
    deadline = time.monotonic() + seconds
    sessions = corpus()
    count = 0
    with DaemonThread() as daemon:
        add_nodes(daemon)
        while count < len(sessions) or time.monotonic() < deadline:
            options = {"writable": rng.random() < 0.9, "growable": rng.random() < 0.5}
            node = "plain" if rng.random() < 0.8 else "window"
            if count < len(sessions):
                messages = sessions[count]
                options["writable"] = True
            elif rng.random() < 0.3:
                messages = [damaged(rng, each) if rng.random() < 0.2 else each for each in rng.choice(sessions)]
            else:
                messages = [any_message(rng, 4 + number) for number in range(rng.randrange(1, MAX_REQUESTS))]
                messages = [damaged(rng, each) if rng.random() < 0.1 else each for each in messages]
            try:
                with Kernel.mount(daemon, node, **options) as kernel:
                    play(kernel, messages)
                    if options["writable"] and node == "plain":
                        read_back(kernel, rng)
                assert not daemon.daemon.services.buffers.used, "buffers are still in use"
                assert not complaints.texts, complaints.texts
            except BaseException:
                said = [each[:200].hex() for each in messages]
                sys.stderr.write(f"seed {seed}, session {count}, {node} {options}: {said}\n")
                raise
            count += 1
    sys.stdout.write(f"seed {seed}: {count} sessions\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
