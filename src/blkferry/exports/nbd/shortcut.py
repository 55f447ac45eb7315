"""Where an export is one piece of one descriptor, requests need not ask the graph: this is that piece."""

from __future__ import annotations

from dataclasses import dataclass

from blkferry.extent import Content
from blkferry.graph.root import Root
from blkferry.plane.storage import Storage


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The export's bytes [0, end) lie at `offset` of `storage`; up to `write_end` they may be overwritten in place.

    Valid until the root is retired.
    """

    storage: Storage
    offset: int
    end: int
    write_end: int


def find(root: Root, size: int, *, writable: bool) -> Shortcut | None:
    """The shortcut for a root of `size` bytes, None where there is none (holes from a format, several files)."""
    runs = root.runs(0, size) if size else None
    if not runs or len(runs) != 1:
        return None
    (run,) = runs
    storage = run.storage
    if run.content is not Content.DATA or storage is None or run.length < size:
        return None
    in_place = writable and run.in_place and not root.detects_zeroes and root.node.flush_target() is storage
    return Shortcut(storage, run.offset, run.length, run.length if in_place else 0)
