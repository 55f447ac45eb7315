import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.drivers.qcow2.bitmap_directory import (
    ALL_ONES,
    BitmapEntry,
    BitmapFlags,
    build,
    build_table,
    parse,
    parse_table,
    table_size_of,
)
from blkferry.drivers.qcow2.extensions import BitmapsExtension
from blkferry.drivers.qcow2.header import Autoclear, Header
from blkferry.errors import Error, ErrorKind

CLUSTER = 8192
HEADER = Header(
    size=64 << 20,
    cluster_bits=13,
    l1_size=8,
    l1_table_offset=0x6000,
    refcount_table_offset=0x2000,
    refcount_table_clusters=1,
    autoclear=Autoclear.BITMAPS,
    bitmaps=BitmapsExtension(count=2, directory_size=64, directory_offset=0x10000),
)

# qemu-img create -f qcow2 -o cluster_size=8k bitmaps.qcow2 64M; qemu-img bitmap --add bitmaps.qcow2 first;
# qemu-img bitmap --add --disable -g 4096 bitmaps.qcow2 second
DIRECTORY = bytes.fromhex(
    "000000000000c0000000000100000002010d0005000000006669727374000000"
    "000000000000e0000000000100000000010c0006000000007365636f6e640000"
)
ENTRIES = [
    BitmapEntry(name="first", table_offset=0xC000, table_size=1, flags=BitmapFlags.AUTO, granularity_bits=13),
    BitmapEntry(name="second", table_offset=0xE000, table_size=1, granularity_bits=12),
]


def entry(
    *, offset=0xC000, size=1, flags=0, kind=1, granularity=16, name=b"name", name_size=None, extra=b"", extra_size=None
):
    head = struct.pack(
        *(">QIIBBHI", offset, size, flags, kind, granularity),
        *(len(name) if name_size is None else name_size, len(extra) if extra_size is None else extra_size),
    )
    data = head + extra + name
    return data + bytes(-len(data) % 8)


def refusal(data: bytes, count: int = 1, header: Header = HEADER) -> Error:
    with pytest.raises(Error) as caught:
        parse(data, count, header)
    assert caught.value.kind == ErrorKind.CORRUPT
    assert caught.value.facts["structure"] == "bitmap directory"
    assert isinstance(caught.value.facts["offset"], int)
    return caught.value


class TestGolden:
    def test_parse(self):
        assert parse(DIRECTORY, 2, HEADER) == ENTRIES

    def test_build(self):
        assert build(ENTRIES, HEADER) == DIRECTORY


class TestConstraints:
    @pytest.mark.parametrize(
        "fields",
        [
            {"offset": 0},
            {"offset": 0xC200},
            {"offset": 1 << 63},
            {"size": 0},
            {"size": 2},  # more than the disk needs
            {"size": 65537, "flags": 1},  # 512 MiB and a cluster
            {"size": 0xFFFFFFFF, "flags": 1},
            {"granularity": 64},
            {"granularity": 9, "size": 3},  # the disk needs 2
            {"flags": 8},
            {"flags": 0x80000000},
            {"kind": 0},
            {"kind": 2},
            {"name": b"x" * 1024},
        ],
    )
    def test_refused(self, fields):
        name = fields.get("name", b"name")[:1023].decode()
        assert str(refusal(entry(**fields))) == f"Bitmap '{name}' doesn't satisfy the constraints"

    @pytest.mark.parametrize("name", [b"", b"\0hidden"])
    def test_nameless(self, name):
        assert str(refusal(entry(name=name))) == "Bitmap '' doesn't satisfy the constraints"

    def test_table_of_a_bitmap_in_use_may_have_another_size(self):
        (bitmap,) = parse(entry(size=5, flags=BitmapFlags.IN_USE), 1, HEADER)
        assert BitmapFlags.IN_USE in bitmap.flags

    def test_longest_name(self):
        assert parse(entry(name=b"x" * 1023), 1, HEADER)[0].name == "x" * 1023

    def test_names_in_sentences_are_printable(self):
        assert str(refusal(entry(name=b"a\x1b[2J\xff", kind=0))) == "Bitmap 'a?[2J?' doesn't satisfy the constraints"


class TestUsable:
    @pytest.mark.parametrize(("granularity", "usable"), [(8, False), (9, True), (31, True), (32, False), (63, False)])
    def test_granularity(self, granularity, usable):
        needed = table_size_of(HEADER.size, granularity, CLUSTER)
        (bitmap,) = parse(entry(granularity=granularity, size=needed), 1, HEADER)
        assert bitmap.usable is usable

    @pytest.mark.parametrize(("flags", "usable"), [(0, False), (BitmapFlags.EXTRA_DATA_COMPATIBLE, True)])
    def test_extra_data(self, flags, usable):
        data = entry(extra=b"extra", flags=flags)
        (bitmap,) = parse(data, 1, HEADER)
        assert (bitmap.extra_data, bitmap.usable) == (b"extra", usable)
        assert build([bitmap], HEADER) == data


class TestDirectory:
    @pytest.mark.parametrize(
        "data",
        [
            DIRECTORY[:16],
            DIRECTORY[:32] + DIRECTORY[32:55],
            DIRECTORY[:-8],
            entry(name_size=1000),
            entry(extra_size=0xFFFFFFFF),
            entry()[:-1] + b"x",  # padding
            entry() * 2,  # the same name
        ],
    )
    def test_broken(self, data):
        assert str(refusal(data, 2)) == "Broken bitmap directory"

    def test_more(self):
        assert str(refusal(DIRECTORY, 1)) == "More bitmaps found than specified in header extension"

    @pytest.mark.parametrize("data", [b"", DIRECTORY])
    def test_less(self, data):
        assert str(refusal(data, 3)) == "Less bitmaps found than specified in header extension"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"name": ""}, ErrorKind.INVALID_ARGUMENT),
        ({"name": "x" * 1024}, ErrorKind.INVALID_ARGUMENT),
        ({"table_offset": 1}, ErrorKind.CORRUPT),
    ],
)
def test_build_refuses(changes, kind):
    with pytest.raises(Error) as caught:
        build([dataclasses.replace(ENTRIES[0], **changes)], HEADER)
    assert caught.value.kind == kind


def test_build_refuses_one_name_twice():
    with pytest.raises(Error) as caught:
        build(ENTRIES[:1] * 2, HEADER)
    assert caught.value.kind == ErrorKind.EXISTS


def test_build_refuses_too_many():
    entries = [dataclasses.replace(ENTRIES[0], name=str(number)) for number in range(65536)]
    with pytest.raises(Error) as caught:
        build(entries, HEADER)
    assert caught.value.kind == ErrorKind.NO_SPACE


@pytest.mark.parametrize(
    ("size", "granularity", "entries"),
    [(0, 16, 0), (1, 16, 1), (1 << 32, 16, 1), ((1 << 32) + 1, 16, 2), (1 << 40, 9, 32768)],
)
def test_table_size_of(size, granularity, entries):
    assert table_size_of(size, granularity, CLUSTER) == entries


class TestTable:
    ENTRIES = (0, ALL_ONES, CLUSTER, (1 << 56) - CLUSTER)

    def test_round_trip(self):
        data = struct.pack(">4Q", *self.ENTRIES)
        assert parse_table(data, CLUSTER) == list(self.ENTRIES)
        assert build_table(self.ENTRIES, CLUSTER) == data

    @pytest.mark.parametrize("wrong", [2, 0x100, 3, CLUSTER + 1, CLUSTER + 512, 1 << 56, 1 << 63, 1 << 63 | 1])
    def test_refused(self, wrong):
        with pytest.raises(Error, match="Bitmap table entry 1 is invalid"):
            parse_table(struct.pack(">2Q", 0, wrong), CLUSTER)
        with pytest.raises(Error, match="Bitmap table entry 1 is invalid"):
            build_table([0, wrong], CLUSTER)


names = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"x").decode(errors="surrogateescape"))


@st.composite
def entries(draw) -> BitmapEntry:
    granularity = draw(st.integers(9, 63))
    flags = BitmapFlags(draw(st.integers(0, 7)))
    in_use = BitmapFlags.IN_USE in flags
    return BitmapEntry(
        name=draw(names),
        table_offset=draw(st.integers(1, 1 << 40)) << 13,
        table_size=draw(st.integers(1, 65536)) if in_use else table_size_of(HEADER.size, granularity, CLUSTER),
        flags=flags,
        granularity_bits=granularity,
        extra_data=draw(st.binary(max_size=20)),
    )


@given(st.lists(entries(), max_size=5, unique_by=lambda bitmap: bitmap.name))
def test_round_trip(some):
    directory = build(some, HEADER)
    assert parse(directory, len(some), HEADER) == some
    assert build(parse(directory, len(some), HEADER), HEADER) == directory
