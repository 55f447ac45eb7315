import random

import pytest

from blkferry.drivers.qcow2 import counts
from blkferry.drivers.qcow2.counts import HIGH, Counts
from blkferry.drivers.qcow2.refcount_codec import codec
from blkferry.errors import Error


@pytest.mark.parametrize("count", [0, 1, HIGH - 1, HIGH, HIGH + 1, 1 << 63])
def test_what_is_set_is_there(count):
    found = Counts(3)
    found[1] = count
    assert [found[each] for each in range(3)] == [0, count, 0]
    found[1] = 2
    assert found[1] == 2


@pytest.mark.parametrize("order", range(7))
def test_loading(order):
    entries = codec(order).load(random.Random(order).randbytes(512))
    found = Counts(len(entries) + 3)
    found.load(3, entries)
    assert [found[each] for each in range(3, len(entries) + 3)] == list(entries)
    cut = Counts(10)
    cut.load(3, entries)
    assert [cut[each] for each in range(10)] == [0, 0, 0, *entries[:7]]


def test_differences(monkeypatch):
    monkeypatch.setattr(counts, "_PIECE", 16)
    rng = random.Random(3)
    ours, theirs = Counts(100), Counts(100)
    for each in range(100):
        ours[each] = theirs[each] = rng.choice((0, 1, HIGH, 1 << 40))
    assert list(ours.differences(theirs)) == []
    changed = [0, 15, 16, 50, 99]
    for each in changed:
        ours[each] += 1
    assert list(ours.differences(theirs)) == changed
    assert list(theirs.differences(ours)) == changed


def test_the_last(monkeypatch):
    monkeypatch.setattr(counts, "_PIECE", 16)
    found = Counts(100)
    assert found.last() == -1
    for each in (0, 3, 15, 16, 98, 99):
        found[each] = 256
        assert found.last() == each
    found[99] = 0
    assert found.last() == 98


def test_any():
    found = Counts(100)
    found[40] = 1
    assert found.any_in(40, 41)
    assert found.any_in(0, 1000)
    assert not found.any_in(0, 40)
    assert not found.any_in(41, 1000)


def test_too_many_high_ones_are_refused(monkeypatch):
    monkeypatch.setattr(counts, "MAX_HIGH_COUNTS", 2)
    found = Counts(4)
    found[0] = found[1] = HIGH
    with pytest.raises(Error):
        found[2] = HIGH
