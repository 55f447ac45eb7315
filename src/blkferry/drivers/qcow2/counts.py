"""A refcount for every cluster of an image, in memory: two bytes each, and those only where any are set.

Counts that do not fit (refcounts of 32 and 64 bits may be that high) are kept beside. The memory is mapped, not
allocated: a sparse image of many clusters costs what its used clusters cost, at page granularity.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, MutableSequence

from blkferry.errors import Error, ErrorKind

HIGH = 0xFFFF
"""Counts from here on are kept beside."""

MAX_HIGH_COUNTS = 1 << 20
"""So many clusters are not used so often by any image that is sound; it bounds what a broken one costs us."""

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
_PIECE = 1 << 19  # clusters that are compared at once


class Counts:
    """Counts of `clusters` clusters, all 0 at first. In `low`, for loops that are in a hurry, HIGH stands for more."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self._bytes = memoryview(mmap.mmap(-1, max(2 * clusters, 1), flags=_FLAGS))[: 2 * clusters]
        self.low = self._bytes.cast("H")
        self._more: dict[int, int] = {}

    def __getitem__(self, cluster: int) -> int:
        count = self.low[cluster]
        return count if count < HIGH else self._more[cluster]

    def __setitem__(self, cluster: int, count: int) -> None:
        if count < HIGH:
            self.low[cluster] = count
            self._more.pop(cluster, None)
            return
        if len(self._more) >= MAX_HIGH_COUNTS:
            raise Error(ErrorKind.CORRUPT, f"More than {MAX_HIGH_COUNTS} clusters have refcounts of {HIGH} and more")
        self.low[cluster] = HIGH
        self._more[cluster] = count

    def load(self, start: int, counts: MutableSequence[int]) -> None:
        """Set the counts of the clusters from `start` on; those behind the last cluster are ignored."""
        counts = counts[: self.clusters - start]
        if not counts or max(counts) < HIGH:
            narrow = counts if isinstance(counts, array) and counts.typecode == "H" else array("H", list(counts))
            self.low[start : start + len(counts)] = narrow
            return
        for index, count in enumerate(counts):
            self[start + index] = count

    def differences(self, other: Counts) -> Iterator[int]:
        """Clusters whose counts differ, in order."""
        odd = {cluster // _PIECE for cluster, count in self._more.items() if other._more.get(cluster) != count}
        for piece in range(-(-self.clusters // _PIECE)):
            start, end = piece * _PIECE, min((piece + 1) * _PIECE, self.clusters)
            ours, theirs = bytes(self._bytes[2 * start : 2 * end]), bytes(other._bytes[2 * start : 2 * end])
            if ours != theirs or piece in odd:
                for cluster in range(start, end):
                    if self[cluster] != other[cluster]:
                        yield cluster

    def any_in(self, start: int, end: int) -> bool:
        """Whether some count from `start` to `end` (half-open, may be behind the last) is not 0."""
        found = bytes(self._bytes[2 * start : 2 * end])
        return found != bytes(len(found))

    def last(self) -> int:
        """The last cluster whose count is not 0, -1 if there is none."""
        for piece in range((self.clusters - 1) // _PIECE, -1, -1):
            used = bytes(self._bytes[2 * piece * _PIECE : 2 * (piece + 1) * _PIECE]).rstrip(b"\0")
            if used:
                return piece * _PIECE + (len(used) - 1) // 2
        return -1
