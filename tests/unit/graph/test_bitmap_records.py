"""The bitmaps of a node share one record, and each says what it would if it were told of every write itself."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blkferry.graph.bitmaps import DirtyBitmap, DirtyBitmaps
from blkferry.graph.granules import coarser

names = st.sampled_from(["a", "b", "c", "d"])
sizes = st.integers(1, 1 << 18)
chosen = st.randoms(use_true_random=False)


class Records(RuleBasedStateMachine):
    """`model` has the numbers of the granules that are dirty, of each bitmap."""

    @initialize(size=sizes)
    def begin(self, size):
        self.size = size
        self.bitmaps = DirtyBitmaps()
        self.model: dict[str, set[int]] = {}

    def granules(self, name, start, end):
        shift = self.bitmaps[name].granularity_bits
        return set(range(start >> shift, (end - 1 >> shift) + 1))

    @rule(at=st.integers(0, 1 << 18), length=st.sampled_from([1, 512, 4096, 70_000]))
    def write(self, at, length):
        start, end = at % self.size, min(at % self.size + length, self.size)
        if self.bitmaps.written is not None:
            self.bitmaps.written.mark(start, end)
        for name, bitmap in self.bitmaps.items():
            if bitmap.enabled:
                self.model[name] |= self.granules(name, start, end)

    @rule(name=names, bits=st.integers(9, 17), enabled=st.booleans())
    def add(self, name, bits, enabled):
        self.bitmaps[name] = DirtyBitmap(name, self.size, bits, enabled=enabled)
        self.model[name] = set()

    @precondition(lambda self: self.model)
    @rule(random=chosen)
    def remove_and_perhaps_think_better_of_it(self, random):
        name = random.choice(list(self.model))
        before = dict(self.bitmaps)
        del self.bitmaps[name]
        if random.random() < 0.5:
            self.bitmaps.replace(before)
        else:
            del self.model[name]

    @precondition(lambda self: self.model)
    @rule(random=chosen)
    def clear_and_perhaps_think_better_of_it(self, random):
        name = random.choice(list(self.model))
        before = self.bitmaps[name].clear()
        if random.random() < 0.5:
            self.bitmaps[name].restore(before)
        else:
            self.model[name] = set()

    @precondition(lambda self: self.model)
    @rule(random=chosen, enabled=st.booleans())
    def record(self, random, enabled):
        self.bitmaps[random.choice(list(self.model))].enabled = enabled

    @precondition(lambda self: self.model)
    @rule(random=chosen)
    def merge(self, random):
        into, source = random.choice(list(self.model)), random.choice(list(self.model))
        self.bitmaps[into].merge(self.bitmaps[source])
        shift = self.bitmaps[source].granularity_bits
        for number in set(self.model[source]):
            self.model[into] |= self.granules(into, number << shift, min(number + 1 << shift, self.size))

    @rule(size=sizes)
    def resize(self, size):
        self.size = size
        self.bitmaps.fit(size)
        for name, bitmap in self.bitmaps.items():
            self.model[name] = {number for number in self.model[name] if number < bitmap.count}

    @rule(name=names)
    def store(self, name):
        if name in self.bitmaps:
            self.bitmaps[name].take_over()
            assert self.bitmaps[name].bits == self.bitmaps[name].array

    @invariant()
    def each_says_what_the_model_does(self):
        for name, bitmap in getattr(self, "bitmaps", {}).items():
            expected = sum(1 << number for number in self.model[name])
            assert int.from_bytes(bitmap.bits, "little") == expected
            at, found = 0, set()
            for length, dirty in bitmap.runs(0, self.size):
                if dirty:
                    found |= self.granules(name, at, at + length)
                at += length
            assert at == self.size
            assert found == self.model[name]


TestRecords = Records.TestCase
TestRecords.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_bitmap_tells_whether_it_has_changed_only_if_it_has():
    bitmaps = DirtyBitmaps()
    bitmaps["b"] = bitmap = DirtyBitmap("b", 1 << 20, 16, enabled=True)
    bitmap.take_over()
    assert not bitmap.changed
    assert bitmaps.written is not None
    bitmaps.written.mark(5, 6)
    bitmap.take_over()
    assert bitmap.changed
    bitmap.changed = False
    bitmaps.written.mark(0, 512)
    bitmaps["other"] = DirtyBitmap("other", 1 << 20, 9, enabled=True)
    assert not bitmap.changed


def test_a_granule_stays_dirty_though_what_was_written_of_it_is_cut_off():
    """It may come back as zeroes: the node grows again, and whoever had copied it has something else."""
    bitmaps = DirtyBitmaps()
    bitmaps["coarse"] = DirtyBitmap("coarse", 1024, 10, enabled=True)
    bitmaps["fine"] = DirtyBitmap("fine", 1024, 9, enabled=True)
    assert bitmaps.written is not None
    bitmaps.written.mark(512, 1024)
    bitmaps.fit(512)
    bitmaps.fit(1024)
    assert bitmaps["coarse"].bits == b"\1"
    assert bitmaps["fine"].bits == b"\0"


def test_whoever_marks_in_a_record_himself_may_go_on_when_it_is_made_shorter_or_longer():
    bitmaps = DirtyBitmaps()
    bitmaps["b"] = DirtyBitmap("b", 1 << 20, 9, enabled=True)
    assert bitmaps.written is not None
    array = bitmaps.written.array
    for size in (1 << 10, 1 << 22):
        bitmaps.fit(size)
        array[(1 << 11) - 1 >> 3] |= 1
        assert bitmaps.written.array is array


@pytest.mark.parametrize("steps", range(12))
def test_coarser_granules_are_dirty_where_one_of_the_finer_ones_is(steps):
    bits = bytes(number * 7 % 256 if number % 5 == 0 else 0 for number in range(300))
    fine = int.from_bytes(bits, "little")
    found = int.from_bytes(coarser(bits, steps), "little")
    width = 1 << steps
    for number in range(-(-len(bits) * 8 // width)):
        assert found >> number & 1 == bool(fine >> number * width & (1 << width) - 1)
