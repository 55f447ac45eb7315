"""Dirty bitmaps against a list of booleans."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error
from blkferry.graph.bitmaps import DirtyBitmap

SIZE = 1 << 20
ranges = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(sorted).filter(lambda r: r[0] < r[1]))


def marked(size, bits, pairs):
    """A bitmap, and its granules as a list."""
    bitmap = DirtyBitmap("b", size, bits, enabled=True)
    model = [False] * bitmap.count
    for start, end in pairs:
        start, end = min(start, size - 1), min(end, size)
        if start < end:
            bitmap.mark(start, end)
            for number in range(start >> bits, (end - 1 >> bits) + 1):
                model[number] = True
    return bitmap, model


@given(ranges, st.integers(9, 18), st.integers(1, SIZE), st.data())
def test_runs_and_counts_are_those_of_the_model(pairs, bits, size, data):
    bitmap, model = marked(size, bits, pairs)
    start = data.draw(st.integers(0, size))
    at, found = start, list(bitmap.runs(start, size))
    assert all(one[1] != other[1] for one, other in itertools.pairwise(found))
    for length, dirty in found:
        assert length > 0
        assert {model[number] for number in range(at >> bits, (at + length - 1 >> bits) + 1)} == {dirty}
        at += length
    assert at == size
    assert bitmap.dirty_bytes == sum(length for length, dirty in bitmap.runs(0, size) if dirty)


@given(ranges, ranges, st.integers(9, 15), st.integers(9, 15), st.integers(1, SIZE))
def test_merging_covers_both_and_no_more_than_granules(one, other, bits, other_bits, size):
    target, model = marked(size, bits, one)
    source, theirs = marked(size, other_bits, other)
    target.merge(source)
    for number in range(target.count):
        first, last = number << bits, min(number + 1 << bits, size) - 1
        touched = any(theirs[each] for each in range(first >> other_bits, (last >> other_bits) + 1))
        assert next(target.runs(first, last + 1)) == (last + 1 - first, model[number] or touched)


@given(ranges, st.integers(9, 15), st.integers(1, SIZE), st.integers(1, SIZE))
def test_another_size_keeps_what_is_left(pairs, bits, size, other):
    bitmap, model = marked(size, bits, pairs)
    bitmap.resize(other)
    bitmap.resize(size)
    kept = min(-(-size >> bits), -(-other >> bits))
    assert [next(bitmap.runs(n << bits, (n << bits) + 1))[1] for n in range(len(model))] == [
        *model[:kept],
        *[False] * (len(model) - kept),
    ]


def test_whoever_uses_it_has_it_alone():
    bitmap = DirtyBitmap("b", SIZE, 16, enabled=True)
    bitmap.acquire("export 'e'")
    with pytest.raises(Error, match="Bitmap 'b' is currently in use by another operation and cannot be used"):
        bitmap.acquire("job 'j'")
    bitmap.release()
    bitmap.acquire("job 'j'")


def test_different_sizes_do_not_merge():
    with pytest.raises(Error, match="destination size is 1048576, source size is 512"):
        DirtyBitmap("b", SIZE, 16, enabled=True).merge(DirtyBitmap("c", 512, 16, enabled=True))
