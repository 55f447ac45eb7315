"""resize, snapshot, rebase, commit and compare: what qemu-img finds afterwards, and what it does itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from image_command import MIB, clean, content, ours, ours_json, qemu_io, scattered, theirs, theirs_json

import peers

pytestmark = peers.requires("qemu-img", "qemu-io")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# resize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_resize(kind):
    scattered("raw", size=4 * MIB)
    theirs("convert", "-O", kind, "raw", "a")
    data = Path("raw").read_bytes()
    assert ours("resize", "-f", kind, "a", "+1M").stdout == "Image resized.\n"
    assert content("a") == data + bytes(MIB)
    assert ours_json("resize", "a", "6M") == {"filename": "a", "old-size": 5 * MIB, "virtual-size": 6 * MIB}
    ours("resize", "--shrink", "a", "-3M")
    assert content("a") == data[: 3 * MIB]
    ours("resize", "a", "4M")
    assert content("a") == data[: 3 * MIB] + bytes(MIB)
    if kind == "qcow2":
        clean("a")


def test_resize_takes_the_space_at_once():
    Path("a").write_bytes(b"x" * MIB)
    ours("resize", "--preallocation", "falloc", "a", "+4M")
    assert os.stat("a").st_blocks * 512 >= 5 * MIB
    ours("create", "b.qcow2", "1M")
    ours("resize", "--preallocation=full", "b.qcow2", "+4M")
    assert theirs_json("check", "b.qcow2")["allocated-clusters"] == 64
    assert "There is: full, off." in ours("resize", "--preallocation", "falloc", "b.qcow2", "8M", expect=1).stderr


# snapshot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=4k"])
def test_snapshots_that_either_takes(options):
    more = ["-o", options] if options else []
    theirs("create", "-q", "-f", "qcow2", *more, "a", "8M")
    qemu_io("a", "write -P 1 0 3M", "write -c -P 9 4M 64k")
    first = content("a")
    assert ours_json("snapshot", "--create", "mine", "a")["id"] == "1"
    qemu_io("a", "write -P 2 1M 1M")
    second = content("a")
    theirs("snapshot", "-c", "their", "a")
    qemu_io("a", "write -P 3 0 8M")
    clean("a")
    assert ours("snapshot", "--list", "a").stdout == theirs("snapshot", "-l", "a").stdout
    assert ours_json("snapshot", "a") == theirs_json("info", "a")["snapshots"] or "compat" in options

    ours("snapshot", "-a", "their", "a")
    assert content("a") == second
    theirs("snapshot", "-a", "mine", "a")
    assert content("a") == first
    ours("snapshot", "-a", "2", "a")
    assert content("a") == second
    ours("snapshot", "--delete", "their", "a")
    clean("a")
    theirs("snapshot", "-d", "mine", "a")
    assert content("a") == second
    clean("a")
    assert ours("snapshot", "a").stdout == ""


def test_snapshots_that_are_not_there():
    theirs("create", "-q", "-f", "qcow2", "a", "1M")
    for option in ("-a", "-d"):
        said = ours("snapshot", option, "x", "a", expect=1)
        assert said.stderr == "blkferry: Can't find snapshot 'x'\nThe image has no snapshots.\n"


# rebase -------------------------------------------------------------------------------------------------------


def chain(*sizes: str) -> list[str]:
    """base (raw), then overlays c1, c2, ... with data of their own."""
    scattered("base", size=6 * MIB)
    names = ["base"]
    for number, size in enumerate(sizes, 1):
        name = f"c{number}"
        kind = "raw" if number == 1 else "qcow2"
        theirs("create", "-q", "-f", "qcow2", "-b", names[-1], "-F", kind, name, size)
        qemu_io(name, f"write -P {number} {number}M 300k", f"write -z {number * 600}k 200k", "write -P 7 100k 8k")
        names.append(name)
    return names


@pytest.mark.parametrize("sizes", [("6M", "6M", "6M"), ("8M", "5M", "9M")])
@pytest.mark.parametrize(
    ("backing", "kind"), [("base", "raw"), ("c1", "qcow2"), ("", None), ("other", "raw"), ("small", "qcow2")]
)
def test_rebase(sizes, backing, kind):
    chain(*sizes)
    scattered("other", size=5 * MIB, seed=9)
    theirs("create", "-q", "-f", "qcow2", "small", "2M")
    expected = content("c3")
    shutil.copy("c3", "q3")
    ours("rebase", "-b", backing, *(["-F", kind] if kind else []), "c3")
    assert content("c3") == expected
    clean("c3")
    facts = theirs_json("info", "c3")
    assert (facts.get("backing-filename", ""), facts.get("backing-filename-format")) == (backing, kind)
    theirs("rebase", "-b", backing, *(["-F", kind] if kind else []), "q3")
    assert content("q3") == expected
    taken = [theirs_json("check", name).get("allocated-clusters", 0) for name in ("c3", "q3")]
    assert taken[0] <= taken[1]
    assert (c := ours("compare", "c3", "q3").stdout) == "Images are identical.\n", c


def test_rebase_that_only_renames():
    chain("6M")
    expected = content("c1")
    os.rename("base", "moved")
    assert "Could not open" in ours("rebase", "-b", "moved", "-F", "raw", "c1", expect=1).stderr
    answer = ours_json("rebase", "-u", "-b", "moved", "-F", "raw", "c1")
    assert answer == {"filename": "c1", "backing-filename": "moved", "copied": 0}
    assert content("c1") == expected


def test_rebase_onto_itself():
    chain("6M", "6M")
    expected = content("c2")
    for below in ("c1", "c2"):
        said = ours("rebase", "-b", below, "-F", "qcow2", "c1", expect=1).stderr
        assert said == f"blkferry: '{below}' cannot be the backing file of 'c1': it is that image, or based on it\n"
    assert "(It looks like raw.)" in ours("rebase", "-b", "base", "c1", expect=1).stderr
    assert content("c2") == expected


# commit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [("6M",), ("8M",), ("6M", "6M"), ("5M", "9M"), ("4M", "3M", "7M")])
@pytest.mark.parametrize("how", ["", "-d", "base"])
def test_commit(sizes, how):
    names = chain(*sizes)
    expected = content(names[-1])
    os.mkdir("their")
    for name in names:
        shutil.copy(name, f"their/{name}")
    argv = ["-b", "base"] if how == "base" else [how] if how else []
    assert ours("commit", *argv, names[-1]).stdout == "Image committed.\n"
    base = "base" if how == "base" else names[-2]
    os.chdir("their")
    theirs("commit", *argv, names[-1])
    os.chdir("..")
    for name in names:
        if name == names[-1] or name == base:
            assert content(name)[: len(expected)].rstrip(b"\0") == expected.rstrip(b"\0"), name
        if name != "base":
            clean(name)
    for name in names:
        mine, their = content(name), content(f"their/{name}")
        assert mine == their, name
    if not how:
        map_of_top = ours_json("map", names[-1])
        assert all(each["depth"] or not each["present"] for each in map_of_top)


def test_commit_to_what_is_not_below():
    chain("6M")
    said = ours("commit", "-b", "x", "c1", expect=1)
    assert said.stderr == "blkferry: Did not find 'x' in the backing chain of 'c1'\nBelow it are: base.\n"


# compare ------------------------------------------------------------------------------------------------------


def both(*argv: object) -> tuple[int, str]:
    """Compare with both; they have to agree."""
    mine, their = ours("compare", *argv, expect=None), theirs("compare", *argv, expect=None)
    assert (mine.exit_code, mine.stdout) == (their.returncode, their.stdout)
    return mine.exit_code, mine.stdout


def test_compare():
    scattered("a")
    shutil.copy("a", "b")
    theirs("convert", "-O", "qcow2", "a", "c")
    theirs("convert", "-O", "qcow2", "-c", "a", "d")
    for other in ("a", "b", "c", "d"):
        assert both("a", other) == (0, "Images are identical.\n")
    os.truncate("b", 9 * MIB)
    assert both("a", "b") == (0, "Warning: Image size mismatch!\nImages are identical.\n")
    assert both("-s", "a", "b") == (1, "Strict mode: Image size mismatch!\n")
    assert both("-s", "c", "c")[0] == 0
    assert both("-s", "c", "d")[0] == 1
    assert both("-q", "a", "b") == (0, "")


@pytest.mark.parametrize("at", [0, 512, 65535, 3 * MIB + 7, 8 * MIB - 1, 8 * MIB + 100])
def test_compare_finds_the_place(at):
    scattered("a")
    theirs("convert", "-O", "qcow2", "a", "c")
    with open("a", "r+b") as file:
        file.seek(at)
        was = file.read(1) or b"\0"
        file.seek(at)
        file.write(bytes([was[0] ^ 255]))
    os.truncate("a", max(8 * MIB, -(-(at + 1) // 512) * 512))
    assert f"Content mismatch at offset {at}!\n" in ours("compare", "a", "c", expect=1).stdout
    assert "Content mismatch at offset" in theirs("compare", "a", "c", expect=1).stdout
    assert ours("compare", "--json", "a", "c", expect=1).stdout.count(f'"offset": {at}') == 1


def test_images_in_use():
    scattered("raw", size=MIB)
    theirs("convert", "-O", "qcow2", "raw", "a")
    holder = [*peers.peer("qemu-io"), "-f", "qcow2", "a"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()  # it has opened the image by now
        said = ours("info", "a", expect=1).stderr
        assert "--force-share" in said
        assert "lock" in said
        assert ours_json("info", "-U", "a")["virtual-size"] == MIB
        assert ours("compare", "-U", "a", "raw").stdout == "Images are identical.\n"
        assert "lock" in ours("resize", "a", "2M", expect=1).stderr
        process.stdin.write("quit\n")
        process.stdin.flush()
    assert ours_json("info", "a")["virtual-size"] == MIB
