"""What only a process of its own can show: sudden death, refused system calls, limits, memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource

import pytest
from process import Process
from serving import SIZE, eventually
from test_model import Run

from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, Errno, Mode
from blkferry.wire.nbd.transmission import Request

MiB = 1 << 20


def exporting(path, **options):
    node = {"driver": "file", "node-name": "f", "filename": str(path), "discard": "unmap"} | options
    export = {"type": "nbd", "id": "e", "node-name": "f", "name": "", "writable": True}
    return ("blockdev-add", node), ("block-export-add", export)


@pytest.fixture
def image_path(tmp_path):
    path = tmp_path / "f.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("direct", [False, True])
def test_io_uring_refused_as_in_a_container(sockets, image_path, direct):
    commands = exporting(image_path, cache={"direct": direct})
    with Process(str(sockets / "s"), *commands, REFUSE_IO_URING="1") as daemon:
        assert daemon.said == ["ready", "threads"]
        clients = [Client.connect(daemon.socket, mode=mode) for mode in (Mode.EXTENDED, Mode.SIMPLE)]
        Run(clients, random.Random(11)).go(600)
        for client in clients:
            client.flush()
            client.close()
        assert daemon.stop() == 0


def test_io_uring_is_used_where_it_is_allowed(sockets, image_path):
    with Process(str(sockets / "s"), *exporting(image_path)) as daemon:
        if daemon.said == ["ready", "threads"]:
            pytest.skip("this kernel refuses io_uring")
        assert daemon.said == ["ready", "io_uring"]


@pytest.mark.parametrize("direct", [False, True])
def test_sudden_death_loses_nothing_that_was_answered(sockets, image_path, direct):
    commands = exporting(image_path, cache={"direct": direct})
    rng = random.Random(2)
    with Process(str(sockets / "s"), *commands) as daemon, Client.connect(daemon.socket) as client:
        answered = {}
        for n in range(64):
            answered[client.submit(Cmd.WRITE, n * 4096, 4096, 0, rng.randbytes(4096))] = n
        for _ in range(64):
            client.wait_any()
        content = client.read(0, 64 * 4096)
        client.flush()
        for n in range(64, 128):
            client.submit(Cmd.WRITE, n * 4096, 4096, 0, b"\xff" * 4096)
        client.push()
        daemon.kill()
        with pytest.raises(ConnectionEnded):
            while True:
                client.wait_any()
    assert image_path.read_bytes()[: 64 * 4096] == content
    with Process(str(sockets / "s2"), *exporting(image_path)) as again, Client.connect(again.socket) as client:
        assert client.read(0, 64 * 4096) == content  # and the locks died with the process


@pytest.mark.parametrize("mode", Mode)
def test_a_size_limit_fails_writes_and_nothing_else(sockets, image_path, mode):
    with Process(str(sockets / "s"), *exporting(image_path)) as daemon:
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (SIZE // 2 + 100, hard))
        with Client.connect(daemon.socket, mode=mode) as client:
            for length in (512, 4096, 200_000):
                half = SIZE // 2
                assert client.call(Cmd.WRITE, half + 4096, length, 0, b"x" * length).error == Errno.ENOSPC
                assert client.call(Cmd.WRITE, half + 4096, length, 1, b"x" * length).error == Errno.ENOSPC
                assert client.call(Cmd.WRITE, half, length, 0, b"x" * length).error == Errno.ENOSPC  # in its middle
                client.write(1000, b"y" * length)
                assert client.read(1000, length) == b"y" * length
            client.flush()
        assert daemon.stop() == 0


def test_memory_stays_bounded_when_nobody_takes_replies(sockets, image_path):
    os.truncate(image_path, 64 * MiB)
    with Process(str(sockets / "s"), *exporting(image_path)) as daemon:
        with Client.connect(daemon.socket, mode=Mode.SIMPLE) as client:
            client.write(0, os.urandom(32 * MiB))
            client.read(0, 32 * MiB)
            client.disconnect()
        before, files = daemon.resident(), daemon.files()
        greedy = [Client.connect(daemon.socket, mode=Mode.SIMPLE) for _ in range(8)]
        asking = b"".join(Request(0, Cmd.READ, n, 0, 32_000 + n % 3 * 100_000).build(Mode.SIMPLE) for n in range(9000))
        for client in greedy:
            with contextlib.suppress(BlockingIOError):
                client.sock.send(asking)
        with Client.connect(daemon.socket) as other:
            for _ in range(50):
                assert len(other.read(0, 100_000)) == 100_000
        assert daemon.resident() - before < len(greedy) * 16 * MiB
        for client in greedy:
            client.close()
        eventually(lambda: daemon.files() <= files)
        assert daemon.stop() == 0


def test_out_of_descriptors(sockets, image_path):
    """Clients that find no descriptor wait in the kernel; those who are served do not notice."""
    with Process(str(sockets / "s"), *exporting(image_path)) as daemon:
        with Client.connect(daemon.socket) as kept:
            limit = daemon.files() + 3
            _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, hard))
            some = [Client.open(daemon.socket) for _ in range(10)]
            kept.write(0, b"served")
            assert kept.read(0, 6) == b"served"
            for client in some[:8]:
                client.close()
            some[9].greet()
            some[9].go("")
            assert some[9].read(0, 6) == b"served"
            for client in some[8:]:
                client.close()
        assert daemon.stop() == 0
