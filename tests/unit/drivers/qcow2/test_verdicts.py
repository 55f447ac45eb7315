"""Verdicts on entries: what is wrong, what it uses, and that the repaired entry has nothing wrong."""

import random

import pytest

from blkferry.drivers.qcow2.entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET, ZERO
from blkferry.drivers.qcow2.header import Header, Incompatible
from blkferry.drivers.qcow2.verdicts import Judge

CLUSTER = 16384
FILE_SIZE = 100 * CLUSTER + 512


def judge(*, version=3, extended=False, data_file=False) -> Judge:
    incompatible = Incompatible.EXTENDED_L2 if extended else Incompatible(0)
    header = Header(
        version=version,
        cluster_bits=14,
        size=1 << 20,
        l1_size=1,
        l1_table_offset=CLUSTER,
        refcount_table_offset=2 * CLUSTER,
        refcount_table_clusters=1,
        incompatible=incompatible,
    )
    return Judge(header, FILE_SIZE, has_data_file=data_file)


KINDS = {
    "v2": {"version": 2},
    "v3": {},
    "extended": {"extended": True},
    "data file": {"data_file": True},
    "extended, data file": {"extended": True, "data_file": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_repaired_entries_are_sound(kind):
    each = judge(**KINDS[kind])
    rng = random.Random(kind)
    for _ in range(5000):
        place = rng.randrange(102) * CLUSTER + rng.choice((0, 0, 512))
        entry = place | rng.choice((0, COPIED, COMPRESSED, ZERO, COPIED | ZERO, 1 << 57, rng.getrandbits(64)))
        bitmap = rng.choice((0, 1, 1 << 32, rng.getrandbits(64))) if each.extended else 0
        guest = rng.randrange(100) * CLUSTER
        verdict = each.l2(entry, bitmap, guest)
        again = each.l2(verdict.repaired, verdict.repaired_bitmap, guest)
        assert again.complaints == []
        assert (again.repaired, again.repaired_bitmap) == (verdict.repaired, verdict.repaired_bitmap)
        if not verdict.complaints:
            assert (verdict.repaired, verdict.repaired_bitmap) == (entry, bitmap)
        if again.length:
            assert again.offset + again.length < FILE_SIZE + CLUSTER


@pytest.mark.parametrize(
    ("entry", "repaired", "repaired_bitmap"),
    [
        (5 * CLUSTER | COPIED, 5 * CLUSTER | COPIED, 0),
        (100 * CLUSTER, 100 * CLUSTER, 0),  # its cluster is cut off, but begins in the file
        (101 * CLUSTER, ZERO, 0),
        (5 * CLUSTER + 512, ZERO, 0),
        (COMPRESSED | COPIED | 700, COMPRESSED | 700, 0),
        (ZERO, ZERO, 0),
        (0, 0, 0),
    ],
)
def test_version_3(entry, repaired, repaired_bitmap):
    verdict = judge().l2(entry, 0, None)
    assert (verdict.repaired, verdict.repaired_bitmap) == (repaired, repaired_bitmap)


def test_version_2_has_no_zero_flag():
    assert judge(version=2).l2(101 * CLUSTER, 0, None).repaired == 0


def test_lost_subclusters_read_as_zeroes():
    verdict = judge(extended=True).l2(101 * CLUSTER, 6 | 1 << 32, None)
    assert (verdict.repaired, verdict.repaired_bitmap) == (0, 7 << 32)
    verdict = judge(extended=True).l2(COMPRESSED | 1 << 40, 0, None)
    assert (verdict.repaired, verdict.repaired_bitmap) == (0, ALL_ZERO)


def test_l1_entries():
    each = judge()
    assert each.l1(5 * CLUSTER | COPIED) == ([], 5 * CLUSTER | COPIED)
    for entry, repaired in ((COPIED, 0), (5 * CLUSTER + 512, 0), (101 * CLUSTER, 0), (5 * CLUSTER | 8, 5 * CLUSTER)):
        complaints, found = each.l1(entry)
        assert complaints
        assert found == repaired
    assert each.l1(OFFSET)[1] == 0
