"""Every way that a client's write takes to the disk is noted in dirty bitmaps, and nothing else is."""

from __future__ import annotations

import pytest

import peers
from blkferry.plane.pace import Pace
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client
from blkferry.wire.nbd.constants import CmdFlag

SIZE = 1 << 20
BITS = (9, 12, 16)


def add_raw(daemon, directory, **more):
    (directory / "disk").write_bytes(b"r" * (SIZE + 512))
    file = {"driver": "file", "node-name": "file", "filename": str(directory / "disk")}
    daemon.execute("blockdev-add", driver="raw", node_name="n", file=file, discard="unmap", **more)


def add_qcow2(daemon, directory, *, full=False, cluster="64k"):
    path = str(directory / "disk")
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(SIZE))
    file = {"driver": "file", "node-name": "file", "filename": path}
    daemon.execute("blockdev-add", driver="qcow2", node_name="n", file=file, discard="unmap")
    if full:
        daemon.export("n", "full", "full")
        with daemon.client("full") as client:
            client.write(0, b"q" * SIZE)


DISKS = {
    "one piece": (lambda *where: add_raw(*where, size=SIZE), ("n",)),
    "the node below": (lambda *where: add_raw(*where, size=SIZE), ("file",)),
    "both": (lambda *where: add_raw(*where, size=SIZE), ("n", "file")),
    "a window": (lambda *where: add_raw(*where, offset=512), ("n", "file")),
    "new clusters": (add_qcow2, ("n",)),
    "small clusters": (lambda *where: add_qcow2(*where, cluster="512"), ("n",)),
    "clusters that are there": (lambda *where: add_qcow2(*where, full=True), ("n",)),
    "clusters, and the file": (lambda *where: add_qcow2(*where, full=True), ("n", "file")),
}
WRITES = {
    "within a granule": (Client.write, 70144, 512, 0),
    "over the edge of one": (Client.write, 65536 - 100, 4096, 0),
    "within one, again": (Client.write, 70144, 512, 0),
    "durable": (Client.write, 200_000, 4096, CmdFlag.FUA),
    "over many": (Client.write, 1000, 300_000, 0),
    "the last bytes": (Client.write, SIZE - 512, 512, 0),
    "zeroes": (Client.zero, 70000, 4096, 0),
    "zeroes over many": (Client.zero, 60000, 200_000, 0),
    "a discard": (Client.trim, 65536, 131_072, 0),
    "where that was": (Client.write, 70000, 4096, 0),
}


@pytest.fixture
def daemon():
    with DaemonThread() as running:
        yield running


def granules(start, length, bits):
    return sum(1 << number for number in range(start >> bits, (start + length - 1 >> bits) + 1))


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("disk", DISKS)
def test_a_write_is_marked_and_nothing_else(daemon, tmp_path, disk, inline):
    """`inline` is false while the kernel throttles writes: the engine does them."""
    add, recorders = DISKS[disk]
    add(daemon, tmp_path)
    daemon.export("n")
    nodes = daemon.daemon.graph.nodes
    names = {f"b{bits}": bits for bits in BITS}
    for node in recorders:
        daemon.execute("block-dirty-bitmap-add", node=node, name="off", disabled=True)
        for name, bits in names.items():
            daemon.execute("block-dirty-bitmap-add", node=node, name=name, granularity=1 << bits)
    if not inline:
        stopped = Pace()
        stopped.stop(float("inf"))
        nodes["file"].storage.pace = daemon.daemon.exports.get("e").places.own_pace = stopped
    with daemon.client() as client:
        for number, (what, (change, start, length, flags)) in enumerate(WRITES.items()):
            for node in recorders:
                for name in names:
                    daemon.execute("block-dirty-bitmap-clear", node=node, name=name)
            before = (tmp_path / "disk").read_bytes()
            if change is Client.write:
                change(client, start, bytes([number + 1]) * length, flags)
            else:
                change(client, start, length, flags)
            after = (tmp_path / "disk").read_bytes()
            for node in recorders:
                assert not any(nodes[node].dirty_bitmaps["off"].bits), what
                for name, bits in names.items():
                    marked = int.from_bytes(nodes[node].dirty_bitmaps[name].bits, "little")
                    if node == "n" or "cluster" not in disk:
                        at = start + (512 if disk == "a window" and node == "file" else 0)
                        assert marked == granules(at, length, bits), (what, node, name)
                    for at in range(0, len(after), 512):  # nobody knows which clusters an image takes
                        if before[at : at + 512] != after[at : at + 512]:
                            assert marked >> (at >> bits) & 1 or node == "n", (what, name, at)


def test_what_was_written_last_is_stored_with_the_image(daemon, tmp_path):
    add_qcow2(daemon, tmp_path)
    daemon.execute("block-dirty-bitmap-add", node="n", name="b", persistent=True)
    daemon.export("n")
    with daemon.client() as client:
        client.write(3 << 16, b"w")
    daemon.execute("block-export-del", id="e", mode="hard")
    daemon.execute("blockdev-del", node_name="n")
    file = {"driver": "file", "filename": str(tmp_path / "disk")}
    daemon.execute("blockdev-add", driver="qcow2", node_name="n", file=file)
    assert int.from_bytes(daemon.daemon.graph.nodes["n"].dirty_bitmaps["b"].bits, "little") == 1 << 3
