"""Cached pieces of on-disk tables: slices of L2 tables and refcount blocks, with what of them has to be written.

A cache holds tables up to its limit and gives up clean ones that were not used lately. Dirty ones stay until a commit
has written them; who makes tables dirty asks `crowded` first, and has a commit made when it says so.
"""

from __future__ import annotations

from collections.abc import MutableSequence


class Table:
    """`values` of a table that lies at `host` in the file. Indices `low` to `high` (half-open) differ from the file.

    `fresh` tables are not yet on disk at all: they are written before anything that refers to them.
    """

    __slots__ = ("fresh", "high", "host", "low", "used", "values")

    def __init__(self, host: int, values: MutableSequence[int], *, fresh: bool = False) -> None:
        self.host = host
        self.values = values
        self.low = 0
        self.high = len(values) if fresh else 0
        self.used = True
        self.fresh = fresh

    @property
    def dirty(self) -> bool:
        return self.high > self.low

    def touch(self, low: int, high: int) -> None:
        """The values from `low` to `high` have changed."""
        if self.high > self.low:
            self.low = min(self.low, low)
            self.high = max(self.high, high)
        else:
            self.low, self.high = low, high

    def clean(self) -> None:
        """All of it has been handed on to be written."""
        self.low = self.high = 0
        self.fresh = False


class TableCache:
    """Tables of one kind by number. `entry_bytes` is what one takes, `limit` how many may be there."""

    def __init__(self, limit_bytes: int, entry_bytes: int) -> None:
        self.entry_bytes = entry_bytes
        self.limit = max(limit_bytes // entry_bytes, MIN_TABLES)
        self.tables: dict[int, Table] = {}
        self.get = self.tables.get
        self._dirty: set[int] = set()
        self._writing: set[int] = set()  # copies of these are on their way to the file: what is there is still stale

    @property
    def crowded(self) -> bool:
        """Whether so much of the cache is dirty that it has to be written before more becomes dirty."""
        return len(self._dirty) >= self.limit

    def add(self, number: int, table: Table) -> None:
        """Keep one more, giving up others if there are too many."""
        self.tables[number] = table
        if table.dirty:
            self._dirty.add(number)
        if len(self.tables) > self.limit:
            self._evict(number)

    def touch(self, number: int, low: int, high: int) -> None:
        """`Table.touch` for a table of this cache."""
        self.tables[number].touch(low, high)
        self._dirty.add(number)

    def _evict(self, newest: int) -> None:
        for _ in range(2):  # the first round gives every table that was used a second chance
            for number in list(self.tables):
                if len(self.tables) <= self.limit:
                    return
                table = self.tables.pop(number)
                if table.used or number == newest or number in self._dirty or number in self._writing:
                    table.used = False
                    self.tables[number] = table

    def take_dirty(self) -> list[tuple[int, Table]]:
        """The dirty tables, for somebody who writes them now and calls `written` then."""
        self._writing, self._dirty = self._dirty, set()
        return [(number, self.tables[number]) for number in sorted(self._writing)]

    def written(self) -> None:
        """What was taken is in the file, or dirty again."""
        self._writing = set()

    def any_dirty(self) -> bool:
        return bool(self._dirty)

    def drop_idle(self) -> None:
        """Give up what was not used since the last call (cache-clean-interval)."""
        for number in list(self.tables):
            table = self.tables[number]
            if not table.used and number not in self._dirty and number not in self._writing:
                del self.tables[number]
            table.used = False

    def forget(self, numbers: range | None = None) -> None:
        """Drop tables, dirty or not: they no longer mean anything."""
        if numbers is None:
            self.tables.clear()
            self._dirty.clear()
            return
        for number in numbers:
            self.tables.pop(number, None)
            self._dirty.discard(number)


MIN_TABLES = 4
"""Below this nothing works: a request may need a few tables at once."""
