"""What the meta contexts of an export say, as nbdinfo and libnbd read it from us and from qemu-storage-daemon."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import peers
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo")

DEPTH = "qemu:allocation-depth"
K = 1024


class TheirDaemon:
    """The real qemu-storage-daemon, driven like our own."""

    def __init__(self, socket: Path) -> None:
        self.socket = str(socket)
        argv = [*peers.peer("qemu-storage-daemon"), "--chardev", "stdio,id=c", "--monitor", "chardev=c"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._watchdog = threading.Timer(60, self._process.kill)
        self._watchdog.start()
        self.execute("qmp_capabilities")
        self.execute("nbd-server-start", addr={"type": "unix", "data": {"path": self.socket}})

    def execute(self, command: str, **arguments: object) -> object:
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._process.stdin.write(json.dumps({"execute": command, "arguments": spelled}) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            answer = json.loads(line) if line.startswith("{") else {}
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer["error"]["desc"]
        raise AssertionError("qemu-storage-daemon ended")

    def export(self, node: str, name: str = "", export_id: str = "e", **options: object) -> str:
        self.execute("block-export-add", type="nbd", id=export_id, node_name=node, name=name, **options)
        return self.socket

    def stop(self) -> None:
        self._process.communicate(json.dumps({"execute": "quit"}) + "\n", timeout=30)
        self._watchdog.cancel()


@contextmanager
def daemon_of(whose: str, tmp_path: Path) -> Iterator[DaemonThread | TheirDaemon]:
    if whose == "ours":
        with DaemonThread() as daemon:
            daemon.serve()
            yield daemon
        return
    daemon = TheirDaemon(tmp_path / "theirs.sock")
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(params=["ours", "theirs"])
def daemon(request, tmp_path):
    with daemon_of(request.param, tmp_path) as started:
        yield started


def mapped(socket: str, context: str, export: str = "") -> list[tuple[int, int, int]]:
    """What nbdinfo finds in a context: (offset, length, value)."""
    done = peers.run("nbdinfo", f"--map={context}", "--json", f"nbd+unix:///{export}?socket={socket}")
    return [(each["offset"], each["length"], each["type"]) for each in json.loads(done.stdout)]


def create(path: Path, size: str, backing: Path | None = None, backing_format: str = "qcow2") -> Path:
    below = [] if backing is None else ["-b", backing, "-F", backing_format]
    peers.run("qemu-img", "create", "-f", "qcow2", *below, path, size)
    return path


def change(path: Path, *commands: str) -> None:
    options = [option for command in commands for option in ("-c", command)]
    peers.run("qemu-io", "-f", "qcow2", *options, path)


def qcow2(path: Path, name: str, **options: object) -> dict[str, object]:
    return {"driver": "qcow2", "node_name": name, "file": {"driver": "file", "filename": str(path)}} | options


@pytest.fixture
def chain(tmp_path) -> Path:
    """Three layers, each longer than the one below it, with data and zeroes of their own."""
    base = create(tmp_path / "base.qcow2", "1M")
    change(base, "write 0 64k", "write -z 64k 64k", "write 512k 64k")
    middle = create(tmp_path / "middle.qcow2", "2M", base)
    change(middle, "write 128k 64k")
    top = create(tmp_path / "top.qcow2", "3M", middle)
    change(top, "write 256k 64k", "write -z 320k 64k")
    return top


CHAIN = [
    (0, 128 * K, 3),
    (128 * K, 64 * K, 2),
    (192 * K, 64 * K, 0),
    (256 * K, 128 * K, 1),
    (384 * K, 128 * K, 0),
    (512 * K, 64 * K, 3),
    (576 * K, 448 * K, 0),
    (1024 * K, 1024 * K, 3),  # behind the end of the base
    (2048 * K, 1024 * K, 2),  # behind the end of the one in the middle
]


def test_depth_names_the_layer_that_has_the_data(daemon, chain):
    daemon.execute("blockdev-add", **qcow2(chain, "top", read_only=True))
    assert mapped(daemon.export("top", writable=False, allocation_depth=True), DEPTH) == CHAIN


def test_depth_of_nodes_without_backing_files(daemon, tmp_path):
    (tmp_path / "disk.raw").write_bytes(bytes(64 * K) + b"x" * 64 * K)
    alone = create(tmp_path / "alone.qcow2", "256k")
    change(alone, "write 64k 64k")
    over = create(tmp_path / "over.qcow2", "256k", tmp_path / "disk.raw", "raw")
    file = {"driver": "file", "filename": str(tmp_path / "disk.raw")}
    daemon.execute("blockdev-add", driver="raw", node_name="raw", file=file, read_only=True)
    daemon.execute("blockdev-add", **qcow2(alone, "alone", read_only=True))
    daemon.execute("blockdev-add", **qcow2(over, "over", read_only=True))
    for node in ("raw", "alone", "over"):
        daemon.export(node, node, node, writable=False, allocation_depth=True)
    assert mapped(daemon.socket, DEPTH, "raw") == [(0, 128 * K, 1)]
    assert mapped(daemon.socket, DEPTH, "alone") == [(0, 64 * K, 0), (64 * K, 64 * K, 1), (128 * K, 128 * K, 0)]
    assert mapped(daemon.socket, DEPTH, "over") == [(0, 256 * K, 2)]


def test_depth_follows_an_export_to_an_overlay(daemon, chain, tmp_path):
    daemon.execute("blockdev-add", **qcow2(chain, "top"))
    overlay = create(tmp_path / "overlay.qcow2", "3M")
    daemon.execute("blockdev-add", **qcow2(overlay, "overlay"))
    socket = daemon.export("top", writable=True, allocation_depth=True)
    daemon.execute("blockdev-snapshot", node="top", overlay="overlay")
    peers.run("qemu-io", "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///?socket={socket}")
    moved = [(offset, length, value and value + 1) for offset, length, value in CHAIN]
    moved[0:1] = [(0, 64 * K, 1), (64 * K, 64 * K, 4)]
    assert mapped(socket, DEPTH) == moved


def test_contexts_that_were_not_asked_for_are_not_offered(daemon, chain):
    daemon.execute("blockdev-add", **qcow2(chain, "top", read_only=True))
    socket = daemon.export("top", writable=False)
    listed = json.loads(peers.run("nbdinfo", "--json", f"nbd+unix:///?socket={socket}").stdout)
    assert listed["exports"][0]["contexts"] == ["base:allocation"]
