"""What costs little where a remote disk is exported again, and what becomes of an export whose server is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import time

import pytest

import peers
from blkferry.drivers.nbd.node import Nbd
from blkferry.graph.root import Root
from blkferry.testing import fault
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode

pytestmark = peers.requires("nbdkit", "qemu-img")

SIZE = 4 << 20
CONTENT = random.Random(5).randbytes(SIZE)


@contextlib.contextmanager
def serving(socket, image, *options):
    """A server of others until the end of the block, however that comes."""
    argv = [*peers.peer("nbdkit"), "-f", "-U", str(socket), "file", str(image), *options]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            while not socket.exists():
                assert process.poll() is None, "nbdkit has ended"
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait()
            socket.unlink(missing_ok=True)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def gated():
    """Our own server of a disk in memory, which can be told what to let wait or fail; and the node that does."""
    with DaemonThread() as upstream:
        upstream.execute("blockdev-add", driver="memory", node_name="m", size=SIZE)

        async def insert() -> fault.Fault:
            return fault.insert(upstream.daemon.graph, "f", "m")

        node = upstream.call(insert)
        upstream.export("f")
        yield upstream, node


def add(daemon, socket, node="n", **options):
    server = {"type": "unix", "path": str(socket)}
    daemon.execute("blockdev-add", driver="nbd", node_name=node, server=server, **options)


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exports(daemon):
    return [each["id"] for each in daemon.execute("query-block-exports")]


def requests(daemon, export_id):
    """How many requests the only client of an export has made."""
    (export,) = [each for each in daemon.execute("query-block-exports") if each["id"] == export_id]
    return export["clients"][0]["requests"]


def never(*_: object) -> None:
    raise AssertionError("this takes a task for each request")


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("node", ["n", "raw", "overlay"])
def test_requests_of_one_piece_take_no_task(tmp_path, gated, monkeypatch, mode, node):
    upstream, _ = gated
    overlay = tmp_path / "overlay.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", overlay, str(SIZE))
    chance = random.Random(node)
    with upstream.client() as client:
        client.write(0, CONTENT)
    model = bytearray(CONTENT)
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        if node == "raw":
            daemon.execute("blockdev-add", driver="raw", node_name="raw", file="n", offset=512, size=SIZE - 512)
            del model[:512]
        elif node == "overlay":
            file = {"driver": "file", "filename": str(overlay)}
            daemon.execute("blockdev-add", driver="qcow2", node_name="overlay", file=file, backing="n")
        daemon.export(node)
        with daemon.client(mode=mode) as client:
            client.read(0, 512)
            for verb in ("read", "flush") if node == "overlay" else ("read", "write", "flush"):
                monkeypatch.setattr(Nbd, verb, never)
            for _ in range(20):
                asked = {}
                for _ in range(20):
                    length = chance.choice([1, 512, 4096, 32768])
                    at = chance.randrange(len(model) - length)
                    asked[client.submit(Cmd.READ, at, length)] = model[at : at + length]
                for cookie, wanted in asked.items():
                    assert client.wait(cookie).data == wanted
                if node != "overlay":
                    length = chance.choice([1, 512, 4096, 70_000])
                    at = chance.randrange(len(model) - length)
                    model[at : at + length] = data = chance.randbytes(length)
                    client.write(at, data)
                    client.flush()
            if mode is not Mode.EXTENDED or node == "n":
                wanted = model[: 1 << 20]
                assert client.read(0, 1 << 20, CmdFlag.DF if mode is not Mode.SIMPLE else 0) == wanted


@pytest.mark.parametrize("node", ["n", "raw"])
def test_bitmaps_hear_of_writes_that_take_no_task(gated, monkeypatch, node):
    upstream, _ = gated
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        daemon.execute("blockdev-add", driver="raw", node_name="raw", file="n")
        for each in ("n", "raw"):
            daemon.execute("block-dirty-bitmap-add", node=each, name="b", granularity=65536)
        daemon.export(node)
        monkeypatch.setattr(Nbd, "write", never)
        with daemon.client() as client:
            for at in (0, 1 << 20, (1 << 20) + 4096, 65536 - 2):
                client.write(at, b"data")
        counts = {
            each["node-name"]: each["dirty-bitmaps"][0]["count"]
            for each in daemon.execute("query-named-block-nodes")
            if "dirty-bitmaps" in each
        }
        assert counts == {"n": 3 * 65536, "raw": 3 * 65536 if node == "raw" else 0}


def test_what_must_be_durable_or_looked_at_is_not_begun_like_that(gated):
    """With FUA, writethrough and detect-zeroes there is more to a write than writing."""
    upstream, node = gated
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        add(daemon, upstream.socket, "z", detect_zeroes="on")
        daemon.export("n", "n", "n")
        daemon.export("n", "t", "t", writethrough=True)
        daemon.export("z", "z", "z")

        def called() -> list[str]:
            verbs = [each[0] for each in node.calls]
            node.calls.clear()
            return verbs

        called()
        with daemon.client("n") as client:
            client.write(0, b"plain")
            assert called() == ["write"]
            client.write(0, b"through", CmdFlag.FUA)
            assert called() == ["write", "flush"]
        with daemon.client("t") as client:
            client.write(0, b"through")
            assert called() == ["write", "flush"]
        with daemon.client("z") as client:
            client.write(0, bytes(4096))
            client.write(0, b"\1" * 4096)
            assert called() == ["remap", "write"]


def test_a_server_of_large_blocks(tmp_path, image, monkeypatch):
    """Whole blocks take no task; what changes a part of one loses nothing of what others write to it meanwhile."""
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    options = ["--filter=blocksize-policy", "--filter=delay", *policy, "blocksize-error-policy=error", "wdelay=2ms"]
    with serving(tmp_path / "s", image, *options), DaemonThread() as daemon:
        add(daemon, tmp_path / "s")
        daemon.export("n")
        with daemon.client() as client:
            for turn in range(1, 50):
                new, small = bytes([turn]) * 4096, b"small" * 10
                requests = [(8192, new), (8192 + 100, small), (8192 + 4096 - 20, small), (12288, new)]
                for cookie in [client.submit(Cmd.WRITE, at, len(data), 0, data) for at, data in requests]:
                    assert not client.wait(cookie).error
                both = client.read(8192, 8192)
                left = both[:100] + both[150:4076] + both[4126:]
                assert left == bytes([turn]) * len(left)
            monkeypatch.setattr(Nbd, "write", never)
            client.write(16384, b"w" * 8192)


@pytest.mark.parametrize("delay", [0, 20])
def test_requests_in_flight_when_the_server_is_lost(tmp_path, image, delay):
    socket = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(socket, image))
        daemon = stack.enter_context(DaemonThread())
        add(daemon, socket, reconnect_delay=delay)
        daemon.export("n")
        client = stack.enter_context(daemon.client())
        assert client.read(0, 512) == CONTENT[:512]
        first.send_signal(signal.SIGSTOP)
        reads = {client.submit(Cmd.READ, at, 4096): at for at in range(0, 1 << 20, 65536)}
        writes = {client.submit(Cmd.WRITE, at, 4096, 0, b"w" * 4096): at for at in range(2 << 20, 3 << 20, 65536)}
        flush = client.submit(Cmd.FLUSH)
        client.push()
        first.kill()
        first.wait()
        socket.unlink()
        if delay:
            stack.enter_context(serving(socket, image))
        for cookie, at in reads.items():
            result = client.wait(cookie)
            assert result.data == CONTENT[at : at + 4096] if delay else result.error == Errno.EIO
        for cookie in (*writes, flush):
            assert client.wait(cookie).error == (0 if delay else Errno.EIO)
        if delay:
            for at in writes.values():
                assert client.read(at, 4096) == b"w" * 4096


@pytest.mark.parametrize("how", ["block-export-del", "nbd-server-stop"])
@pytest.mark.parametrize("gone", [True, False], ids=["gone", "silent"])
@pytest.mark.parametrize("above", ["n", "overlay"])
def test_an_export_is_removed_although_it_waits_for_the_server(tmp_path, image, how, gone, above):
    """And those who use the same node by another one get their answer when there is a server again."""
    socket, path = tmp_path / "s", tmp_path / "overlay.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(socket, image))
        daemon = stack.enter_context(DaemonThread())
        add(daemon, socket, reconnect_delay=3600)
        file = {"driver": "file", "filename": str(path)}
        daemon.execute("blockdev-add", driver="qcow2", node_name="overlay", file=file, backing="n")
        daemon.export(above, "a", "a", writable=above == "overlay")
        address = {"type": "unix", "data": {"path": str(tmp_path / "other")}}
        daemon.execute("nbd-server-start", id="other", addr=address)
        daemon.execute("block-export-add", type="nbd", id="b", node_name="n", name="b", server="other")
        doomed = stack.enter_context(contextlib.closing(daemon.client("a")))
        other = stack.enter_context(Client.connect(str(tmp_path / "other"), "b"))
        assert doomed.read(0, 512) == other.read(0, 512) == CONTENT[:512]
        server.send_signal(signal.SIGKILL if gone else signal.SIGSTOP)
        if gone:
            server.wait()
            socket.unlink()
        for _ in range(3):
            doomed.submit(Cmd.READ, 4096, 4096)
        doomed.submit(Cmd.READ, 0, 1 << 20)
        doomed.submit(Cmd.BLOCK_STATUS, 0, 1 << 20)
        if above == "overlay":
            doomed.submit(Cmd.WRITE, 512, 512, 0, bytes(512))
        doomed.push()
        waiting = {other.submit(Cmd.READ, at, length): (at, length) for at, length in ((0, 4096), (0, 1 << 20))}
        other.push()
        eventually(lambda: requests(daemon, "b") == 3)
        if how == "nbd-server-stop":
            daemon.execute("nbd-server-stop")
        else:
            daemon.execute("block-export-del", id="a", mode="hard")
        eventually(lambda: exports(daemon) == ["b"])
        with pytest.raises((ConnectionEnded, OSError)):
            doomed.read(0, 512)
        if above == "overlay":
            daemon.execute("blockdev-del", node_name="overlay")
        if gone:
            stack.enter_context(serving(socket, image))
        else:
            server.send_signal(signal.SIGCONT)
        for cookie, (at, length) in waiting.items():
            assert other.wait(cookie).data == CONTENT[at : at + length]
        assert other.read(0, SIZE) == CONTENT


def test_what_was_given_up_is_over_before_others_write(gated):
    """A write that nobody waits for any more may still be done; it must not be done over what came later."""
    upstream, node = gated
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        daemon.export("n", "a", "a")
        daemon.export("n", "b", "b")
        gate = asyncio.Event()
        node.gates["write"] = gate
        with contextlib.closing(daemon.client("a")) as doomed, daemon.client("b") as other:
            doomed.submit(Cmd.WRITE, 0, 4096, 0, b"old." * 1024)
            doomed.push()
            eventually(lambda: "write" in [each[0] for each in node.calls])
            del node.gates["write"]
            daemon.execute("block-export-del", id="a", mode="hard")
            eventually(lambda: exports(daemon) == ["b"])
            written = [other.submit(Cmd.WRITE, at, 4096, 0, b"new." * 1024) for at in (0, 8192)]
            for _ in range(20):
                assert other.read(4096, 512) == bytes(512)
            assert [each[0] for each in node.calls].count("write") == 1
            upstream.loop.call_soon_threadsafe(gate.set)
            for cookie in written:
                assert not other.wait(cookie).error
            assert other.read(0, 4096) == b"new." * 1024


def test_the_node_moves_and_goes_although_a_server_still_owes_answers(gated):
    upstream, node = gated
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        daemon.export("n", "a", "a")
        daemon.execute("object-add", qom_type="iothread", id="io")
        for verb in ("read", "write"):
            node.gates[verb] = asyncio.Event()
        for turn in range(2):
            with contextlib.closing(daemon.client("a")) as doomed:
                before = len(node.calls)
                doomed.submit(Cmd.WRITE, 0, 4096, 0, b"old." * 1024)
                doomed.submit(Cmd.READ, 0, 4096)
                doomed.push()
                eventually(lambda before=before: len(node.calls) == before + 2)
                daemon.execute("block-export-del", id="a", mode="hard")
                eventually(lambda: not exports(daemon))
            if turn:
                break
            daemon.export("n", "a", "a", iothread="io")
        daemon.execute("blockdev-del", node_name="n")
        for gate in node.gates.values():
            upstream.loop.call_soon_threadsafe(gate.set)


def test_who_has_given_up_does_not_wait_anew(tmp_path, image):
    """Work of several steps goes on with the next one when one has failed."""
    socket = tmp_path / "s"
    with DaemonThread() as daemon:
        with serving(socket, image):
            add(daemon, socket, reconnect_delay=3600, read_only=True)

        async def ask() -> None:
            root = Root(daemon.daemon.graph.find("n"), "a user")
            root.give_up()
            view = memoryview(bytearray(512))
            for _ in range(3):
                with pytest.raises(OSError, match="given up"):
                    await root.read(0, view)
                assert not root.read_later(0, view, print)

        daemon.call(ask)


def test_a_cancelled_read_costs_nobody_the_connection(gated):
    """Its memory is left alone, and the answer is thrown away when it comes."""
    upstream, node = gated
    with upstream.client() as client:
        client.write(0, b"data" * 1024)
    with DaemonThread() as daemon:
        add(daemon, upstream.socket)
        daemon.export("n")
        view = memoryview(bytearray(4096))
        gate = node.gates["read"] = asyncio.Event()

        reading = asyncio.run_coroutine_threadsafe(
            Root(daemon.daemon.graph.find("n"), "a user").read(0, view), daemon.loop
        )
        eventually(lambda: ("read", 0, 4096) in node.calls)
        reading.cancel()
        del node.gates["read"]
        lines = daemon.daemon.graph.nodes["n"]._lines
        eventually(lambda: lines.forsaken.count == 1)
        with daemon.client() as client:
            assert client.read(0, 4096) == b"data" * 1024
            upstream.loop.call_soon_threadsafe(gate.set)
            eventually(lambda: not lines.forsaken.count)
            client.write(4096, b"more")
        assert not lines.all[0].connection.lost
        assert view == bytes(4096)
