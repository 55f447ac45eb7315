"""create and convert: images that QEMU reads, of all kinds, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from image_command import KIB, MIB, clean, content, ours, ours_json, qemu_io, scattered, theirs, theirs_json

import peers

pytestmark = peers.requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SECRET = "secret,id=key,data=password"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=v2",
        "cluster_size=4k,refcount_bits=8,lazy_refcounts=on",
        "extended_l2=on,compression_type=zstd",
        "preallocation=metadata",
        "data_file=data,data_file_raw=on",
    ],
)
def test_create(options):
    given = ["-o", options] if options else []
    ours("create", "-f", "qcow2", *given, "mine", "8M")
    if "data_file" in options:
        os.rename("data", "data.mine")
    theirs("create", "-q", "-f", "qcow2", *given, "their", "8M")
    if "data_file" not in options:
        clean("mine")
    facts = [theirs_json("info", name)["format-specific"] for name in ("mine", "their")]
    assert facts[0] == facts[1]


def test_create_says_what_it_made():
    said = ours("create", "-o", "cluster_size=128k", "a.qcow2", "1.5G")
    assert said.stdout == "Made 'a.qcow2': qcow2, 1.5 GiB (1610612736 bytes), cluster_size 128k\n"
    assert ours_json("create", "a.img", "1000") == {"filename": "a.img", "format": "raw", "virtual-size": 1024}
    assert os.path.getsize("a.img") == 1024


def test_create_an_overlay():
    scattered("base")
    os.mkdir("in")
    ours("create", "-f", "qcow2", "-b", "../base", "-F", "raw", "in/top")
    assert content("in/top") == Path("base").read_bytes()
    ours("create", "-u", "-f", "qcow2", "-b", "later", "-F", "qcow2", "top", "1G")
    assert theirs_json("info", "top")["backing-filename"] == "later"


def test_create_encrypted():
    ours("create", "--object", SECRET, "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "a", "4M")
    opts = "driver=qcow2,encrypt.key-secret=key,file.filename=a"
    peers.run("qemu-io", "--object", SECRET, "-c", "write -P 7 1M 64k", "--image-opts", opts)
    ours("convert", "--object", SECRET, "a", "plain")
    assert Path("plain").read_bytes() == bytes(MIB) + b"\7" * (64 * KIB) + bytes(3 * MIB - 64 * KIB)
    assert "--object secret,id=key" in ours("convert", "a", "other", expect=1).stderr
    assert not os.path.exists("other")
    how = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    ours("convert", "--object", SECRET, "-O", "qcow2", "-o", how, "plain", "b")
    done = theirs("compare", "--object", SECRET, "--image-opts", "driver=raw,file.filename=plain", opts[:-1] + "b")
    assert done.stdout == "Images are identical.\n"


def test_an_overlay_on_an_encrypted_image():
    ours("create", "--object", SECRET, "-o", "encrypt.format=luks,encrypt.iter-time=10", "base.qcow2", "4M")
    opts = "driver=qcow2,encrypt.key-secret=key,file.filename=base.qcow2"
    peers.run("qemu-io", "--object", SECRET, "-c", "write -P 7 1M 64k", "--image-opts", opts)
    ours("create", "--object", SECRET, "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
    ours("create", "--object", SECRET, "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
    ours("convert", "--object", SECRET, "top.qcow2", "plain")
    assert Path("plain").read_bytes() == bytes(MIB) + b"\7" * (64 * KIB) + bytes(3 * MIB - 64 * KIB)
    ours("rebase", "--object", SECRET, "-b", "", "top.qcow2")
    assert ours("compare", "top.qcow2", "plain").stdout == "Images are identical.\n"


WRONG = {
    "no size": (["create", "a"], 1, "a: Image creation needs a size parameter\n"),
    "size": (["create", "a", "1Q"], 1, "Invalid image size specified: '1Q'\n"),
    "format": (["create", "-f", "foo", "a", "1M"], 1, "Unknown file format 'foo'\nSupported formats: "),
    "vmdk": (["create", "-f", "null-co", "a", "1M"], 1, "Format driver 'null-co' does not support image creation\n"),
    "option": (["create", "-f", "qcow2", "-o", "clutser_size=4k", "a", "1M"], 1, "Invalid parameter 'clutser_size'"),
    "value": (["create", "-f", "qcow2", "-o", "cluster_size=5k", "a", "1M"], 1, "Cluster size must be a power of two"),
    "raw": (["create", "-b", "x", "-F", "raw", "a", "1M"], 1, "Invalid parameter 'backing_file' for format 'raw'"),
    "no backing": (["create", "-f", "qcow2", "-b", "x", "-F", "raw", "a"], 1, "Could not open 'x': No such file"),
    "no backing format": (
        ["create", "-f", "qcow2", "-b", "base", "a"],
        1,
        "Backing file specified without backing format\nSay which it is, with -F or backing_fmt=. (It looks like raw.)",
    ),
    "directory": (["create", "nowhere/a", "1M"], 1, "Could not create 'nowhere/a': No such file or directory"),
    "no source": (["convert", "x", "a"], 1, "Could not open 'x': No such file or directory\n"),
    "itself": (["convert", "base", "base"], 1, "'base' is source and target at once\n"),
    "one name": (["convert", "base"], 1, "Name what to copy, and what to copy it to."),
    "compressed raw": (["convert", "-c", "base", "a"], 1, "Compression not supported for this file format\n"),
    "snapshot": (["convert", "-l", "s", "base", "a"], 1, "Failed to load snapshot: 'base' is a raw image"),
    "sparse": (["convert", "-S", "100", "base", "a"], 1, "Invalid buffer size for sparse output specified"),
    "small": (["convert", "-n", "base", "small"], 1, "'small' is smaller than what shall be copied"),
    "zero": (["convert", "--target-is-zero", "base", "a"], 1, "--target-is-zero requires -n"),
    "command": (["convrt", "base", "a"], 1, "Did you mean 'convert'?"),
    "switch": (["info", "--jsn", "base"], 1, "No such option"),
    "compare": (["compare", "base"], 2, "Missing argument"),
    "nothing to compare": (["compare", "base", "x"], 2, "Could not open 'x'"),
    "shrink": (["resize", "base", "-1M"], 1, "Use the --shrink option to perform a shrink operation.\nIt deletes all"),
    "too small": (["resize", "base", "-1G"], 1, "New image size must be positive"),
    "no chain": (["commit", "base"], 1, "Image does not have a backing file"),
    "raw rebase": (["rebase", "-b", "", "base"], 1, "Images of format 'raw' have no backing file"),
    "raw snapshot": (["snapshot", "-c", "s", "base"], 1, "Images of format 'raw' have no internal snapshots"),
    "two at once": (["snapshot", "-l", "-c", "s", "base"], 1, "One of --list, --create"),
}


@pytest.mark.parametrize(("argv", "code", "text"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(argv, code, text):
    scattered("base", size=2 * MIB, pieces=4)
    Path("small").write_bytes(bytes(MIB))
    before = Path("base").read_bytes()
    said = ours(*argv, expect=code)
    assert text in said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout == ""
    assert sorted(os.listdir()) == ["base", "small"]
    assert Path("base").read_bytes() == before


@pytest.mark.parametrize("command", ["create", "convert", "measure"])
def test_options_that_there_are(command):
    name = "-f" if command == "create" else "-O"
    argv = [*(["a"] if command == "convert" else []), *(["--size", "1M"] if command == "measure" else [])]
    said = ours(command, name, "qcow2", "-o", "help", *argv).stdout
    assert "  cluster_size= " in said
    assert "  encrypt.key-secret= " in said


TARGETS = {
    "default": [],
    "v2": ["-o", "compat=0.10"],
    "small clusters": ["-o", "cluster_size=512"],
    "large clusters": ["-o", "cluster_size=2M"],
    "extended": ["-o", "extended_l2=on"],
    "metadata": ["-o", "preallocation=metadata"],
    "data file": ["-o", "data_file=data"],
    "zlib": ["-c"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
    "zlib, small": ["-c", "-o", "cluster_size=4k"],
    "zlib, large": ["-c", "-o", "cluster_size=2M"],
    "zlib, extended": ["-c", "-o", "extended_l2=on"],
    "not sparse": ["-S", "0"],
    "sparser": ["-S", "64k"],
}


@pytest.mark.parametrize("how", TARGETS.values(), ids=TARGETS)
def test_there_and_back(how):
    scattered("raw", size=9 * MIB + 512)
    ours("convert", "-O", "qcow2", *how, "raw", "packed")
    if "data_file=data" not in how:
        clean("packed")
    assert theirs("compare", "raw", "packed").stdout == "Images are identical.\n"
    ours("convert", "packed", "back.raw")
    assert Path("back.raw").read_bytes() == Path("raw").read_bytes()
    if "-S" not in how:
        theirs("convert", "-O", "qcow2", *[each.replace("=data", "=data2") for each in how], "raw", "their")
        sizes = [theirs_json("check", name)["allocated-clusters"] for name in ("packed", "their")]
        assert sizes[0] == sizes[1]
    theirs("convert", "-O", "raw", "packed", "their.raw")
    taken = [os.stat(name).st_blocks for name in ("back.raw", "their.raw")]
    assert taken[0] <= taken[1] * 1.02 + 64 or "-S" in how


def test_snapshots_and_chains():
    scattered("base")
    theirs("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "12M")
    qemu_io("top", "write -P 1 1M 1M", "write -z 5M 100k")
    theirs("snapshot", "-c", "one", "top")
    qemu_io("top", "write -P 2 0 11M")
    for given in ("one", "1", "snapshot.name=one"):
        ours("convert", "-l", given, "top", "mine.raw")
        theirs("convert", "-l", "snapshot.name=one", "-O", "raw", "top", "their.raw")
        assert Path("mine.raw").read_bytes() == Path("their.raw").read_bytes()
    assert "Known snapshots: 1 (one)" in ours("convert", "-l", "two", "top", "x", expect=1).stderr
    ours("convert", "top", "mine.raw")
    theirs("convert", "-O", "raw", "top", "their.raw")
    assert Path("mine.raw").read_bytes() == Path("their.raw").read_bytes()


def test_to_an_overlay_and_without_making_one():
    scattered("base", size=6 * MIB)
    theirs("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "6M")
    qemu_io("top", "write -P 1 1M 1M", "write -z 3M 100k")
    expected = content("top")
    for more in ([], ["-c"]):
        ours("convert", "-O", "qcow2", *more, "-B", "base", "-F", "raw", "top", "copy")
        assert content("copy") == expected
        assert os.path.getsize("copy") < 2 * MIB
        clean("copy")
    Path("old").write_bytes(b"x" * (8 * MIB))
    ours("convert", "-n", "-O", "raw", "top", "old")
    assert Path("old").read_bytes() == expected + b"x" * (2 * MIB)
    ours("create", "new.qcow2", "6M")
    ours("convert", "-n", "--target-is-zero", "top", "new.qcow2")
    assert content("new.qcow2") == expected


def test_several_sources():
    scattered("a", size=3 * MIB, seed=2)
    scattered("b", size=2 * MIB + 512, seed=3)
    ours("convert", "a", "b", "c.qcow2")
    assert content("c.qcow2") == Path("a").read_bytes() + Path("b").read_bytes()


def test_names_of_other_kinds():
    scattered("a")
    theirs("convert", "-O", "qcow2", "a", "b")
    name = 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "b"}}'
    assert ours("compare", name, "file:a").stdout == "Images are identical.\n"
    opts = "driver=qcow2,file.filename=b", "driver=raw,file.driver=file,file.filename=a"
    assert ours("compare", "--image-opts", *opts).stdout == "Images are identical.\n"


def test_a_failure_removes_what_was_made():
    scattered("a")
    theirs("convert", "-O", "qcow2", "a", "b")
    l1 = int.from_bytes(Path("b").read_bytes()[40:48], "big")
    l2 = int.from_bytes(Path("b").read_bytes()[l1 : l1 + 8], "big") & ~(1 << 63)
    with open("b", "r+b") as file:
        file.seek(l2 + 8 * 40)
        file.write((1 << 63 | 0x12345678).to_bytes(8, "big"))
    assert "error while reading at byte" in ours("convert", "b", "c", expect=1).stderr
    assert not os.path.exists("c")
    said = ours("convert", "--salvage", "b", "c")
    assert said.stdout == "64 KiB could not be read, and are zeroes in 'c'.\n"
    differs = [at for at in range(0, 8 * MIB, 64 * KIB) if _part("a", at) != _part("c", at)]
    assert differs in ([], [40 * 64 * KIB])


def _part(path: str, at: int) -> bytes:
    return Path(path).read_bytes()[at : at + 64 * KIB]


def test_progress_and_json():
    scattered("a")
    said = ours("convert", "-p", "a", "b")
    assert said.stdout.startswith("    (0.00/100%)\r")
    assert said.stdout.endswith("    (100.00/100%)\n")  # click's runner takes the \r away
    answer = ours_json("convert", "a", "c.qcow2")
    assert answer == {
        "filename": "c.qcow2",
        "format": "qcow2",
        "virtual-size": 8 * MIB,
        "written": answer["written"],
        "unreadable": 0,
    }
    assert ours("convert", "-r", "100M", "-t", "none", "a", "d").stdout == ""
    assert Path("d").read_bytes() == Path("a").read_bytes()


# Bitmaps ---------------------------------------------------------------------------------------------------------


def bitmaps_of(image: str) -> dict[str, tuple[tuple[str, ...], int]]:
    found = theirs_json("info", image)["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: (tuple(each["flags"]), each["granularity"]) for each in found}


def marked(image: str, bitmap: str) -> list[tuple[int, int, bool]]:
    """What QEMU's own server says of a bitmap, as (start, length, dirty)."""
    argv = [*peers.peer("qemu-nbd"), "-r", "-f", "qcow2", "-B", bitmap, image]
    run = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", "--", "[", *argv, "]"]
    said = json.loads(peers.run(*run).stdout)
    return [(each["offset"], each["length"], bool(each["type"])) for each in said]


@pytest.fixture
def watched():
    """ "top": over "base", with an enabled and a disabled bitmap of its own, and one that is the base's."""
    theirs("create", "-q", "-f", "qcow2", "base", "8M")
    theirs("bitmap", "--add", "base", "below")
    theirs("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    theirs("bitmap", "--add", "-g", "128k", "top", "on")
    theirs("bitmap", "--add", "top", "off")
    qemu_io("top", "write -P 1 1M 64k")
    theirs("bitmap", "--disable", "top", "off")
    qemu_io("top", "write -P 2 3M 1M")


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "cluster_size=4k"), ("-B", "base", "-F", "qcow2")])
def test_bitmaps_are_copied_as_qemu_copies_them(watched, options):
    for who, convert in (("mine", ours), ("their", theirs)):
        convert("convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", *options, "top", who)
    clean("mine")
    assert theirs("compare", "mine", "top").stdout == "Images are identical.\n"
    assert bitmaps_of("mine") == bitmaps_of("their") == {"on": (("auto",), 128 * KIB), "off": ((), 64 * KIB)}
    for name in ("on", "off"):
        assert marked("mine", name) == marked("their", name) == marked("top", name)
    for source in ("mine", "their"):  # each reads what the other wrote
        ours("convert", "--bitmaps", "-O", "qcow2", source, "ours-again")
        theirs("convert", "--bitmaps", "-O", "qcow2", source, "theirs-again")
        assert marked("ours-again", "on") == marked("theirs-again", "on") == marked("top", "on")


def test_bitmaps_of_a_crashed_writer_are_refused_or_skipped(watched, caplog):
    peers.run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", "top", expect=None)
    theirs("bitmap", "--add", "top", "sound")
    for convert in (ours, theirs):
        refused = convert("convert", "--bitmaps", "-O", "qcow2", "top", "copy", expect=1)
        assert "Cannot copy inconsistent bitmap 'o" in refused.stderr
        assert "--skip-broken-bitmaps" in refused.stderr
        assert not os.path.exists("copy")
    ours("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "top", "copy")
    assert "Skipping inconsistent bitmap 'on'" in caplog.messages
    assert bitmaps_of("copy") == {"sound": (("auto",), 64 * KIB)}


def test_bitmaps_that_the_target_has_already(watched):
    theirs("create", "-q", "-f", "qcow2", "copy", "8M")
    theirs("bitmap", "--add", "-g", "64k", "copy", "off")
    before = bitmaps_of("copy")
    for convert in (theirs, ours):
        said = convert("convert", "--bitmaps", "-n", "-O", "qcow2", "top", "copy", expect=1).stderr
        assert "Failed to create bitmap off: Bitmap already exists: off" in said
    theirs("create", "-q", "-f", "qcow2", "copy", "8M")
    theirs("bitmap", "--add", "-g", "64k", "copy", "off")
    assert "already exists" in ours("convert", "--bitmaps", "-n", "-O", "qcow2", "top", "copy", expect=1).stderr
    assert bitmaps_of("copy") == before  # qemu-img has copied the disk and "on" by then
    theirs("create", "-q", "-f", "qcow2", "longer", "16M")
    for convert in (theirs, ours):
        said = convert("convert", "--bitmaps", "-n", "-O", "qcow2", "top", "longer", expect=1).stderr
        assert "Failed to populate bitmap o" in said
        assert "different sizes (destination size is 16777216, source size is 8388608) and can't be merged" in said


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--bitmaps", "-O", "raw", "top"], "Format driver 'raw' does not support bitmaps"),
        (["--bitmaps", "-O", "qcow2", "-o", "compat=0.10", "top"], "Format driver 'qcow2' does not support bitmaps"),
        (["--bitmaps", "-O", "qcow2", "-f", "raw", "base"], "Source lacks bitmap support"),
        (["--skip-broken-bitmaps", "-O", "qcow2", "top"], "Use of --skip-broken-bitmaps requires --bitmaps"),
        (["--bitmaps", "-O", "qcow2", "base", "top"], "Copying bitmaps only possible with single source"),
    ],
)
def test_bitmaps_where_there_can_be_none(watched, argv, text):
    assert text in theirs("convert", *argv, "their", expect=1).stderr
    assert text in ours("convert", *argv, "mine", expect=1).stderr
    assert not os.path.exists("mine")
