"""A daemon in a thread that has vhost-user-blk exports, for tests of what it does with front ends."""

import time
from pathlib import Path

from blkferry.testing.daemon import DaemonThread

SIZE = 1 << 20


class Host:
    """A daemon in a thread with exports of memory disks."""

    def __init__(self, daemon: DaemonThread, directory: Path) -> None:
        self.daemon = daemon
        self._directory = directory
        daemon.execute("blockdev-add", driver="memory", node_name="disk", size=SIZE)

    def path(self, name: str = "e") -> Path:
        return self._directory / name

    def export(self, name: str = "e", node: str = "disk", **options: object) -> Path:
        given = {"writable": True, "addr": {"type": "unix", "path": str(self.path(name))}} | options
        self.daemon.execute("block-export-add", type="vhost-user-blk", id=name, node_name=node, **given)
        return self.path(name)

    def clients(self) -> list[dict]:
        return [client for info in self.daemon.execute("query-block-exports") for client in info["clients"]]


def eventually(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
