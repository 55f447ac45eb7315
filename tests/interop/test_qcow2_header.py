"""Images that qemu-img made parse to what it says of them, build to the same bytes, and are refused as it does."""

import itertools
import json
import struct
from pathlib import Path

import pytest

from blkferry.drivers.qcow2 import bitmap_directory, snapshot_table
from blkferry.drivers.qcow2.bitmap_directory import BitmapFlags
from blkferry.drivers.qcow2.header import Autoclear, Compatible, Header, Incompatible
from blkferry.errors import Error
from peers import requires, run

pytestmark = requires("qemu-img")

SIZE = 64 << 20


def create(path: Path, *arguments: str, size: int = SIZE, **options: object) -> Path:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", text] if text else []), *arguments, path, str(size))
    return path


def parse(path: Path) -> Header:
    """The header, which must also build to what is in the file."""
    image = path.read_bytes()
    head = image[: 1 << Header.cluster_bits_of(image[:104])]
    header = Header.parse(head, file_size=len(image))
    assert header.build().ljust(header.cluster_size, b"\0") == head.ljust(header.cluster_size, b"\0")
    return header


def agree(path: Path, header: Header) -> dict:
    """Compare with `qemu-img info`, which is returned."""
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", path).stdout)
    data = info["format-specific"]["data"]
    assert (header.size, header.cluster_size) == (info["virtual-size"], info["cluster-size"])
    assert header.version == {"0.10": 2, "1.1": 3}[data["compat"]]
    assert header.refcount_bits == data["refcount-bits"]
    assert header.compression_type.name.lower() == data["compression-type"]
    assert (Compatible.LAZY_REFCOUNTS in header.compatible) == data.get("lazy-refcounts", False)
    assert header.extended_l2 == data.get("extended-l2", False)
    assert (Incompatible.CORRUPT in header.incompatible) == data.get("corrupt", False)
    assert header.data_file == data.get("data-file")
    assert (Autoclear.DATA_FILE_RAW in header.autoclear) == data.get("data-file-raw", False)
    assert header.backing_file == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    assert header.nb_snapshots == len(info.get("snapshots", []))
    assert (header.bitmaps.count if header.bitmaps else 0) == len(data.get("bitmaps", []))
    return info


@pytest.mark.parametrize("cluster_bits", range(9, 22))
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_cluster_sizes(tmp_path, compat, cluster_bits):
    image = create(tmp_path / "a.qcow2", compat=compat, cluster_size=1 << cluster_bits)
    agree(image, parse(image))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_bits(tmp_path, bits):
    image = create(tmp_path / "a.qcow2", refcount_bits=bits)
    agree(image, parse(image))


@pytest.mark.parametrize("size", [0, 512, 1 << 40, 32 << 40])
def test_sizes(tmp_path, size):
    image = create(tmp_path / "a.qcow2", size=size)
    agree(image, parse(image))


@pytest.mark.parametrize(
    ("extended_l2", "compression_type", "lazy_refcounts", "data"),
    list(itertools.product(["off", "on"], ["zlib", "zstd"], ["off", "on"], [None, "off", "on"])),
)
def test_features(tmp_path, extended_l2, compression_type, lazy_refcounts, data):
    data_file = {} if data is None else {"data_file": tmp_path / "data.raw", "data_file_raw": data}
    image = create(
        tmp_path / "a.qcow2",
        extended_l2=extended_l2,
        compression_type=compression_type,
        lazy_refcounts=lazy_refcounts,
        cluster_size="32k",
        **data_file,
    )
    agree(image, parse(image))


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_backing_file(tmp_path, compat, cluster_size):
    base = tmp_path / "Träger.raw"
    base.write_bytes(bytes(512))
    image = create(tmp_path / "a.qcow2", "-b", str(base), "-F", "raw", compat=compat, cluster_size=cluster_size)
    info = agree(image, parse(image))
    assert info["backing-filename"] == str(base)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_snapshots(tmp_path, compat, cluster_size):
    image = create(tmp_path / "a.qcow2", compat=compat, cluster_size=cluster_size, size=1 << 20)
    names = ["one", "zwei ü", "x" * 200, "four", "five"]
    for name in names:
        run("qemu-img", "snapshot", "-c", name, image)
    header = parse(image)
    info = agree(image, header)
    with image.open("rb") as file:
        file.seek(header.snapshots_offset)
        reader = snapshot_table.SnapshotTableReader(header.nb_snapshots, header)
        while wanted := reader.wanted:
            reader.receive(file.read(max(wanted, 256)))
        file.seek(header.snapshots_offset)
        table = file.read(reader.length)
    assert snapshot_table.build(reader.snapshots).rstrip(b"\0") == table.rstrip(b"\0")
    for snapshot, said in zip(reader.snapshots, info["snapshots"], strict=True):
        assert (snapshot.id, snapshot.name) == (said["id"], said["name"])
        assert (snapshot.date_sec, snapshot.date_nsec) == (said["date-sec"], said["date-nsec"])
        assert snapshot.vm_state_size == said["vm-state-size"]
        assert snapshot.disk_size == 1 << 20
    assert [snapshot.name for snapshot in reader.snapshots] == names


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_bitmaps(tmp_path, cluster_size):
    image = create(tmp_path / "a.qcow2", cluster_size=cluster_size)
    for name, options in {"a": [], "b": ["--disable"], "c" * 1023: ["-g", "512"], "d": ["-g", "2G"]}.items():
        run("qemu-img", "bitmap", "--add", *options, image, name)
    header = parse(image)
    info = agree(image, header)
    data = image.read_bytes()
    directory = data[header.bitmaps.directory_offset :][: header.bitmaps.directory_size]
    entries = bitmap_directory.parse(directory, header.bitmaps.count, header)
    assert bitmap_directory.build(entries, header) == directory
    for entry, said in zip(entries, info["format-specific"]["data"]["bitmaps"], strict=True):
        flags = {"auto": BitmapFlags.AUTO, "in-use": BitmapFlags.IN_USE}
        assert entry.name == said["name"]
        assert 1 << entry.granularity_bits == said["granularity"]
        assert entry.flags == sum(flags[flag] for flag in said["flags"])
        assert entry.usable
        table = data[entry.table_offset :][: entry.table_size * 8]
        assert bitmap_directory.build_table(bitmap_directory.parse_table(table, cluster_size), cluster_size) == table


def test_qemu_reads_what_was_built(tmp_path):
    """All that a header can hold besides what qemu-img puts in."""
    image = create(tmp_path / "a.qcow2", cluster_size=65536)
    data = image.read_bytes()
    plain = Header.parse(data)
    header = Header(
        size=plain.size,
        l1_size=plain.l1_size,
        l1_table_offset=plain.l1_table_offset,
        refcount_table_offset=plain.refcount_table_offset,
        refcount_table_clusters=plain.refcount_table_clusters,
        backing_file="b" * 1023,
        backing_format="raw",
        compatible=Compatible(1 << 63 | 1),
        autoclear=Autoclear(1 << 40),
        unknown_fields=bytes(7) + b"unknown",
        unknown_extensions=((0x12345678, b"data"), (0x9, b"")),
    )
    image.write_bytes(header.build().ljust(65536, b"\0") + data[65536:])
    agree(image, header)


@pytest.mark.parametrize(
    ("at", "layout", "values"),
    [
        (4, ">I", [4]),
        (20, ">I", [22]),
        (8, ">QI", [1 << 40, 1]),
        (8, ">QI", [2048, 1024]),
        (24, ">Q", [1 << 40]),
        (32, ">I", [3]),
        (36, ">I", [(4 << 20) + 1]),
        (40, ">Q", [1]),
        (48, ">Q", [65536 + 512]),
        (56, ">I", [0]),
        (56, ">I", [129]),
        (60, ">I", [65537]),
        (64, ">Q", [8]),
        (72, ">Q", [0xE0]),
        (72, ">Q", [8]),
        (88, ">Q", [2]),
        (96, ">I", [7]),
        (100, ">I", [96]),
        (100, ">I", [65536 + 8]),
        (104, ">B", [1]),
        (104, ">B", [2]),
        (112, ">II", [0xE2792ACA, 16]),
        (112, ">II", [0x23852875, 16]),
        (112, ">II", [0x12345678, 65536]),
        (112, ">II", [0x0537BE77, 16]),
    ],
)
def test_refusals_are_qemus(tmp_path, at, layout, values):
    image = create(tmp_path / "a.qcow2")
    data = bytearray(image.read_bytes())
    struct.pack_into(layout, data, at, *values)
    image.write_bytes(data)
    with pytest.raises(Error) as caught:
        Header.parse(bytes(data), file_size=len(data))
    # `info` opens an image less thoroughly.
    assert str(caught.value) in run("qemu-img", "map", image, expect=1).stderr
