"""Drivers by name, through the entry points that third parties use too (group `blkferry.drivers`)."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from blkferry.graph.node import Node


@functools.cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of one of our groups ("drivers", "exports", "objects") by name; nothing is imported yet."""
    return {point.name: point for point in entry_points(group=f"blkferry.{group}")}


def load(group: str, name: str) -> type | None:
    """Import the class behind an entry point, None when there is none of that name."""
    point = plugins(group).get(name)
    return None if point is None else point.load()


def driver(name: str) -> type[Node]:
    """The driver class called `name`; raises Error(NOT_FOUND)."""
    found = load("drivers", name)
    if found is None:
        raise Error(
            ErrorKind.NOT_FOUND,
            f"Unknown driver '{name}'",
            hint=f"Known drivers: {', '.join(sorted(plugins('drivers')))}.",
        )
    return found
