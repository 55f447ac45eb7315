"""The nbd driver in front of other people's servers: what it reads and writes is what they hold."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from image_command import ours_json, qemu_io, theirs, theirs_json

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import Mode

pytestmark = peers.requires("qemu-nbd", "qemu-img", "nbdkit")

SIZE = 8 << 20
QEMU_NBD = ("qemu-nbd", "--persistent", "--shared=8", "-f", "raw")


@contextlib.contextmanager
def serving(socket: Path, program: str, *argv: str):
    """A server, from when its socket takes connections until the end of the block."""
    process = subprocess.Popen([*peers.peer(program), *argv])
    try:
        while not socket.exists():
            assert process.poll() is None, f"{program} has ended"
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        socket.unlink(missing_ok=True)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    data = bytearray(SIZE)
    data[1 << 20 : 2 << 20] = random.Random(1).randbytes(1 << 20)
    path.write_bytes(data)
    return path


def server_argv(kind: str, socket: Path, image: Path) -> list[str]:
    if kind == "qemu-nbd":
        return [*QEMU_NBD, "-k", str(socket), str(image)]
    filters = {
        "nbdkit": [],
        "nbdkit --no-sr": ["--no-sr"],
        "blocksize-policy": ["--filter=blocksize-policy"],
    }[kind]
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    options = [*policy, "blocksize-error-policy=error"] if kind == "blocksize-policy" else []
    return ["nbdkit", "-f", "-U", str(socket), *filters, "file", str(image), *options]


def add(daemon: DaemonThread, socket: Path, **options: object) -> None:
    daemon.execute(
        "blockdev-add",
        **{
            "driver": "nbd",
            "node-name": "n",
            "discard": "unmap",
            "server": {"type": "unix", "path": str(socket)},
            **options,
        },
    )


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "nbdkit --no-sr", "blocksize-policy"])
def test_a_random_history(tmp_path, image, kind):
    socket = tmp_path / "s"
    model = bytearray(image.read_bytes())
    chance = random.Random(kind)
    with serving(socket, *server_argv(kind, socket, image)), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n", writable=True)
        with daemon.client() as client:
            assert client.size == SIZE
            for _ in range(300):
                length = chance.choice([1, 512, 4096, 70_000, 300_000])
                at = chance.randrange(SIZE - length)
                match chance.randrange(4):
                    case 0:
                        data = chance.randbytes(length)
                        client.write(at, data)
                        model[at : at + length] = data
                    case 1:
                        client.zero(at, length)
                        model[at : at + length] = bytes(length)
                    case 2:
                        client.flush()
                    case _:
                        assert client.read(at, length) == model[at : at + length]
            client.flush()
            assert client.read(0, SIZE) == model
        daemon.execute("block-export-del", id="e", mode="hard")
    assert image.read_bytes() == model


def test_block_status_is_that_of_the_server(tmp_path, image):
    socket = tmp_path / "s"
    image.unlink()
    with open(image, "wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
    with serving(socket, *server_argv("qemu-nbd", socket, image)), DaemonThread() as daemon:
        add(daemon, socket, **{"read-only": True})
        daemon.export("n", writable=False)
        with daemon.client(mode=Mode.STRUCTURED) as client:
            assert client.block_status(0, SIZE) == {0: ((1 << 20, 3), (1 << 20, 0), (6 << 20, 3))}


def test_many_requests_are_answered_out_of_order(tmp_path, image):
    socket = tmp_path / "s"
    data = image.read_bytes()
    chance = random.Random(2)
    with serving(socket, *server_argv("nbdkit", socket, image)), DaemonThread() as daemon:
        add(daemon, socket)
        daemon.export("n", writable=False)
        with daemon.client() as client:
            asked = {client.submit(0, at, 4096): at for at in (chance.randrange(SIZE - 4096) for _ in range(2000))}
            for cookie, at in asked.items():
                assert client.wait(cookie).data == data[at : at + 4096]


def test_an_overlay_leaves_the_remote_disk_alone(tmp_path, image):
    socket, overlay = tmp_path / "s", tmp_path / "top.qcow2"
    data = image.read_bytes()
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", overlay, str(SIZE))
    with serving(socket, *server_argv("qemu-nbd", socket, image)), DaemonThread() as daemon:
        add(daemon, socket, **{"read-only": True})
        daemon.execute(
            "blockdev-add",
            **{
                "driver": "qcow2",
                "node-name": "top",
                "file": {"driver": "file", "filename": str(overlay)},
                "backing": "n",
            },
        )
        daemon.export("top", writable=True)
        with daemon.client() as client:
            client.write((1 << 20) + 100, b"changed")
            wanted = bytearray(data)
            wanted[(1 << 20) + 100 : (1 << 20) + 107] = b"changed"
            assert client.read(0, SIZE) == wanted
    assert image.read_bytes() == data


def test_requests_survive_a_server_that_is_killed(tmp_path, image):
    socket = tmp_path / "s"
    data = image.read_bytes()
    argv = server_argv("qemu-nbd", socket, image)
    wrong: list[int] = []
    done = threading.Event()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(socket, *argv))
        daemon = stack.enter_context(DaemonThread())
        add(daemon, socket, **{"reconnect-delay": 20})
        daemon.export("n", writable=False)
        count = 0

        def load() -> None:
            nonlocal count
            with daemon.client() as client:
                chance = random.Random(3)
                while not done.is_set():
                    asked = {client.submit(0, at, 4096): at for at in chance.choices(range(SIZE - 4096), k=32)}
                    wrong.extend(at for c, at in asked.items() if client.wait(c).data != data[at : at + 4096])
                    count += 1

        thread = threading.Thread(target=load)
        thread.start()
        while not count:
            time.sleep(0.01)
        first.kill()
        first.wait()
        socket.unlink(missing_ok=True)
        stack.enter_context(serving(socket, *argv))
        after = count
        while count < after + 3 and thread.is_alive():
            time.sleep(0.01)
        done.set()
        thread.join()
        assert count >= after + 3
        assert not wrong


def test_without_a_delay_requests_fail_at_once_and_later_ones_reconnect(tmp_path, image):
    socket = tmp_path / "s"
    argv = server_argv("qemu-nbd", socket, image)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(socket, *argv))
        daemon = stack.enter_context(DaemonThread())
        add(daemon, socket)
        daemon.export("n", writable=False)
        client = stack.enter_context(daemon.client())
        assert len(client.read(0, 512)) == 512
        first.kill()
        first.wait()
        socket.unlink(missing_ok=True)
        with pytest.raises(OSError, match="5"):
            client.read(0, 512)
        stack.enter_context(serving(socket, *argv))
        assert len(client.read(0, 512)) == 512


def test_refusals(tmp_path, image):
    socket = tmp_path / "s"
    with DaemonThread() as daemon:
        with pytest.raises(Error, match=r"Failed to connect to '.*/s': No such file or directory"):
            add(daemon, socket)
        with serving(socket, *QEMU_NBD, "-r", "-x", "there", "-k", str(socket), str(image)):
            with pytest.raises(Error, match="Requested export not available"):
                add(daemon, socket, export="elsewhere")
            with pytest.raises(Error, match="request on write denied without write permission"):
                add(daemon, socket, export="there")
            add(daemon, socket, export="there", **{"auto-read-only": True})


def test_a_server_behind_tcp(tmp_path, image):
    """Which address is taken is said by the same options as for listening."""
    with DaemonThread() as server, DaemonThread() as daemon:
        server.execute("blockdev-add", driver="file", node_name="n", filename=str(image))
        server.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
        server.execute("block-export-add", type="nbd", id="e", node_name="n", name="x")
        port = server.execute("query-nbd-servers")[0]["addresses"][0]["port"]

        def address(**options: object) -> dict[str, object]:
            return {"type": "inet", "host": "localhost", "port": port, **options}

        for options in ({"ipv6": True, "ipv4": False}, {"numeric": True}, {"ipv4": False, "ipv6": False}):
            with pytest.raises(Error, match=r"Connection refused|resol|Cannot disable|[Nn]ame"):
                add(daemon, tmp_path, server=address(**options), export="x", **{"read-only": True})
        add(daemon, tmp_path, server=address(**{"ipv4": True, "keep-alive": True}), export="x", **{"read-only": True})
        daemon.export("n", writable=False)
        with daemon.client() as client:
            assert client.read(0, SIZE) == image.read_bytes()


def test_a_uri_is_a_disk(tmp_path, image):
    socket = tmp_path / "s"
    with serving(socket, *server_argv("qemu-nbd", socket, image)), DaemonThread() as daemon:

        async def look() -> bytes:
            async with await daemon.daemon.open(f"nbd+unix:///?socket={socket}") as disk:
                return await disk.read(0, disk.size)

        assert daemon.call(look) == image.read_bytes()


def connections(socket: Path) -> int:
    """How many clients a server's socket has."""
    with open("/proc/net/unix") as table:
        return sum(line.split()[5] == "03" for line in table if line.rstrip().endswith(str(socket)))


@pytest.fixture
def layers(tmp_path):
    """A qcow2 image with a dirty bitmap `b`, and three layers."""
    for name, backing in (("a", ()), ("b", ("-b", "a", "-F", "qcow2")), ("c", ("-b", "b", "-F", "qcow2"))):
        theirs("create", "-q", "-f", "qcow2", *backing, tmp_path / name, *([] if backing else ["4M"]))
    qemu_io(tmp_path / "a", "write -P 1 0 1M")
    theirs("bitmap", "--add", tmp_path / "a", "b", "-g", 65536)
    qemu_io(tmp_path / "a", "write -P 2 1M 128k", "write -P 3 2M 64k")
    qemu_io(tmp_path / "b", "write -P 4 3M 128k")
    qemu_io(tmp_path / "c", "write -P 5 3M 64k")
    return tmp_path


@pytest.mark.parametrize("context", ["", "base:allocation", "qemu:dirty-bitmap:b", "qemu:allocation-depth"])
def test_a_map_by_any_context_is_the_one_qemu_makes(layers, context):
    socket = layers / "s"
    image, more = ("a", ["-B", "b"]) if "bitmap" in context else ("c", [])
    with serving(socket, "qemu-nbd", "-k", str(socket), "-t", "-e8", "-A", *more, "-f", "qcow2", str(layers / image)):
        where = f"driver=nbd,server.type=unix,server.path={socket}"
        where += f",x-dirty-bitmap={context}" if context else ""
        made = ours_json("map", "--image-opts", where)
        assert made == theirs_json("map", "--image-opts", where)
        assert len(made) > 2


def test_a_context_that_is_not_there(tmp_path, image):
    socket = tmp_path / "s"
    with serving(socket, *QEMU_NBD, "-k", str(socket), str(image)), DaemonThread() as daemon:
        for name in ("qemu:dirty-bitmap:b", "qemu:", "base:"):
            with pytest.raises(Error, match=f"requested x-dirty-bitmap {name} not found"):
                add(daemon, socket, **{"x-dirty-bitmap": name})
        with pytest.raises(Error, match="x-dirty-bitmap query too long to send to server"):
            add(daemon, socket, **{"x-dirty-bitmap": "x" * 4097})


@pytest.mark.parametrize(("argv", "count"), [(QEMU_NBD, 4), (("qemu-nbd", "--persistent", "-f", "raw"), 1)])
def test_several_connections_if_the_server_allows(tmp_path, image, argv, count):
    socket = tmp_path / "s"
    data = bytearray(image.read_bytes())
    chance = random.Random(6)
    with serving(socket, *argv, "-k", str(socket), str(image)), DaemonThread() as daemon:
        add(daemon, socket, connections=4)
        assert connections(socket) == count
        daemon.export("n", writable=True)
        with daemon.client() as client:
            for _ in range(20):  # reads see what was answered before, whichever connection they take
                places = [chance.randrange(SIZE // 4096) * 4096 for _ in range(64)]
                for at in places:
                    data[at : at + 4096] = chance.randbytes(4096)
                written = [client.submit(1, at, 4096, 0, bytes(data[at : at + 4096])) for at in set(places)]
                for cookie in written:
                    client.wait(cookie)
                asked = {client.submit(0, at, 4096): at for at in places}
                assert all(client.wait(cookie).data == data[at : at + 4096] for cookie, at in asked.items())
            client.flush()
        assert image.read_bytes() == data


def test_the_others_go_on_when_one_connection_ends(tmp_path, image):
    socket = tmp_path / "s"
    data = image.read_bytes()
    with serving(socket, *QEMU_NBD, "-k", str(socket), str(image)), DaemonThread() as daemon:
        add(daemon, socket, connections=3)
        daemon.export("n", writable=False)

        async def cut() -> None:
            (first, *_) = daemon.daemon.graph.nodes["n"]._lines.all
            first.connection.session.sock.shutdown(2)

        with daemon.client() as client:
            asked = {client.submit(0, at, 4096): at for at in range(0, SIZE, 4096)}
            client.push()
            daemon.call(cut)
            for cookie, at in asked.items():
                assert client.wait(cookie).data == data[at : at + 4096]
            deadline = time.monotonic() + 30
            while connections(socket) < 3:
                assert client.read(0, 512) == data[:512]
                assert time.monotonic() < deadline, "the lost connection has not been replaced"


@pytest.mark.parametrize("count", [0, 17])
def test_how_many_connections_there_may_be(tmp_path, count):
    with DaemonThread() as daemon, pytest.raises(Error, match="'connections' expects a number between 1 and 16"):
        add(daemon, tmp_path / "s", connections=count)
