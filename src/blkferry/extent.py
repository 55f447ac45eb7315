"""The central noun: for a range of a node, what is there and where its bytes live.

A driver's `lookup` answers with extents, in order, without gaps, from the start of the range that was asked for. It may
stop before the end of the range (where metadata is not at hand, or the answer grows long), but not before its start.
Reads, writes, NBD block status, holes and maps are all served from this one answer, so they cannot disagree.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

MAX_EXTENTS = 1024
"""How many extents an answer about allocation should have at most: a millisecond or two of work. Callers ask on."""


class Content(enum.Enum):
    """What a reader finds in an extent."""

    DATA = "data"
    """Bytes at a place: `offset` in the node's own storage, or in the child that `child` names."""
    ZERO = "zero"
    """Zeroes, wherever they come from."""
    BELOW = "below"
    """Whatever the backing child has at the same offset."""
    OPAQUE = "opaque"
    """Bytes only the driver's own `read` can produce (compressed, encrypted, remote)."""


class Effort(enum.Enum):
    """How much a lookup should find out."""

    PLACE = "place"
    """Just enough to read or overwrite: a driver may call a hole in a file DATA, for reading it gives zeroes."""
    ALLOCATION = "allocation"
    """Tell zeroes and holes from data too, for block status and sparse replies."""


class Extent(NamedTuple):
    """One answer of a driver about `length` bytes of its node from `start`.

    `in_place` promises that overwriting these bytes at their place needs no metadata change. `allocated` says
    whether host space stands behind them. `settled` says that the child need not be asked what it has allocated:
    a format that knows what its clusters hold vouches for them.
    """

    start: int
    length: int
    content: Content
    offset: int = 0
    child: str | None = None
    in_place: bool = False
    allocated: bool = True
    settled: bool = False


class Status(NamedTuple):
    """A stretch for a map or a block-status reply: does it read as zero, is host space behind it?"""

    length: int
    zero: bool
    allocated: bool


def coalesce(stretches: list[Status]) -> list[Status]:
    """Merge neighbours that say the same."""
    merged: list[Status] = []
    for stretch in stretches:
        if merged and merged[-1][1:] == stretch[1:]:
            merged[-1] = merged[-1]._replace(length=merged[-1].length + stretch.length)
        else:
            merged.append(stretch)
    return merged
