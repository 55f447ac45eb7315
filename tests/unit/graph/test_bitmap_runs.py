"""Dirty bitmaps: what was marked comes back as runs, however it lies."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import DirtyBitmap

GRANULE = 512
SIZE = 16384 * GRANULE + 100  # a last granule that is cut off

offsets = st.integers(0, SIZE)
ranges = st.tuples(offsets, st.one_of(st.integers(0, 3 * GRANULE), offsets)).map(
    lambda each: (each[0], min(each[0] + each[1], SIZE))
)


def made() -> DirtyBitmap:
    return DirtyBitmap("b", SIZE, 9, enabled=True)


@given(st.lists(ranges, max_size=6), ranges)
def test_runs_are_what_was_marked(marked, asked):
    bitmap, dirty = made(), set()
    for start, end in marked:
        bitmap.mark(start, end)
        if end > start:
            dirty |= set(range(start // GRANULE, (end - 1) // GRANULE + 1))
    start, end = asked
    runs = list(bitmap.runs(start, end))
    expected = []
    for is_dirty, granules in groupby(range(start // GRANULE, -(-end // GRANULE)), key=dirty.__contains__):
        granule = list(granules)
        expected.append((min(end, (granule[-1] + 1) * GRANULE) - max(start, granule[0] * GRANULE), is_dirty))
    assert runs == (expected if end > start else [])


def test_a_user_keeps_others_away_until_it_has_gone():
    bitmap = made()
    bitmap.acquire("export 'e'")
    with pytest.raises(Error, match="Bitmap 'b' is currently in use by another operation and cannot be used") as caught:
        bitmap.acquire("export 'f'")
    assert caught.value.kind is ErrorKind.BUSY
    assert caught.value.hint == "It is used by export 'e'."
    bitmap.release()
    bitmap.acquire("export 'f'")


def test_one_that_missed_writes_is_not_used():
    bitmap = made()
    bitmap.inconsistent = True
    with pytest.raises(Error, match="Bitmap 'b' is inconsistent and cannot be used"):
        bitmap.acquire("a test")
