"""info, map, check, measure and snapshot lists: the same answers as qemu-img's."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from image_command import MIB, ours, ours_json, qemu_io, scattered, theirs, theirs_json

import peers

pytestmark = peers.requires("qemu-img", "qemu-io")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


OPTIONS = {
    "default": "",
    "v2": "compat=0.10",
    "clusters": "cluster_size=2M",
    "small": "cluster_size=512",
    "refcounts": "refcount_bits=1",
    "lazy": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
    "extended": "extended_l2=on",
    "metadata": "preallocation=metadata",
    "full": "preallocation=full",
    "falloc": "preallocation=falloc",
    "data file": "data_file=data",
    "raw data file": "data_file=data,data_file_raw=on",
    "luks": "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
    "aes": "encrypt.format=aes,encrypt.key-secret=key",
}
SECRET = "secret,id=key,data=password"


def by_name(members: dict) -> dict:
    """JSON without the order of members."""
    return json.loads(json.dumps(members, sort_keys=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_info(options):
    theirs("create", "-q", "--object", SECRET, "-f", "qcow2", *(["-o", options] if options else []), "a", "8M")
    mine, expected = ours_json("info", "a"), theirs_json("info", "a")
    if "data_file" in options:  # qemu-img lists the data file as a child too
        expected["children"] = [each for each in expected["children"] if each["name"] == "file"]
        mine["actual-size"] = expected["actual-size"]
    assert by_name(mine) == by_name(expected)


def test_info_of_raw():
    scattered("a")
    assert by_name(ours_json("info", "a")) == by_name(theirs_json("info", "a"))
    assert ours("info", "a").stdout == theirs("info", "a").stdout


def test_info_of_snapshots_bitmaps_and_chains():
    scattered("base.raw")
    os.mkdir("in")
    theirs("create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "in/mid")
    theirs("create", "-q", "-f", "qcow2", "-b", "in/mid", "-F", "qcow2", "top")
    theirs("snapshot", "-c", "one", "top")
    theirs("bitmap", "--add", "-g", "128k", "top", "b1")
    theirs("bitmap", "--add", "--disable", "top", "b2")
    assert by_name(ours_json("info", "top")) == by_name(theirs_json("info", "top"))
    chains = ours_json("info", "--backing-chain", "top"), theirs_json("info", "--backing-chain", "top")
    assert [by_name(each) for each in chains[0]] == [by_name(each) for each in chains[1]]
    bitmaps = ours_json("bitmap", "top")
    assert [(each["name"], each["granularity"], each["flags"]) for each in bitmaps] == [
        ("b1", 131072, ["auto"]),
        ("b2", 65536, []),
    ]
    text = ours("info", "top").stdout
    assert "backing file: in/mid\n" in text
    assert "[0]:\n" in text


def test_a_chain_that_bites_its_tail():
    theirs("create", "-q", "-f", "qcow2", "a", "1M")
    theirs("rebase", "-u", "-b", "a", "-F", "qcow2", "a")
    assert "loop" in ours("info", "--backing-chain", "a", expect=1).stderr


def written(name: str, options: str = "", backing: str | None = None) -> None:
    more = ["-b", backing, "-F", "raw"] if backing else []
    theirs("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *more, name, "8M")
    zero = ["write -z 2M 1M", "write -zu 3M 256k"] if "0.10" not in options or not backing else []
    packed = [] if "metadata" in options else ["write -c -P 4 5M 64k"]
    qemu_io(name, "write -P 1 0 64k", "write -P 2 100k 4k", "write -P 3 1M 600k", *zero, *packed)


@pytest.mark.parametrize(
    ("options", "backing"),
    [
        *itertools.product(["", "compat=0.10", "extended_l2=on", "cluster_size=4k", "data_file=data"], [None, "base"]),
        ("preallocation=metadata", None),
    ],
)
def test_map(options, backing):
    if "data_file" in options:
        theirs("create", "-q", "-f", "qcow2", "-o", options, "a", "8M")
        qemu_io("a", "write -P 1 0 64k", "write -P 3 1M 600k", "write -z 2M 1M")
    else:
        scattered("base", size=6 * MIB)
        written("a", options, backing)
    assert ours_json("map", "a") == theirs_json("map", "a")
    assert ours_json("map", "-s", "1M", "-l", "1M", "a") == theirs_json("map", "-s", "1M", "-l", "1M", "a")


def test_map_of_raw_and_in_words():
    scattered("base")
    assert ours_json("map", "base") == theirs_json("map", "base")
    assert ours("map", "base").stdout == theirs("map", "-f", "raw", "base").stdout
    written("a")
    assert ours("map", "a", expect=1).stderr.startswith("blkferry: File contains external, encrypted or compressed")


NUMBERS = (
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)


def numbers(members: dict) -> dict:
    return {name: members.get(name, 0) for name in NUMBERS}


def test_check_of_a_sound_image():
    written("a")
    said = ours("check", "a")
    assert said.stdout == theirs("check", "a").stdout
    assert numbers(ours_json("check", "a")) == numbers(theirs_json("check", "a"))
    assert ours("check", "-q", "a").stdout == ""


def damage(path: str, at: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value)


def test_check_finds_leaks_and_repairs_them():
    written("a")
    os.truncate("a", 40 << 16)
    with open("a", "rb") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
    damage("a", block + 2 * 30, b"\0\1")
    assert numbers(json.loads(ours("check", "a", "--json", expect=3).stdout)) == numbers(
        json.loads(theirs("check", "--output=json", "a", expect=3).stdout)
    )
    said = ours("check", "a", expect=3)
    assert "1 leaked clusters were found on the image.\n" in said.stdout
    assert "--repair leaks" in said.stderr
    said = ours("check", "-r", "leaks", "a")
    assert "    1 leaked clusters\n" in said.stdout
    assert "No errors were found on the image.\n" in said.stdout
    theirs("check", "a")


def test_check_finds_corruption_and_repairs_it():
    written("a")
    with open("a", "rb") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & ~(1 << 63)
    damage("a", l2, (1 << 63 | 0x1234).to_bytes(8, "big"))
    theirs("check", "a", expect=2)
    said = ours("check", "a", expect=2)
    assert "errors were found on the image.\nData may be corrupted" in said.stdout
    assert "--repair all" in said.stderr
    ours("check", "--repair", "all", "a")
    ours("check", "a")
    theirs("check", "a")


def test_check_of_what_cannot_be_checked():
    scattered("raw")
    assert ours("check", "raw", expect=63).stderr.startswith("blkferry: This image format does not support checks\n")
    theirs("check", "raw", expect=63)
    ours("check", "nothing", expect=1)
    theirs("check", "nothing", expect=1)
    damage("raw", 0, b"QFI\xfb" + bytes(8))
    assert "Unsupported qcow2 version 0" in ours("check", "raw", expect=1).stderr
    ours("check", "-r", "some", "raw", expect=1)
    ours("check", "-U", "-r", "all", "raw", expect=1)


@pytest.mark.parametrize(
    "argv",
    [
        ["-O", "qcow2", "--size", "1G"],
        ["-O", "raw", "--size", "1G"],
        ["-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=64", "--size", "10G"],
        ["-O", "qcow2", "-o", "preallocation=full", "--size", "1G"],
        ["-O", "qcow2", "base"],
        ["-O", "raw", "base"],
        ["-O", "qcow2", "a"],
        ["-O", "qcow2", "-o", "extended_l2=on", "a"],
        ["a"],
    ],
)
def test_measure(argv):
    scattered("base")
    written("a", backing="base")
    assert ours_json("measure", *argv) == theirs_json("measure", *argv)
    assert ours("measure", *argv).stdout == theirs("measure", *argv).stdout


def test_measure_of_nothing():
    assert "Either --size N or one image" in ours("measure", expect=1).stderr
    assert "Either --size N or one image" in ours("measure", "--size", "1M", "a", expect=1).stderr
