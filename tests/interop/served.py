"""The same served by the real qemu-storage-daemon and by us, and tools that look at what is served."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peers
from blkferry.errors import Error, ErrorKind
from blkferry.testing.daemon import DaemonThread


def spelled(arguments: dict[str, object]) -> dict[str, object]:
    """Arguments as they are written in JSON."""
    return {name.replace("_", "-"): value for name, value in arguments.items()}


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
        self._process.stdin.write(json.dumps({"execute": command, "arguments": spelled(arguments)}) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            answer = json.loads(line) if line.startswith("{") else {}
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise Error(ErrorKind.IO, answer["error"]["desc"])
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
