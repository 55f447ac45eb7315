"""Exports whose bytes lie in many places, and move: what was looked up is used as long as it is true, and no longer."""

import itertools
import os
import socket
import time

import pytest
from serving import eventually

from blkferry.exports import places
from blkferry.plane import pace
from blkferry.testing import nodes, shuffled
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client
from blkferry.testing.shuffled import Kind
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Mode

CLUSTER = 1 << 16
SIZE = 64 * CLUSTER


def serve(daemon, directory, kinds, *, bits=16, length=SIZE, below=b""):
    """Export a shuffled node of such clusters, and return it; what is not `below` reads as zero."""
    layout = shuffled.Layout.make(length, bits, seed=3, kinds=kinds)
    (directory / "top").write_bytes(layout.empty_image())
    (directory / "below").write_bytes(below or bytes(512))
    for name in ("top", "below"):
        daemon.execute("blockdev-add", driver="file", node_name=name, filename=str(directory / name))

    async def insert():
        return shuffled.insert(daemon.daemon.graph, "n", layout, "top", "below")

    node = daemon.call(insert)
    daemon.export("n")
    return node


def pattern(number):
    return bytes([number + 1]) * CLUSTER


@pytest.fixture
def daemon():
    with DaemonThread() as running:
        yield running


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("kind", Kind)
def test_reads_see_the_writes_before_them_in_one_burst(daemon, tmp_path, monkeypatch, kind, mode):
    """Whatever moves in the middle of a turn, and whether it has been read from its old place or not."""
    monkeypatch.setattr(pace, "STALL_SECONDS", 60)  # or a slow machine's writes become tasks, which others may overtake
    serve(daemon, tmp_path, (kind, Kind.SHARED), below=b"b" * SIZE)
    with daemon.client(mode=mode) as client:
        for number in range(64):
            client.write(number * CLUSTER + 60000, pattern(number)[:512])
        for _ in range(3):  # so that there is something to send from the mapping
            data = bytearray(b"".join(client.read(at, CLUSTER) for at in range(0, SIZE, CLUSTER)))
        expected = []
        for number in range(200):
            at = number * 7 % 64 * CLUSTER + number * 512 % 32768
            before = at + 16384  # in the same cluster: what the write takes along
            expected.append((client.submit(Cmd.READ, before, 4096), bytes(data[before : before + 4096])))
            if number % 2:
                data[at : at + 512] = bytes([number]) * 512
                client.submit(Cmd.WRITE, at, 512, 0, bytes([number]) * 512)
            start = max(at - 1000, 0)
            expected.append((client.submit(Cmd.READ, start, 4096), bytes(data[start : start + 4096])))
        client.push()
        for cookie, want in expected:
            assert client.wait(cookie).data == want
        assert client.read(0, SIZE) == data


@pytest.mark.parametrize("length", [4096, 4 * CLUSTER])
def test_a_slow_client_never_reads_a_place_that_is_somebody_elses_now(daemon, tmp_path, length):
    node = serve(daemon, tmp_path, (Kind.PLAIN, Kind.SHARED))
    with daemon.client() as slow, daemon.client() as quick:
        for number in range(64):
            quick.write(number * CLUSTER, pattern(number))
        for _ in range(3):
            slow.read(0, SIZE)
        offsets = range(0, SIZE, length)
        cookies = [(offset, slow.submit(Cmd.READ, offset, length)) for offset in offsets for _ in range(2)]
        slow.push()
        time.sleep(0.1)  # some replies are in the socket, some wait for it, and some requests have not been seen
        for _ in range(3):
            quick.zero(0, SIZE)
            for number in range(64):
                quick.write(number * CLUSTER, pattern(number + 64))
        for offset, cookie in cookies:
            data = slow.wait(cookie).data
            for at in range(0, length, 512):
                number = (offset + at) // CLUSTER
                assert set(data[at : at + 512]) <= {0, number + 1, number + 65}
        eventually(lambda: node._storage.readers.count == 0)
        eventually(lambda: sorted(node.free + node.hosts) == list(range(node.file.length // CLUSTER)))
        assert quick.read(0, SIZE) == b"".join(pattern(number + 64) for number in range(64))


def test_what_is_in_the_socket_is_still_being_read(daemon, tmp_path):
    """sendfile does not copy: the client has yet to take the very pages of the file."""
    node = serve(daemon, tmp_path, (Kind.PLAIN,))
    with daemon.client() as slow, daemon.client() as quick:
        quick.write(0, pattern(5) * 64)
        for _ in range(3):
            slow.read(0, SIZE)
        eventually(lambda: node._storage.readers.count == 0)
        cookie = slow.submit(Cmd.READ, 0, CLUSTER)
        slow.push()
        eventually(lambda: node._storage.readers.count > 0)
        quick.zero(0, SIZE)
        time.sleep(0.05)
        assert slow.wait(cookie).data == pattern(5)
        eventually(lambda: node._storage.readers.count == 0)


def test_over_tcp_a_copy_is_sent(daemon, tmp_path):
    """There nobody can tell what the client has taken."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    daemon.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}})
    serve(daemon, tmp_path, (Kind.PLAIN,))
    address = ("127.0.0.1", port)
    with Client.connect(address) as slow, Client.connect(address) as quick:
        quick.write(0, pattern(5) * 64)
        for _ in range(3):
            slow.read(0, SIZE)
        cookies = [slow.submit(Cmd.READ, 0, SIZE) for _ in range(3)]
        slow.push()
        time.sleep(0.05)
        quick.zero(0, SIZE)
        for cookie in cookies:
            assert set(slow.wait(cookie).data) <= {0, 6}


def test_a_client_that_leaves_gives_back_what_it_was_lent(daemon, tmp_path):
    node = serve(daemon, tmp_path, (Kind.PLAIN,))
    with daemon.client() as slow:
        slow.write(0, b"a" * SIZE)
        slow.read(0, SIZE)
        for _ in range(10):
            slow.submit(Cmd.READ, 0, SIZE)
        slow.push()
        eventually(lambda: node._storage.readers.count > 0)
    eventually(lambda: node._storage.readers.count == 0)


@pytest.mark.parametrize(
    ("mode", "flags"), [(Mode.SIMPLE, 0), *itertools.product((Mode.STRUCTURED, Mode.EXTENDED), (0, CmdFlag.DF))]
)
@pytest.mark.parametrize("length", [512, 4096, 3 << 20])
def test_zeroes(daemon, tmp_path, mode, flags, length):
    serve(daemon, tmp_path, (Kind.ZERO,), length=6 << 20)
    with daemon.client(mode=mode) as client:
        client.write(1 << 20, b"x" * 10)
        for offset in (0, 300, (1 << 20) - 256):
            want = bytearray(length)
            if offset <= 1 << 20 < offset + length:
                want[(1 << 20) - offset : (1 << 20) - offset + 10] = b"x" * 10
            assert client.read(offset, length, flags) == want[:length]


def test_cold_reads_are_gathered(daemon, tmp_path):
    serve(daemon, tmp_path, (Kind.PLAIN, Kind.BELOW, Kind.ZERO), below=os.urandom(SIZE // 2))
    with daemon.client() as client:
        data = client.read(0, SIZE)
        client.flush()
        for name in ("top", "below"):
            with (tmp_path / name).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert client.read(0, 1 << 20) == data[: 1 << 20]
        assert client.read(CLUSTER - 2048, 4096) == data[CLUSTER - 2048 : CLUSTER + 2048]


def test_granules_get_smaller_where_clusters_are(daemon, tmp_path):
    serve(daemon, tmp_path, (Kind.PLAIN, Kind.ZERO), bits=12, length=16 << 20)
    with daemon.client() as client:
        for offset in range(0, 16 << 20, 4096):
            client.read(offset, 4096)
        export = daemon.daemon.exports.get("e")
        assert export.places.bits == places.SMALLEST_GRANULE_BITS
        assert not any(piece is places.NOWHERE for piece in export.places.granules.values())


def test_the_memory_of_places_is_bounded(daemon, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "MAX_GRANULES", 10)
    serve(daemon, tmp_path, (Kind.PLAIN, Kind.ZERO))
    with daemon.client() as client:
        for offset in range(0, SIZE, CLUSTER):
            client.read(offset, 512)
        assert len(daemon.daemon.exports.get("e").places.granules) <= 10 + places.AHEAD


def test_a_file_that_grows_is_mapped_anew(daemon, tmp_path):
    node = serve(daemon, tmp_path, (Kind.ZERO,), length=32 << 20)
    with daemon.client() as client:
        node.free.clear()
        client.write(0, b"a" * CLUSTER)
        client.read(0, 4096)
        before = node._storage.window().size
        for offset in range(0, 32 << 20, CLUSTER):
            client.write(offset, b"a" * CLUSTER)
        client.read(0, 4096)
        assert node._storage.window().size > before


def test_a_tree_moves_while_a_client_is_connected(daemon, tmp_path):
    nodes.add(daemon, "shuffled", tmp_path, SIZE)
    daemon.export("n", export_id="a", name="a")
    daemon.execute("object-add", qom_type="iothread", id="t")
    with daemon.client("a") as client:
        data = os.urandom(SIZE)
        client.write(0, data)
        assert client.read(0, SIZE) == data
        daemon.export("n", export_id="b", name="b", iothread="t")
        assert client.read(0, SIZE) == data
        client.write(1000, b"moved")
        with daemon.client("b") as other:
            assert other.read(1000, 5) == b"moved"
            other.zero(0, SIZE)
        assert client.read(0, SIZE) == bytes(SIZE)


def test_marking_dirty_bitmaps_drops_no_places(daemon, tmp_path):
    """Neither those of who writes nor those of other exports of the node; with several nodes that record, too."""
    (tmp_path / "raw").write_bytes(b"r" * SIZE)
    file = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "raw")}
    daemon.execute("blockdev-add", driver="raw", node_name="whole", file=file)
    serve(daemon, tmp_path, (Kind.PLAIN,))
    for node in ("n", "whole", "file"):
        daemon.execute("block-dirty-bitmap-add", node=node, name="b", granularity=4096)
    daemon.export("n", "n2", "n2")
    for name in ("w", "w2"):
        daemon.export("whole", name, name)
    exports = {each.name: each for each in daemon.daemon.nbd_server.exports}
    for name, other, nodes_of in (("", "n2", ("n",)), ("w", "w2", ("whole", "file"))):
        with daemon.client(name) as client, daemon.client(other) as another:
            for each in (client, another, client):  # the first loads what the node knows of places
                each.write(0, b"1" * 4096)
            known = [(exports[each].places.whole, dict(exports[each].places.granules)) for each in (name, other)]
            for at in range(0, CLUSTER, 8192):
                client.write(at, b"2" * 4096)
            client.write(6000, b"3" * 4096)
            assert [(exports[each].places.whole, exports[each].places.granules) for each in (name, other)] == known
            assert known[0][0] is not None or known[0][1]
            assert another.read(6000, 4096) == b"3" * 4096
        for node in nodes_of:
            marked = daemon.daemon.graph.nodes[node].dirty_bitmaps["b"].bits
            assert int.from_bytes(marked, "little") == 0b101010101010111
