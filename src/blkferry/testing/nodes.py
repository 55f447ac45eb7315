"""The kinds of nodes that a test of an export should be run over: each takes other roads through the data path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blkferry.testing import shuffled
from blkferry.testing.daemon import DaemonThread

WINDOW_START = 3 * 512
WINDOW_AFTER = 4096

KINDS = ("buffered", "direct", "threads", "memory", "window", "window-direct")

SHUFFLED = {"shuffled": 16, "shuffled-small": 12, "shuffled-direct": 13}
"""Kinds whose bytes lie in many places, and of which an empty one is allocated in part: the bits of their clusters."""


@dataclass(frozen=True, slots=True)
class Place:
    """A node, and where its bytes are: `start` in the file at `path`, which is None where they are not in one piece."""

    node: str
    path: Path | None
    start: int


def add(daemon: DaemonThread, kind: str, directory: Path, size: int, *, name: str = "n") -> Place:
    """Add an empty node of `size` bytes; those of windows are rounded down to a sector. It passes discards on."""
    if kind == "memory":
        daemon.execute("blockdev-add", driver="memory", node_name=name, size=size, discard="unmap")
        return Place(name, None, 0)
    path = directory / f"{name}.img"
    if kind in SHUFFLED:
        return _add_shuffled(daemon, kind, path, size, name)
    window = kind.startswith("window")
    size -= size % 512 if window else 0
    before, after = (WINDOW_START, WINDOW_AFTER) if window else (0, 0)
    with path.open("wb") as file:
        file.write(b"\xee" * before)
        file.truncate(before + size)
        file.seek(before + size)
        file.write(b"\xee" * after)
    options: dict[str, Any] = {"driver": "file", "filename": str(path), "discard": "unmap"}
    if kind == "threads":
        options["aio"] = "threads"
    cache = {"direct": kind.endswith("direct")}
    if not window:
        daemon.execute("blockdev-add", node_name=name, cache=cache, **options)
        return Place(name, path, 0)
    daemon.execute(
        "blockdev-add",
        driver="raw",
        node_name=name,
        offset=before,
        size=size,
        discard="unmap",
        cache=cache,
        file=options,
    )
    return Place(name, path, before)


def _add_shuffled(daemon: DaemonThread, kind: str, path: Path, size: int, name: str) -> Place:
    layout = shuffled.Layout.make(size, SHUFFLED[kind])
    path.write_bytes(layout.empty_image())
    daemon.execute(
        "blockdev-add",
        driver="file",
        node_name=f"{name}-file",
        filename=str(path),
        cache={"direct": kind.endswith("direct")},
    )
    daemon.execute("blockdev-add", driver="memory", node_name=f"{name}-below", size=size // 2)

    async def insert() -> None:
        shuffled.insert(daemon.daemon.graph, name, layout, f"{name}-file", f"{name}-below")

    daemon.call(insert)
    return Place(name, None, 0)
