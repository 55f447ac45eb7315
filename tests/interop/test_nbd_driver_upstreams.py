"""The nbd driver in front of our own server and the real daemon, of servers that fail or take their time, and while it
waits, moves, and goes away.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import threading
import time

import pytest
from served import daemon_of

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode

pytestmark = peers.requires("qemu-storage-daemon", "nbdkit")

SIZE = 4 << 20
CONTENT = random.Random(8).randbytes(SIZE)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@contextlib.contextmanager
def nbdkit(socket, image, *filters, **options):
    argv = [f"--filter={each}" for each in filters]
    argv += ["-f", "-U", str(socket), "file", str(image)] + [
        f"{key.replace('_', '-')}={value}" for key, value in options.items()
    ]
    with subprocess.Popen([*peers.peer("nbdkit"), *argv], stderr=subprocess.DEVNULL) as process:
        try:
            while not socket.exists():
                assert process.poll() is None, "nbdkit has ended"
                time.sleep(0.02)
            yield process
        finally:
            process.kill()  # asked nicely it waits for its clients
            process.wait()
            socket.unlink(missing_ok=True)


def add(daemon, socket, **options):
    server = {"type": "unix", "path": str(socket)}
    daemon.execute(
        "blockdev-add", **{"driver": "nbd", "node-name": "n", "server": server, "discard": "unmap", **options}
    )


def remove(daemon, export_id):
    """Remove an export, and return when it has given up its node."""
    daemon.execute("block-export-del", id=export_id, mode="hard")
    while export_id in [each["id"] for each in daemon.execute("query-block-exports")]:
        time.sleep(0.005)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_random_history_through_two_daemons(tmp_path, image, whose, count):
    model = bytearray(CONTENT)
    chance = random.Random(whose)
    with daemon_of(whose, tmp_path) as upstream, DaemonThread() as daemon:
        file = {"driver": "file", "node_name": "f", "filename": str(image), "discard": "unmap"}
        upstream.execute("blockdev-add", **file)
        add(daemon, upstream.export("f", "disk", writable=True), export="disk", connections=count)
        daemon.export("n")
        with daemon.client(mode=Mode.STRUCTURED) as client:
            for _ in range(300):
                length = chance.choice([1, 512, 4096, 70_000])
                at = chance.randrange(SIZE - length)
                match chance.randrange(4):
                    case 0:
                        model[at : at + length] = data = chance.randbytes(length)
                        client.write(at, data, CmdFlag.FUA if length < 4096 else 0)
                    case 1:
                        model[at : at + length] = bytes(length)
                        client.zero(at, length)
                    case 2:
                        told = 0
                        for extent, flags in client.block_status(at, length)[0]:
                            assert not flags & 2 or not any(model[at + told : at + min(told + extent, length)])
                            told += extent
                    case _:
                        assert client.read(at, length) == model[at : at + length]
            client.flush()
            assert client.read(0, SIZE) == model
        remove(daemon, "e")
        daemon.execute("blockdev-del", node_name="n")
    assert image.read_bytes() == model


@pytest.mark.parametrize(("error", "told"), [("EIO", Errno.EIO), ("ENOSPC", Errno.ENOSPC), ("EPERM", Errno.EPERM)])
def test_errors_of_the_server_are_those_of_the_requests(tmp_path, image, error, told):
    socket, trigger = tmp_path / "s", tmp_path / "trigger"
    with nbdkit(socket, image, "error", error=error, error_rate="100%", error_file=trigger), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n")
        with daemon.client() as client:
            assert client.read(0, 4096) == CONTENT[:4096]
            trigger.touch()
            for command in (Cmd.READ, Cmd.WRITE, Cmd.WRITE_ZEROES):
                payload = bytes(4096) if command == Cmd.WRITE else b""
                assert client.call(command, 0, 4096, payload=payload).error == told
            trigger.unlink()
            assert client.read(0, SIZE) == CONTENT


def test_some_requests_fail_and_the_others_do_not_notice(tmp_path, image):
    socket = tmp_path / "s"
    with nbdkit(socket, image, "error", error_pread_rate="20%"), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n", writable=False)
        outcomes = set()
        with daemon.client() as client:
            asked = {client.submit(Cmd.READ, at, 4096): at for at in range(0, SIZE, 4096)}
            for cookie, at in asked.items():
                result = client.wait(cookie)
                outcomes.add(result.error)
                assert result.error or result.data == CONTENT[at : at + 4096]
        assert outcomes == {0, Errno.EIO}


def test_slow_answers_come_to_those_who_asked(tmp_path, image):
    """Reads take longer than writes, so that answers come in another order than requests."""
    socket = tmp_path / "s"
    with nbdkit(socket, image, "delay", rdelay="100ms"), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n")
        with daemon.client() as client:
            asked = {client.submit(Cmd.READ, at, 4096): at for at in range(0, 64 * 4096, 4096)}
            write = client.submit(Cmd.WRITE, SIZE - 4096, 4096, payload=b"w" * 4096)
            assert not client.wait(write).error
            for cookie, at in asked.items():
                assert client.wait(cookie).data == CONTENT[at : at + 4096]
            assert client.read(SIZE - 4096, 4096) == b"w" * 4096


def test_trim_cache_and_fast_zeroes_reach_the_server(tmp_path, image):
    socket, log = tmp_path / "s", tmp_path / "log"
    with nbdkit(socket, image, "log", logfile=log), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n")
        with daemon.client() as client:
            client.trim(65536, 131_072)
            assert not client.call(Cmd.CACHE, 4096, 8192).error
            client.zero(1 << 20, 65536, CmdFlag.NO_HOLE)
            client.zero(2 << 20, 65536)
            fast = client.call(Cmd.WRITE_ZEROES, 3 << 20, 4096, CmdFlag.FAST_ZERO).error
            assert client.read(1 << 20, 65536) == client.read(2 << 20, 65536) == bytes(65536)
            assert client.read(3 << 20, 4096) == (CONTENT[3 << 20 :][:4096] if fast else bytes(4096))
            client.flush()
        remove(daemon, "e")
    said = log.read_text()
    assert re.search(r" Trim .*offset=0x10000 count=0x20000", said)
    assert re.search(r" Cache .*offset=0x1000 count=0x2000", said)
    assert re.search(r" Zero .*offset=0x100000 count=0x10000 trim=0", said)
    assert re.search(r" Zero .*offset=0x200000 count=0x10000 trim=1", said)
    assert re.search(r" Flush ", said)
    assert fast in (0, Errno.ENOTSUP)
    assert bool(re.search(r" Zero .*offset=0x300000 .*fast=1", said)) != bool(fast)


@pytest.mark.parametrize("count", [1, 3])
def test_it_moves_to_other_threads_under_traffic(tmp_path, image, count):
    socket = tmp_path / "s"
    wrong: list[int] = []
    rounds = 0
    done = threading.Event()
    with nbdkit(socket, image), DaemonThread() as daemon:
        add(daemon, socket, connections=count)
        daemon.export("n", "a", "a", writable=False)
        for name in ("io1", "io2"):
            daemon.execute("object-add", qom_type="iothread", id=name)

        def load() -> None:
            nonlocal rounds
            chance = random.Random(9)
            with daemon.client("a") as client:
                while not done.is_set():
                    asked = {client.submit(Cmd.READ, at, 4096): at for at in chance.choices(range(SIZE - 4096), k=32)}
                    wrong.extend(at for c, at in asked.items() if client.wait(c).data != CONTENT[at : at + 4096])
                    rounds += 1

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for turn in range(10):
                before = rounds
                while rounds == before and thread.is_alive():
                    time.sleep(0.005)
                name = f"io{turn % 2 + 1}"
                daemon.execute(
                    "block-export-add", type="nbd", id="b", node_name="n", name="b", iothread=name, writable=False
                )
                with daemon.client("b") as client:
                    assert client.read(0, SIZE) == CONTENT
                remove(daemon, "b")
        finally:
            done.set()
            thread.join()
        assert rounds >= 10
        assert not wrong


def test_it_goes_away_while_it_waits_for_the_server(tmp_path, image):
    socket = tmp_path / "s"
    with DaemonThread() as daemon:
        with nbdkit(socket, image):
            add(daemon, socket, **{"reconnect-delay": 2})
            daemon.export("n", writable=False)
            client = daemon.client()
            assert client.read(0, 512) == CONTENT[:512]
        with contextlib.closing(client):
            client.submit(Cmd.READ, 0, 4096)
            client.push()
            remove(daemon, "e")
            with pytest.raises((ConnectionEnded, OSError)):
                client.read(0, 512)
        daemon.execute("blockdev-del", node_name="n")
        assert not daemon.execute("query-named-block-nodes")


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "silent"])
def test_the_daemon_ends_although_requests_wait_for_the_server(tmp_path, image, gone):
    """Neither a server that is gone nor one that does not answer holds up the end: what waits for it fails."""
    socket = tmp_path / "s"
    with nbdkit(socket, image) as server:
        with DaemonThread() as daemon:
            add(daemon, socket, **{"reconnect-delay": 3600})
            daemon.export("n", writable=False)
            with contextlib.closing(daemon.client()) as client:
                assert client.read(0, 512) == CONTENT[:512]
                server.send_signal(signal.SIGKILL if gone else signal.SIGSTOP)
                client.submit(Cmd.READ, 0, 4096)
                client.push()
                time.sleep(0.2)
                daemon.stop()  # it raises when that takes too long
        server.send_signal(signal.SIGCONT)


def test_opening_waits_for_a_server_as_long_as_it_is_told(tmp_path, image):
    socket = tmp_path / "s"
    with DaemonThread() as daemon:
        server = {"type": "unix", "path": str(socket)}
        opening = daemon.begin(
            "blockdev-add", **{"driver": "nbd", "node-name": "n", "server": server, "open-timeout": 3600}
        )
        assert not opening.done()
        with nbdkit(socket, image):
            opening.result(30)
            daemon.export("n", writable=False)
            with daemon.client() as client:
                assert client.read(0, SIZE) == CONTENT
            remove(daemon, "e")
            daemon.execute("blockdev-del", node_name="n")
        with pytest.raises(Error, match="No such file or directory"):
            add(daemon, socket, **{"open-timeout": 1})
