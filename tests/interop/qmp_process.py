"""`blkferry-qsd` in a process of its own, driven over QMP on its standard streams.

For tests whose client must not share an interpreter with the daemon: whoever waits for a page of a FUSE file in a
mapping holds the interpreter's lock.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cli_process import program

from blkferry.errors import Error, ErrorKind

PATIENCE = 300.0
"""Seconds after which a daemon is killed: whoever waits for one of its files could not be."""


class QmpProcess:
    """A running daemon; use it as a context manager. `events` are those that came with answers so far."""

    def __init__(self, *options: str) -> None:
        argv = [program("blkferry-qsd"), "--chardev", "stdio,id=c", "--monitor", "chardev=c", *options]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._watchdog = threading.Timer(PATIENCE, self.process.kill)
        self._watchdog.start()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; underscores in argument names stand for dashes. Raises Error."""
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.process.stdin.write(json.dumps({"execute": command, "arguments": spelled}) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise Error(ErrorKind.IO, answer["error"]["desc"])
            if "event" in answer:
                self.events.append(answer)
        raise AssertionError("the daemon has ended")

    def mount(self, node: str, mountpoint: Path, export_id: str = "e", **options: object) -> Path:
        """Export a node by FUSE over a file that is made for it, writable unless told otherwise."""
        mountpoint.touch()
        arguments = {"writable": True} | options
        self.execute(
            "block-export-add", type="fuse", id=export_id, node_name=node, mountpoint=str(mountpoint), **arguments
        )
        return mountpoint

    def clear(self) -> None:
        """Remove all exports and nodes."""
        for export in self.execute("query-block-exports"):
            self.execute("block-export-del", id=export["id"], mode="hard")
        while self.execute("query-block-exports"):
            time.sleep(0.01)
        for node in self.execute("query-named-block-nodes"):
            if not node["node-name"].startswith("#"):
                self.execute("blockdev-del", node_name=node["node-name"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.communicate(json.dumps({"execute": "quit"}) + "\n", timeout=PATIENCE)
        self._watchdog.cancel()
        assert kind is not None or self.process.returncode == 0
