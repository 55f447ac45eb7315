"""Transactions of snapshots and bitmaps: as qemu-storage-daemon answers them, all or nothing, at one moment."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))
import qsd

pytestmark = peers.requires("qemu-img", "qemu-storage-daemon")
SIZE = 1 << 20


def image(path, *options):
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(SIZE))


def options(directory, name, **more):
    file = {"driver": "file", "filename": str(directory / name)}
    return {"driver": "qcow2", "node-name": name, "file": file, **more}


def bitmap(node, name="b", command="add", **more):
    return {"type": f"block-dirty-bitmap-{command}", "data": {"node": node, "name": name, **more}}


def snapshot(node, overlay):
    return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}


def internal(device, name):
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}}


def sync(node, path, name, **more):
    data = {"node-name": node, "snapshot-file": str(path), "snapshot-node-name": name, **more}
    return {"type": "blockdev-snapshot-sync", "data": data}


ABORT = {"type": "abort", "data": {}}


@pytest.fixture
def directory(tmp_path):
    for name in ("a", "b", "over", "over2"):
        image(tmp_path / name)
    return tmp_path


@pytest.fixture
def daemon(directory):
    with DaemonThread() as running:
        for name in ("a", "b"):
            running.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in options(directory, name).items()})
        for name in ("over", "over2"):
            more = options(directory, name, backing=None)
            running.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in more.items()})
        yield running


def state(daemon):
    """Of each node: bitmaps, backing file, whether it is read-only, snapshots, users."""
    nodes = daemon.daemon.graph.nodes
    return {
        name: (
            {each.name: bytes(each.bits) for each in node.dirty_bitmaps.values()},
            {role: edge.node.name for role, edge in node.children.items()},
            node.read_only,
            [each.name for each in node.image_info().snapshots or []] if node.supports_snapshots else [],
            [(edge.user.describe(), edge.role, edge.used, edge.shared) for edge in node.parents],
        )
        for name, node in nodes.items()
    }


def test_they_are_answered_as_qsd_does(directory):
    def transaction(*actions, **more):
        return "transaction", {"actions": list(actions), **more}

    grouped = {"properties": {"completion-mode": "grouped"}}
    commands = [
        ("blockdev-add", options(directory, "a")),
        ("blockdev-add", options(directory, "b")),
        ("blockdev-add", options(directory, "over", backing=None)),
        ("blockdev-add", options(directory, "over2", backing=None)),
        transaction(bitmap("a"), snapshot("a", "over"), ABORT),
        transaction(bitmap("a"), snapshot("nobody", "over")),
        transaction(bitmap("a"), snapshot("a", "nobody")),
        transaction(bitmap("a"), snapshot("a", "over"), snapshot("a", "over2")),
        transaction(snapshot("a", "over"), snapshot("over", "over2"), ABORT),
        transaction(internal("b", "s"), ABORT),
        transaction(internal("b", "s"), internal("b", "s")),
        transaction(internal("b", "s"), internal("b", "t"), bitmap("b", persistent=True)),
        transaction(internal("b", "t")),
        transaction(bitmap("a"), snapshot("a", "over"), bitmap("over", persistent=True)),
        transaction(bitmap("b", "b", "clear"), snapshot("a", "over2")),
        transaction(snapshot("a", "over2")),
        *[
            transaction(action, **grouped)
            for action in (ABORT, bitmap("b", "c"), snapshot("b", "over2"), internal("b", "x"))
        ],
        ("x-debug-block-dirty-bitmap-sha256", {"node": "over", "name": "b"}),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "b", "name": "b"}),
    ]
    answers = qsd.theirs(commands)
    for name in ("a", "b", "over", "over2"):
        image(directory / name)  # what has happened to them is undone
    for command, their_answer, our_answer in zip(commands, answers, qsd.ours(commands), strict=True):
        assert our_answer == their_answer, command


@pytest.mark.parametrize(
    "actions",
    [
        [bitmap("a"), snapshot("a", "over"), bitmap("over", persistent=True)],
        [snapshot("a", "over"), snapshot("over", "over2"), bitmap("a", "old", "clear")],
        [internal("b", "s"), snapshot("a", "over"), bitmap("a", "old", "disable")],
        [bitmap("a", "old", "remove"), snapshot("b", "over2"), snapshot("a", "over")],
        ["sync", bitmap("made"), snapshot("b", "over")],
    ],
)
def test_what_is_refused_changes_nothing(daemon, directory, actions):
    """And the exports go on as they were, with every write still recorded."""
    actions = [sync("a", directory / "made", "made") if each == "sync" else each for each in actions]
    daemon.execute("block-dirty-bitmap-add", node="a", name="old", persistent=True)
    daemon.export("a", "a", "a", writable=True)
    daemon.export("b", "b", "b", writable=True)
    with daemon.client("a") as client:
        client.write(0, b"1" * 4096)
        before = state(daemon)
        with pytest.raises(Error, match="aborted using Abort"):
            daemon.execute("transaction", actions=[*actions, ABORT])
        assert state(daemon) == before
        client.write(2 << 16, b"2" * 4096)
        assert client.read(0, 1) + client.read(2 << 16, 1) == b"12"
    assert daemon.daemon.graph.nodes["a"].dirty_bitmaps["old"].bits[0] == 0b101
    daemon.execute("transaction", actions=actions)
    assert state(daemon) != before


def test_overlays_and_bitmaps_of_two_disks_begin_at_one_moment(daemon, directory):
    """Somebody writes numbers to one disk, then to the other: no overlay is behind the other by more than one.

    And what an overlay has got, its bitmap has heard of, though there is much to do between one and the other.
    """
    daemon.export("a", "a", "a", writable=True)
    daemon.export("b", "b", "b", writable=True)
    stop = threading.Event()
    failures = []

    def write():
        try:
            with daemon.client("a") as first, daemon.client("b") as second:
                number = 0
                while not stop.is_set():
                    number += 1
                    for client in (first, second):
                        client.write(0, number.to_bytes(8, "big"))
                        client.write((number % 15 + 1) << 16, number.to_bytes(8, "big"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to say so
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        much_to_do = [internal("over2", f"s{number}") for number in range(20)]
        overlays = [sync("a", directory / "a2", "a2"), snapshot("b", "over")]
        daemon.execute("transaction", actions=[*overlays, *much_to_do, bitmap("a2"), bitmap("over")])
    finally:
        stop.set()
        thread.join()
    assert not failures
    nodes = daemon.daemon.graph.nodes
    numbers = []
    for base, export, overlay in (("a", "a", "a2"), ("b", "b", "over")):
        daemon.export(base, f"base-{base}", f"base-{base}", writable=False)
        with daemon.client(f"base-{base}") as client:
            old = client.read(0, SIZE)
        with daemon.client(export) as client:
            new = client.read(0, SIZE)
        numbers.append(int.from_bytes(old[:8], "big"))
        marked = int.from_bytes(nodes[overlay].dirty_bitmaps["b"].bits, "little")
        changed = {at >> 16 for at in range(0, SIZE, 1 << 16) if old[at : at + 8] != new[at : at + 8]}
        assert changed <= {number for number in range(16) if marked >> number & 1}
        assert nodes[base].read_only
    assert numbers[0] - numbers[1] in (0, 1)


def test_a_file_is_overwritten_only_when_its_turn_has_come(daemon, directory):
    """As with QEMU: what an overlay is made over is as it was if an action before is refused."""
    precious = directory / "precious"
    precious.write_bytes(b"somebody's only copy" * 100)
    with pytest.raises(Error, match="nobody"):
        daemon.execute("transaction", actions=[bitmap("nobody"), sync("a", precious, "made")])
    assert precious.read_bytes() == b"somebody's only copy" * 100
    daemon.execute("transaction", actions=[sync("a", precious, "first"), sync("first", directory / "made", "second")])
    nodes = daemon.daemon.graph.nodes
    assert nodes["second"].children["backing"].node is nodes["first"]
    assert nodes["first"].children["backing"].node is nodes["a"]
