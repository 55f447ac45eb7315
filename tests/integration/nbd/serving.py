"""A daemon with one writable export, and the means to see that a test leaves nothing behind in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from blkferry.testing.daemon import DaemonThread

SIZE = 1 << 20


class Served:
    """The daemon, its image, and what was open before clients came."""

    def __init__(self, daemon: DaemonThread, path: Path) -> None:
        self.daemon = daemon
        self.path = path
        self.open_files = count_files()

    def client(self, export="", **options):
        return self.daemon.client(export, **options)

    def inside(self, look):
        """Return `look(daemon)`, evaluated on the daemon's loop."""

        async def run():
            return look(self.daemon.daemon)

        return self.daemon.call(run)

    def export(self, export_id="e"):
        return self.daemon.daemon.exports.get(export_id)

    def check(self) -> None:
        """Somebody else is served, right and at once, and everything the test's clients held has been let go."""
        before = time.monotonic()
        with self.client() as client:
            client.write(4096, b"still here" * 100)
            assert client.read(4090, 1012) == client.read(4090, 6) + b"still here" * 100 + client.read(5096, 6)
            assert len(client.read(0, client.size)) == client.size
            client.flush()
            client.disconnect()
        assert time.monotonic() - before < 5
        eventually(lambda: self.inside(in_flight) == {}, lambda: self.inside(in_flight))
        eventually(lambda: count_files() == self.open_files, list_files)


def in_flight(daemon) -> dict[str, int]:
    """Everything that should be zero when nobody is connected, if it is not."""
    counts = {"buffers": daemon.services.buffers.used}
    if daemon.nbd_server is not None:
        counts["connections"] = daemon.nbd_server._connections
        counts["negotiating"] = len(daemon.nbd_server._lobby)
        for export in daemon.nbd_server.exports:
            counts[f"clients of {export.name}"] = len(export.clients)
            counts[f"requests of {export.name}"] = export.root.in_flight.count
    for name, node in daemon.graph.nodes.items():
        counts[f"node {name}"] = node.storage.readers.count + node.storage.writers.count if node.storage else 0
    return {what: count for what, count in counts.items() if count}


def count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def list_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return found


def eventually(condition, explain=lambda: "", seconds: float = 5) -> None:
    """Wait for what happens soon but not at once."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {explain()}"
        time.sleep(0.005)
