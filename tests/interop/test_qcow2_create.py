"""Images that we create, read and written by QEMU; and what measuring says, against qemu-img measure."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import qcow2_images as images

import peers
from blkferry.drivers.qcow2.checking import Repair
from blkferry.drivers.qcow2.creation import CreateSpec, Preallocation
from blkferry.drivers.qcow2.header import CompressionType, CryptMethod
from blkferry.drivers.qcow2.measuring import measure
from blkferry.errors import Error

pytestmark = peers.requires("qemu-img", "qemu-io")

MIB = 1 << 20
ZSTD = CompressionType.ZSTD
METADATA, FALLOC, FULL = Preallocation.METADATA, Preallocation.FALLOC, Preallocation.FULL


def spec(size=16 * MIB, **options) -> CreateSpec:
    return CreateSpec(size=size, **options)


SPECS = {
    "default": spec(),
    "empty": spec(0),
    "a sector": spec(512),
    "odd": spec(10 * MIB + 512),
    "large": spec(1 << 44),
    "v2": spec(version=2),
    "512": spec(cluster_size=512),
    "512, large": spec(8 << 30, cluster_size=512),
    "2M": spec(64 * MIB, cluster_size=2 * MIB),
    "1 bit": spec(refcount_bits=1),
    "4 bits": spec(refcount_bits=4),
    "64 bits": spec(refcount_bits=64, cluster_size=1024),
    "extended": spec(extended_l2=True),
    "lazy": spec(lazy_refcounts=True),
    "zstd": spec(compression_type=ZSTD),
    "backing": spec(backing_file="base.raw", backing_format="raw"),
    "metadata": spec(preallocation=METADATA),
    "metadata, odd": spec(10 * MIB + 512, preallocation=METADATA, cluster_size=4096),
    "metadata, 512": spec(4 * MIB, preallocation=METADATA, cluster_size=512),
    "metadata, 1 bit": spec(preallocation=METADATA, refcount_bits=1),
    "metadata, 64 bits": spec(4 * MIB, preallocation=METADATA, refcount_bits=64, cluster_size=512),
    "metadata, 16G": spec(16 << 30, preallocation=METADATA),
    "metadata, v2": spec(preallocation=METADATA, version=2),
    "metadata, extended": spec(preallocation=METADATA, extended_l2=True, cluster_size=16384),
    "extended, backing": spec(preallocation=METADATA, extended_l2=True, backing_file="base.raw", backing_format="raw"),
    "falloc": spec(preallocation=FALLOC),
    "full": spec(preallocation=FULL),
    "data file": spec(data_file_name="data"),
    "data file, metadata": spec(10 * MIB + 512, data_file_name="data", preallocation=METADATA),
    "data file, full": spec(data_file_name="data", preallocation=FULL),
    "raw data file": spec(data_file_name="data", data_file_raw=True),
    "raw data file, extended": spec(data_file_name="data", data_file_raw=True, extended_l2=True),
}


def options_of(made: CreateSpec, data=None) -> list[str]:
    """The same for qemu-img create."""
    found = {
        "compat": {2: "0.10", 3: "1.1"}[made.version],
        "cluster_size": made.cluster_size,
        "refcount_bits": made.refcount_bits,
        "extended_l2": "on" if made.extended_l2 else "off",
        "lazy_refcounts": "on" if made.lazy_refcounts else "off",
        "preallocation": made.preallocation,
    }
    if made.compression_type is ZSTD:
        found["compression_type"] = "zstd"
    if made.backing_file is not None:
        found |= {"backing_file": made.backing_file, "backing_fmt": made.backing_format}
    if made.data_file_name is not None:
        found |= {"data_file": data, "data_file_raw": "on" if made.data_file_raw else "off"}
    return ["-o", ",".join(f"{key}={value}" for key, value in found.items())]


def comparable(information: dict) -> dict:
    kept = {"virtual-size", "cluster-size", "format", "format-specific", "dirty-flag", "backing-filename-format"}
    found = {key: value for key, value in information.items() if key in kept or key == "backing-filename"}
    found.get("format-specific", {}).get("data", {}).pop("data-file", None)
    return found


@pytest.mark.parametrize("name", SPECS)
async def test_qemu_takes_our_images(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    wanted = SPECS[name]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    if wanted.backing_file:
        (tmp_path / "base.raw").write_bytes(b"\x11" * wanted.size)
    data = tmp_path / "data" if wanted.data_file_name else None
    await images.make(ours, wanted, data)
    found = images.qemu_check(ours)
    assert not any(found.get(key) for key in ("corruptions", "leaks", "check-errors")), found
    assert found["image-end-offset"] == os.path.getsize(ours)
    images.same_numbers(await images.checked(ours), found)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *options_of(wanted, tmp_path / "data2"), "theirs", wanted.size)
    assert comparable(images.info(ours)) == comparable(images.info(theirs))
    if wanted.data_file_name:
        assert os.path.getsize(data) == wanted.size  # QEMU's may be larger, by a part of a cluster
    if wanted.size >= MIB:
        last = wanted.size - 512
        commands = ["write -P 5 1k 70k", f"write -P 6 {last} 512", "write -z 128k 64k", "write -P 7 300k 300k"]
        for image in (ours, theirs):
            images.qemu_io(image, *commands)
        peers.run("qemu-img", "compare", "-q", "ours", "theirs")
        found = images.qemu_check(ours)
        assert not any(found.get(key) for key in ("corruptions", "leaks", "check-errors")), found
        images.same_numbers(await images.checked(ours), found)


@pytest.mark.parametrize("preallocation", [METADATA, FALLOC, FULL])
async def test_what_is_preallocated(tmp_path, preallocation):
    path = tmp_path / "disk"
    await images.make(path, spec(preallocation=preallocation))
    blocks = os.stat(path).st_blocks * 512
    assert blocks >= 16 * MIB if preallocation is not METADATA else blocks < MIB
    mapped = json.loads(peers.run("qemu-img", "map", "--output=json", path).stdout)
    assert all(entry["depth"] == 0 and entry["present"] and "offset" in entry for entry in mapped)
    assert sum(entry["length"] for entry in mapped) == 16 * MIB


async def test_what_was_in_the_file_is_gone(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * MIB)
    await images.make(path, spec(preallocation=METADATA))
    empty = tmp_path / "empty"
    empty.touch()
    os.truncate(empty, 16 * MIB)
    peers.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, empty)


async def test_a_raw_data_file_becomes_an_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.write_bytes(b"\x5a" * MIB)
    await images.make(tmp_path / "disk", spec(MIB, data_file_name="data", data_file_raw=True), data)
    peers.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", tmp_path / "disk", data)


SECRET = ["--object", "secret,id=s,data=hush"]


@pytest.fixture(scope="module")
def luks_header(tmp_path_factory) -> bytes:
    """One that QEMU made. Every time that one is opened costs a second."""
    path = tmp_path_factory.mktemp("luks") / "disk"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    peers.run("qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", options, path, "1M")
    pointer = images.read_header(path).encryption
    return path.read_bytes()[pointer.offset :][: pointer.length]


async def test_an_encrypted_image(tmp_path, luks_header):
    path = tmp_path / "disk"
    await images.make(path, spec(encryption=lambda _: luks_header, preallocation=METADATA))
    node = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    argv = ["-c", "write -P 7 1M 64k", "-c", "read -P 7 1M 64k"]
    assert "Pattern" not in peers.run("qemu-io", *argv, *SECRET, "--image-opts", node).stdout
    found = json.loads(peers.run("qemu-img", "check", "--output=json", *SECRET, "--image-opts", node).stdout)
    assert not any(found.get(key) for key in ("corruptions", "leaks", "check-errors")), found
    images.same_numbers(await images.checked(path), found)


@pytest.mark.parametrize("size", [16 * MIB, 0])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MIB])
async def test_the_place_of_an_encryption_header(tmp_path, luks_header, size, cluster_size):
    path = tmp_path / "disk"
    wanted = []
    await images.make(path, spec(size, cluster_size=cluster_size, encryption=lambda n: wanted.append(n) or luks_header))
    assert wanted == [cluster_size]
    assert (await images.checked(path)).clean
    pointer = images.read_header(path).encryption
    image = path.read_bytes()
    assert image[pointer.offset :][: pointer.length] == luks_header
    (tmp_path / "cut").write_bytes(image[: pointer.offset])
    damaged = await images.checked(tmp_path / "cut", Repair.ALL)
    assert damaged.corruptions
    assert damaged.check_errors


async def test_aes_images(tmp_path):
    path = tmp_path / "disk"
    await images.make(path, spec(encryption=CryptMethod.AES))
    assert images.info(path)["encrypted"] is True
    assert (await images.checked(path)).clean


REFUSED = {
    "cluster size": {"cluster_size": 1000},
    "cluster too small": {"cluster_size": 256},
    "cluster too large": {"cluster_size": 4 * MIB},
    "extended needs 16K": {"extended_l2": True, "cluster_size": 8192},
    "refcount bits": {"refcount_bits": 3},
    "too many refcount bits": {"refcount_bits": 128},
    "v2 refcounts": {"version": 2, "refcount_bits": 8},
    "v2 lazy": {"version": 2, "lazy_refcounts": True},
    "v2 extended": {"version": 2, "extended_l2": True},
    "v2 zstd": {"version": 2, "compression_type": ZSTD},
    "v2 data file": {"version": 2, "data_file_name": "data"},
    "backing and preallocation": {"backing_file": "b", "backing_format": "raw", "preallocation": METADATA},
    "raw and backing": {"backing_file": "b", "backing_format": "raw", "data_file_name": "d", "data_file_raw": True},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_the_same_is_refused_with_the_same_words(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    wanted = spec(**REFUSED[name])
    (tmp_path / "b").touch()
    with pytest.raises(Error) as ours:
        await images.make(tmp_path / "ours", wanted, tmp_path / "data" if wanted.data_file_name else None)
    argv = ["create", "-q", "-u", "-f", "qcow2", *options_of(wanted, "data2"), "theirs", str(wanted.size)]
    said = peers.run("qemu-img", *argv, expect=1).stderr
    words = said.strip().removeprefix("qemu-img: theirs: ").replace("compat=1.1 or greater", "version=v3 or greater")
    assert ours.value.message == words
    assert not (tmp_path / "ours").read_bytes().startswith(b"QFI")


def test_more_that_is_refused():
    with pytest.raises(Error, match="multiple of 512"):
        spec(1000).check(has_data_file=False)
    with pytest.raises(Error, match="Backing format cannot be used without"):
        spec(backing_format="raw").check(has_data_file=False)
    with pytest.raises(Error, match="data-file-raw requires data-file"):
        spec(data_file_raw=True).check(has_data_file=False)


@pytest.mark.parametrize("options", [{"size": 1 << 52}, {"size": 1 << 40, "cluster_size": 512}])
async def test_what_is_too_large(tmp_path, options):
    with pytest.raises(Error, match="File too large"):
        await images.make(tmp_path / "ours", spec(**options))


async def test_refcounts_that_are_too_many(tmp_path):
    with pytest.raises(Error, match="File too large"):
        options = {"cluster_size": 512, "refcount_bits": 64, "preallocation": METADATA}
        await images.make(tmp_path / "ours", spec(100 << 30, **options))


async def test_an_image_cut_short_is_no_image(tmp_path, monkeypatch):
    """Whatever was written when creation fails, there is no header."""
    path = tmp_path / "disk"
    path.touch()

    async def fail(*_):
        raise OSError(5, "made to fail")

    async with images.opened(path) as (node,):
        monkeypatch.setattr(node, "flush", fail)
        with pytest.raises(Error, match="made to fail"):
            await images.create(node, None, spec(preallocation=METADATA))
        monkeypatch.undo()
    assert path.read_bytes()[:512] == bytes(512)


MEASURED = {name: made for name, made in SPECS.items() if made.backing_file is None and name != "empty"} | {
    "1T, 1 bit": spec(1 << 40, refcount_bits=1),
    "1T, 64 bits": spec(1 << 40, refcount_bits=64),
}


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_an_empty_image(name):
    wanted = dataclasses.replace(MEASURED[name], data_file_name=None, data_file_raw=False)
    argv = ["measure", "--output=json", "-O", "qcow2", *options_of(wanted), "--size", str(wanted.size)]
    said = json.loads(peers.run("qemu-img", *argv).stdout)
    found = measure(wanted)
    assert (found.required, found.fully_allocated) == (said["required"], said["fully-allocated"])


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("backing", [False, True])
def test_measuring_a_source(image, cluster_size, backing):
    source = image(3 * MIB, data=[(4096, 8192), (MIB - 4096, 8192), (2 * MIB, MIB)])
    wanted = spec(3 * MIB, cluster_size=cluster_size, backing_file="b" if backing else None)
    options = f"cluster_size={cluster_size}" + (",backing_file=b" if backing else "")
    argv = ["measure", "--output=json", "-f", "raw", "-O", "qcow2", "-o", options, str(source.path)]
    said = json.loads(peers.run("qemu-img", *argv).stdout)
    found = measure(wanted, source.data)
    assert (found.required, found.fully_allocated) == (said["required"], said["fully-allocated"])


def test_measuring_bitmaps(tmp_path):
    path = tmp_path / "disk"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
    for name, granularity in (("short", 65536), ("a-longer-name", 4096)):
        peers.run("qemu-img", "bitmap", "--add", "-g", granularity, path, name)
    argv = ["measure", "--output=json", "-O", "qcow2", "-o", "cluster_size=4096", str(path)]
    said = json.loads(peers.run("qemu-img", *argv).stdout)
    found = measure(spec(1 << 30, cluster_size=4096), [], bitmaps=[("short", 16), ("a-longer-name", 12)])
    assert found.bitmaps == said["bitmaps"]
    assert (found.required, found.fully_allocated) == (said["required"], said["fully-allocated"])


def test_measuring_what_is_too_large():
    said = peers.run("qemu-img", "measure", "-O", "qcow2", "--size", 1 << 52, expect=1).stderr
    with pytest.raises(Error) as ours:
        measure(spec(1 << 52))
    assert said.strip() == f"qemu-img: {ours.value.message}"
