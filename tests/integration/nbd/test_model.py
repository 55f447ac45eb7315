"""Random histories over two connections at once, compared byte for byte with a model of a disk.

Requests in flight at the same time do not overlap where one of them changes something: then the protocol leaves no
freedom, and every byte must be right. Completed requests overlap as they like. A discarded byte may read as it was or
as zero, but must stay what it was first read as.
"""

from __future__ import annotations

import os
import random

import pytest

from blkferry.plane import storage
from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client, Result
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode, StatusFlag

OPERATIONS = 900
IN_FLIGHT = 6  # per connection
LONGEST_BITS = 20
SIZE = (3 << 20) + 1000  # not a multiple of anything: the export ends with a sector that the file has only half of
CHANGING = {Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM}
MENU = (
    [(Cmd.READ, 0)] * 8
    + [(Cmd.READ, CmdFlag.DF), (Cmd.READ, CmdFlag.FUA)]
    + [(Cmd.WRITE, 0)] * 8
    + [(Cmd.WRITE, CmdFlag.FUA)]
    + [(Cmd.WRITE_ZEROES, flags) for flags in (0, CmdFlag.NO_HOLE, CmdFlag.FAST_ZERO, CmdFlag.FUA)]
    + [(Cmd.TRIM, 0), (Cmd.TRIM, CmdFlag.FUA), (Cmd.CACHE, 0), (Cmd.FLUSH, 0)]
    + [(Cmd.BLOCK_STATUS, 0), (Cmd.BLOCK_STATUS, CmdFlag.REQ_ONE)]
)


class Disk:
    """What must be on the disk. Where `unsure` is set the byte is the model's or zero."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = bytearray(size)
        self.unsure = bytearray(size)

    def settle(self, offset: int, data: bytes) -> None:
        """Learn from a reply what discarded bytes have become, then compare."""
        end = offset + len(data)
        if 1 in self.unsure[offset:end]:
            for at in range(offset, end):
                if self.unsure[at] and not data[at - offset]:
                    self.bytes[at] = 0
            self.unsure[offset:end] = bytes(len(data))
        want = self.bytes[offset:end]
        if want != data:
            first = next(i for i in range(len(data)) if want[i] != data[i])
            last = next(i for i in reversed(range(len(data))) if want[i] != data[i])
            raise AssertionError(
                f"bytes {offset + first} to {offset + last} differ: {bytes(want[first : first + 16]).hex()} became "
                f"{data[first : first + 16].hex()}"
            )

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data
        self.unsure[offset : offset + len(data)] = bytes(len(data))

    def apply(self, result: Result, payload: bytes) -> None:
        """The reply to a request has come."""
        flags, command, _, offset, length = result.request
        if command == Cmd.WRITE_ZEROES and flags & CmdFlag.FAST_ZERO and result.error == Errno.ENOTSUP:
            return
        assert result.error == 0, f"{result.request}: error {result.error} {result.text}"
        match command:
            case Cmd.READ:
                if flags & CmdFlag.DF:
                    assert len(result.chunks) == 1
                self.settle(offset, result.data)
            case Cmd.WRITE:
                self.write(offset, payload)
            case Cmd.WRITE_ZEROES:
                self.write(offset, bytes(length))
            case Cmd.TRIM:
                self.unsure[offset : offset + length] = b"\1" * length
            case Cmd.BLOCK_STATUS:
                (extents,) = result.status.values()
                assert 0 < sum(n for n, _ in extents) <= length
                assert not flags & CmdFlag.REQ_ONE or len(extents) == 1
                for extent_length, status in extents:
                    assert not status & StatusFlag.HOLE or status & StatusFlag.ZERO
                    if status & StatusFlag.ZERO:
                        self.settle(offset, bytes(extent_length))
                    offset += extent_length


class Run:
    """A random history over some connections."""

    def __init__(self, clients: list[Client], rng: random.Random) -> None:
        self.clients = clients
        self.rng = rng
        self.disk = Disk(clients[0].size)
        self.ranges: dict[tuple[int, int], tuple[int, int, bool]] = {}  # (client, cookie): start, end, changes
        self.payloads: dict[tuple[int, int], bytes] = {}

    def choose(self, mode: Mode) -> tuple[int, int, int, int]:
        rng = self.rng
        command, flags = rng.choice(MENU)
        if mode is Mode.SIMPLE and (command == Cmd.BLOCK_STATUS or flags & CmdFlag.DF):
            command, flags = Cmd.READ, 0
        if command == Cmd.FLUSH:
            return command, 0, 0, 0
        length = min(rng.randrange(1, 1 << rng.randrange(1, LONGEST_BITS + 1)), self.disk.size)
        offset = rng.randrange(self.disk.size - length + 1)
        unit = rng.choice((1, 1, 512, 4096))
        offset -= offset % unit
        if length > unit and rng.random() < 0.5:
            length -= length % unit
        if rng.random() < 0.1:
            offset = self.disk.size - length  # the odd tail
        return command, flags, offset, length

    def may_run(self, start: int, end: int, changes: bool) -> bool:
        return not any(s < end and start < e and (changes or c) for s, e, c in self.ranges.values())

    def submit_some(self, number: int) -> int:
        client, rng = self.clients[number], self.rng
        submitted = 0
        for _ in range(rng.randrange(1, IN_FLIGHT + 1)):
            if client.in_flight >= IN_FLIGHT:
                break
            command, flags, offset, length = self.choose(client.mode)
            changes = command in CHANGING
            if not self.may_run(offset, offset + length, changes):
                continue
            payload = rng.randbytes(length) if command == Cmd.WRITE else b""
            if payload and rng.random() < 0.05:
                payload = bytes(length)
            cookie = client.submit(command, offset, length, flags, payload)
            self.ranges[number, cookie] = (offset, offset + length, changes)
            self.payloads[number, cookie] = payload
            submitted += 1
            if rng.random() < 0.3:
                client.push()
        client.push()
        return submitted

    def take_one(self, number: int) -> None:
        result = self.clients[number].wait_any()
        key = (number, result.request.cookie)
        self.disk.apply(result, self.payloads.pop(key))
        del self.ranges[key]

    def go(self, operations: int) -> None:
        done = 0
        while done < operations:
            for number, client in enumerate(self.clients):
                done += self.submit_some(number)
                for _ in range(self.rng.randrange(client.in_flight + 1)):
                    self.take_one(number)
        for number, client in enumerate(self.clients):
            while client.in_flight or client._finished:
                self.take_one(number)
        for client in self.clients:
            self.disk.settle(0, client.read(0, self.disk.size, CmdFlag.FUA))


def play(daemon: DaemonThread, modes: tuple[Mode, Mode], seed: int, operations: int = OPERATIONS) -> Disk:
    clients = [daemon.client(mode=mode) for mode in modes]
    try:
        run = Run(clients, random.Random(seed))
        try:
            run.go(operations)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        return run.disk
    finally:
        for client in clients:
            client.close()


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("BLKFERRY_SEED", "0")) or random.randrange(1 << 30)


@pytest.mark.parametrize("kind", [*nodes.KINDS, *nodes.SHUFFLED])
def test_random_histories(kind, tmp_path, seed):
    with DaemonThread(engine="threads" if kind == "threads" else "auto") as daemon:
        place = nodes.add(daemon, kind, tmp_path, SIZE)
        daemon.export(place.node)
        for turn, mode in enumerate(Mode):
            disk = play(daemon, (mode, Mode.STRUCTURED), seed + turn)
            if place.path is not None:
                data = place.path.read_bytes()
                disk.settle(0, data[place.start : place.start + disk.size].ljust(disk.size, b"\0"))
                if kind.startswith("window"):
                    assert data[: place.start] == b"\xee" * place.start
                    assert data[place.start + disk.size :] == b"\xee" * nodes.WINDOW_AFTER
            with daemon.client() as client:
                client.zero(0, client.size)  # the next model begins with zeroes


@pytest.mark.parametrize("kind", ["direct", "window-direct"])
def test_random_histories_on_large_sectors(kind, tmp_path, seed, monkeypatch):
    """As if the disk had sectors of 4 KiB, which the window's start is not a multiple of."""
    monkeypatch.setattr(storage, "_direct_alignment", lambda fd, block: 4096)
    with DaemonThread() as daemon:
        place = nodes.add(daemon, kind, tmp_path, SIZE)
        daemon.export(place.node)
        with daemon.client() as client:
            assert client.block_size.minimum == 4096
        play(daemon, (Mode.EXTENDED, Mode.STRUCTURED), seed)


def test_short_requests_only(tmp_path, seed, monkeypatch):
    """Bytes and sectors of O_DIRECT: neighbours in one sector are read and written back all the time."""
    monkeypatch.setattr("test_model.LONGEST_BITS", 11)
    with DaemonThread() as daemon:
        daemon.export(nodes.add(daemon, "direct", tmp_path, 16 << 10).node)
        play(daemon, (Mode.EXTENDED, Mode.SIMPLE), seed, 3000)


@pytest.mark.parametrize("detect", ["on", "unmap"])
def test_with_zero_detection(detect, seed):
    with DaemonThread() as daemon:
        daemon.execute(
            "blockdev-add", driver="memory", node_name="m", size=1 << 20, detect_zeroes=detect, discard="unmap"
        )
        daemon.export("m")
        play(daemon, (Mode.EXTENDED, Mode.STRUCTURED), seed)
