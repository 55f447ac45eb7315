import random
from array import array

import pytest

from blkferry.drivers.qcow2.refcount_codec import codec

ORDERS = range(7)


@pytest.mark.parametrize("order", ORDERS)
def test_any_bytes_survive(order):
    data = random.Random(order).randbytes(4096)
    entries = codec(order).load(data)
    assert len(entries) == codec(order).entries(4096)
    assert max(entries) <= codec(order).maximum
    assert codec(order).dump(entries) == data


@pytest.mark.parametrize(
    ("order", "data", "entries"),
    [
        (0, b"\x01\x80", [1, *[0] * 14, 1]),
        (1, b"\xe4\x02", [0, 1, 2, 3, 2, 0, 0, 0]),
        (2, b"\x21\xf0", [1, 2, 0, 15]),
        (3, b"\x01\xff", [1, 255]),
        (4, b"\x00\x01\x80\x00", [1, 0x8000]),
        (5, b"\x00\x00\x00\x02", [2]),
        (6, b"\x80\x00\x00\x00\x00\x00\x00\x01", [(1 << 63) + 1]),
    ],
)
def test_layout(order, data, entries):
    assert list(codec(order).load(data)) == entries
    made = codec(order).new(len(entries))
    made[:] = array(made.typecode, entries) if isinstance(made, array) else bytes(entries)
    assert codec(order).dump(made) == data


@pytest.mark.parametrize("order", ORDERS)
def test_dump_leaves_the_entries_alone(order):
    entries = codec(order).new(64)
    entries[3] = codec(order).maximum
    before = list(entries)
    assert codec(order).dump(entries) == codec(order).dump(entries)
    assert list(entries) == before


@pytest.mark.parametrize("order", ORDERS)
def test_find_free(order):
    each = codec(order)
    entries = each.new(64)
    assert each.find_free(entries, 0) == 0
    for index in range(64):
        entries[index] = 1
    assert each.find_free(entries, 0) == -1
    entries[40] = 0
    assert each.find_free(entries, 0) == each.find_free(entries, 40) == 40
    assert each.find_free(entries, 41) == -1
    assert each.find_free(entries, 64) == -1


@pytest.mark.parametrize("order", [-1, 7])
def test_no_such_width(order):
    with pytest.raises(ValueError, match="order"):
        codec(order)
