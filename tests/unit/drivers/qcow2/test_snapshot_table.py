import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.drivers.qcow2.header import Header
from blkferry.drivers.qcow2.snapshot_table import NO_ICOUNT, Snapshot, SnapshotTableReader, build, parse
from blkferry.errors import Error, ErrorKind

HEADER = Header(
    size=1 << 20,
    l1_size=1,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
    nb_snapshots=2,
    snapshots_offset=0x70000,
)
VERSION_2 = dataclasses.replace(HEADER, version=2)

# qemu-img create -f qcow2 snapshots.qcow2 1M; qemu-img snapshot -c one snapshots.qcow2;
# qemu-img snapshot -c two snapshots.qcow2
TABLE = bytes.fromhex(
    "000000000004000000000001000100036b06483034323e6000000000000000000000000000000018"
    "000000000000000000000000001000000000000000000000316f6e6500000000"
    "000000000006000000000001000100036b06483034db671000000000000000000000000000000018"
    "0000000000000000000000000010000000000000000000003274776f"
)
SNAPSHOTS = [
    Snapshot(
        id="1",
        name="one",
        l1_table_offset=0x40000,
        l1_size=1,
        date_sec=1795573808,
        date_nsec=875708000,
        vm_clock_nsec=0,
        disk_size=1 << 20,
        icount=0,
    ),
    Snapshot(
        id="2",
        name="two",
        l1_table_offset=0x60000,
        l1_size=1,
        date_sec=1795573808,
        date_nsec=886794000,
        vm_clock_nsec=0,
        disk_size=1 << 20,
        icount=0,
    ),
]


def entry(*, l1_offset=0x40000, l1_size=1, name=b"n", extra=bytes(16), extra_size=None, state=0) -> bytes:
    length = len(extra) if extra_size is None else extra_size
    return struct.pack(">QIHHIIQII", l1_offset, l1_size, 1, len(name), 0, 0, 0, state, length) + extra + b"1" + name


def refusal(data: bytes, count: int = 1, header: Header = HEADER) -> Error:
    with pytest.raises(Error) as caught:
        parse(data, count, header)
    assert caught.value.kind == ErrorKind.CORRUPT
    assert isinstance(caught.value.facts["offset"], int)
    return caught.value


class TestGolden:
    def test_parse(self):
        assert parse(TABLE, 2, HEADER) == SNAPSHOTS

    def test_build(self):
        assert build(SNAPSHOTS) == TABLE + bytes(4)

    def test_none(self):
        assert parse(b"", 0, HEADER) == []
        assert build([]) == b""


class TestExtraData:
    def test_none_in_version_2(self):
        (snapshot,) = parse(entry(extra=b"", state=7), 1, VERSION_2)
        assert (snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) == (7, None, NO_ICOUNT)
        assert parse(build([snapshot]), 1, VERSION_2) == [snapshot]

    def test_large_vm_state_counts(self):
        (snapshot,) = parse(entry(extra=struct.pack(">Q", 1 << 40), state=7), 1, VERSION_2)
        assert (snapshot.vm_state_size, snapshot.disk_size) == (1 << 40, None)
        # Programs that know only 32 bits must see no VM state rather than a part of it.
        assert build([snapshot])[32:36] == bytes(4)

    def test_fields_that_are_cut_off_are_not_there(self):
        (snapshot,) = parse(entry(extra=struct.pack(">QQ", 0, 512) + b"\1\2\3\4"), 1, HEADER)
        assert (snapshot.disk_size, snapshot.icount, snapshot.unknown_extra) == (512, NO_ICOUNT, b"")

    def test_unknown_is_kept(self):
        table = entry(extra=struct.pack(">QQq", 0, 512, -1) + b"new")
        (snapshot,) = parse(table, 1, HEADER)
        assert (snapshot.icount, snapshot.unknown_extra) == (-1, b"new")
        assert build([snapshot]).startswith(table)

    def test_version_3_must_have_the_disk_size(self):
        assert str(refusal(entry(extra=bytes(15)))) == "Snapshot table entry 0 is incomplete"

    def test_too_much(self):
        expected = "Too much extra metadata in snapshot table entry 1"
        assert str(refusal(entry(extra=bytes(16)).ljust(64, b"\0") + entry(extra_size=1025), 2)) == expected
        assert len(parse(entry(extra=bytes(1024)), 1, HEADER)) == 1


class TestRefused:
    @pytest.mark.parametrize("length", [0, 39, 40, 60, 67, 100, len(TABLE) - 1])
    def test_cut_off(self, length):
        assert str(refusal(TABLE[:length], 2)) == "Snapshot table at 0x70000 is cut off"

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"l1_size": (4 << 20) + 1}, "Snapshot L1 table too large"),
            ({"l1_offset": 0x40200}, "Snapshot L1 table offset invalid"),
            ({"l1_offset": 0}, "Snapshot L1 table offset invalid"),
            ({"l1_offset": 1 << 63}, "Snapshot L1 table offset invalid"),
        ],
    )
    def test_l1_table(self, fields, sentence):
        assert str(refusal(entry(**fields))) == sentence

    def test_too_many(self):
        assert str(refusal(b"", 65537)) == "Snapshot table too large"

    def test_too_big(self):
        large = entry(name=bytes(65535))
        large += bytes(-len(large) % 8)
        reader = SnapshotTableReader(1100, HEADER)
        with pytest.raises(Error, match="Snapshot table is too big"):
            for _ in range(1100):
                reader.receive(large)
        assert reader.length <= 64 << 20


class TestReader:
    def test_whole_clusters(self):
        reader = SnapshotTableReader(2, HEADER)
        assert reader.wanted == 40
        reader.receive(TABLE + b"something else in this cluster")
        assert (reader.wanted, reader.snapshots, reader.length) == (0, SNAPSHOTS, len(TABLE))
        reader.receive(b"more")
        assert reader.snapshots == SNAPSHOTS

    def test_what_it_wants_is_enough(self):
        reader = SnapshotTableReader(2, HEADER)
        position = reads = 0
        while wanted := reader.wanted:
            reader.receive(TABLE[position : position + wanted])
            position += wanted
            reads += 1
        assert reader.snapshots == SNAPSHOTS
        assert reads <= 4


@pytest.mark.parametrize(
    "snapshot",
    [
        dataclasses.replace(SNAPSHOTS[0], disk_size=None),
        dataclasses.replace(SNAPSHOTS[0], name="x" * 65536),
        dataclasses.replace(SNAPSHOTS[0], unknown_extra=bytes(1001)),
    ],
)
def test_build_refuses(snapshot):
    with pytest.raises(Error) as caught:
        build([snapshot])
    assert caught.value.kind == ErrorKind.INVALID_ARGUMENT


def test_build_refuses_too_many():
    with pytest.raises(Error) as caught:
        build(SNAPSHOTS * 32769)
    assert caught.value.kind == ErrorKind.NO_SPACE


names = st.binary(max_size=40).map(lambda name: name.replace(b"\0", b"x").decode(errors="surrogateescape"))
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)


@st.composite
def snapshots(draw) -> Snapshot:
    known = draw(st.booleans())
    return Snapshot(
        id=draw(names),
        name=draw(names),
        l1_table_offset=draw(st.integers(1, 1 << 40)) << 16,
        l1_size=draw(st.integers(0, 4 << 20)),
        date_sec=draw(u32),
        date_nsec=draw(u32),
        vm_clock_nsec=draw(u64),
        vm_state_size=draw(u64),
        disk_size=draw(u64) if known else None,
        icount=draw(st.integers(-1, 1 << 62)) if known else NO_ICOUNT,
        unknown_extra=draw(st.binary(max_size=1000)) if known else b"",
    )


@given(st.lists(snapshots(), max_size=5), st.integers(1, 200))
def test_round_trip_in_pieces(some, length):
    table = build(some)
    assert parse(table, len(some), VERSION_2) == some
    reader = SnapshotTableReader(len(some), VERSION_2)
    for at in range(0, len(table), length):
        reader.receive(table[at : at + length])
    assert (reader.wanted, reader.snapshots) == (0, some)
    assert build(reader.snapshots) == table
