"""Dirty bitmaps: the commands against qemu-storage-daemon, what is recorded, and what qemu-img makes of the image."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peers
from blkferry.errors import Error
from blkferry.plane import pace
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import CmdFlag

sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))
import qsd

pytestmark = peers.requires("qemu-img", "qemu-storage-daemon")
MIB = 1 << 20
BLKFERRY = [sys.executable, "-m", "blkferry.cli.main", "image"]


def image(path, size="16M"):
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), size)
    return str(path)


def add(daemon, path, name="n", **more):
    file = {"driver": "file", "filename": str(path)}
    daemon.execute("blockdev-add", driver="qcow2", node_name=name, file=file, discard="unmap", **more)


def bitmaps(daemon, name="n"):
    node = next(n for n in daemon.execute("query-named-block-nodes") if n["node-name"] == name)
    return {each["name"]: each for each in node.get("dirty-bitmaps", [])}


def stored(path):
    info = json.loads(peers.run("qemu-img", "info", "--output=json", str(path)).stdout)
    return {each["name"]: each for each in info["format-specific"]["data"].get("bitmaps", [])}


def digest(daemon, name, node="n"):
    return daemon.execute("x-debug-block-dirty-bitmap-sha256", node=node, name=name)["sha256"]


def dirty(daemon, name, node="n"):
    """The ranges of a bitmap, and its granularity."""
    bitmap = daemon.daemon.graph.nodes[node].dirty_bitmaps[name]
    at, found = 0, []
    for length, marked in bitmap.runs(0, bitmap.size):
        if marked:
            found.append((at, at + length))
        at += length
    return found


def test_commands_are_answered_as_qsd_does(tmp_path):
    image(tmp_path / "a.qcow2")
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(tmp_path / "a.qcow2")}}
    memory = {"driver": "null-co", "node-name": "m", "size": 4 * MIB, "read-zeroes": True}

    def to(command, name="b", node="n", **more):
        return f"block-dirty-bitmap-{command}", {"node": node, "name": name, **more}

    query = ("x-debug-block-dirty-bitmap-sha256", {"node": "n", "name": "b"})
    qsd.compare(
        [
            ("blockdev-add", node),
            ("blockdev-add", memory),
            to("add", node="nobody"),
            to("clear", node="nobody"),
            to("clear"),
            to("add", name=""),
            to("add", granularity=1000),
            to("add", granularity=256),
            to("add", name="x" * 1024),
            to("add"),
            to("add"),
            query,
            to("disable"),
            to("enable"),
            to("clear"),
            to("add", name="small", node="m", granularity=512),
            ("block-dirty-bitmap-merge", {"node": "n", "target": "b", "bitmaps": [{"node": "m", "name": "small"}]}),
            ("block-dirty-bitmap-merge", {"node": "n", "target": "b", "bitmaps": ["none"]}),
            (
                "transaction",
                {"actions": [{"type": "abort", "data": {}}]},
            ),
            to("remove"),
            to("remove"),
        ]
    )


def test_a_refused_transaction_changes_nothing(tmp_path):
    with DaemonThread() as daemon:
        add(daemon, image(tmp_path / "a.qcow2"))
        daemon.execute("block-dirty-bitmap-add", node="n", name="old")
        daemon.export("n", writable=True)
        with daemon.client() as client:
            client.write(0, b"x" * 100)
        before = bitmaps(daemon)
        actions = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "new"}},
            {"type": "block-dirty-bitmap-merge", "data": {"node": "n", "target": "new", "bitmaps": ["old"]}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "old"}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "n", "name": "old"}},
        ]
        with pytest.raises(Error, match="aborted using Abort"):
            daemon.execute("transaction", actions=[*actions, {"type": "abort", "data": {}}])
        assert bitmaps(daemon) == before
        assert before["old"]["count"] == 65536
        daemon.execute("transaction", actions=actions)
        after = bitmaps(daemon)
        assert (after["new"]["count"], after["old"]["count"], after["old"]["recording"]) == (65536, 0, False)


@pytest.mark.parametrize("kind", ["qcow2", "raw", "window", "file", "below", "direct"])
@pytest.mark.parametrize("granularity", [512, 4096, 65536, MIB])
def test_every_change_is_covered(tmp_path, kind, granularity):
    """Through one export: in place, allocating, zeroes, discards; before and after clearing."""
    size = 8 * MIB
    with DaemonThread() as daemon:
        watched = "n"
        if kind in ("qcow2", "below"):
            image(tmp_path / "a", str(size))
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(tmp_path / "a"), discard="unmap")
            daemon.execute("blockdev-add", driver="qcow2", node_name="n", file="f", discard="unmap")
            watched = "n" if kind == "qcow2" else "f"
        else:
            (tmp_path / "a").write_bytes(bytes(size + 8192))
            file = {"driver": "file", "filename": str(tmp_path / "a"), "discard": "unmap"}
            if kind == "raw":
                daemon.execute("blockdev-add", driver="raw", node_name="n", file=file, discard="unmap", size=size)
            elif kind == "window":
                daemon.execute("blockdev-add", node_name="f", **file)
                daemon.execute("blockdev-add", driver="raw", node_name="n", file="f", offset=2560, size=size)
                daemon.execute("block-dirty-bitmap-add", node="n", name="upper", granularity=32768)
                watched = "f"
            else:
                cache = {"direct": kind == "direct"}
                daemon.execute("blockdev-add", node_name="n", cache=cache, **file)
        daemon.export("n", writable=True)
        rng = random.Random(granularity)
        with daemon.client() as client:
            client.write(0, b"warm" * 50000)
            client.flush()
            before = (tmp_path / "a").read_bytes()
            guest = client.read(0, size)
            daemon.execute("block-dirty-bitmap-add", node=watched, name="b", granularity=granularity)
            for step in range(120):
                at = rng.choice([rng.randrange(size - 200000), rng.randrange(0, 300) * 512, 0])
                length = rng.choice([1, 512, 4096, 70000, 200000])
                if step % 5 == 4:
                    client.zero(at, length)
                elif step % 7 == 6:
                    client.trim(at, length)
                else:
                    client.write(at, bytes([rng.randrange(1, 256)]) * length, CmdFlag.FUA if step % 3 == 0 else 0)
                if step in (40, 80):
                    client.flush()
                    daemon.execute("block-dirty-bitmap-clear", node=watched, name="b")
                    before, guest = (tmp_path / "a").read_bytes(), client.read(0, size)
            client.flush()
            now = client.read(0, size) if watched == "n" else (tmp_path / "a").read_bytes()
            was = guest if watched == "n" else before.ljust(len(now), b"\0")
            marked = dirty(daemon, "b", watched)
        assert len(marked) > 0
        at = 0
        for start, end in [*marked, (len(now), len(now))]:
            assert was[at:start] == now[at:start], f"an unmarked change between {at} and {start}"
            at = end


@pytest.mark.parametrize("length", [4096, 70000, 6 * MIB])
@pytest.mark.parametrize("flags", [0, CmdFlag.FUA])
def test_a_write_that_begins_where_all_is_marked_is_marked_to_its_end(tmp_path, monkeypatch, length, flags):
    """Of a raw image, where nobody but the export itself sees to that."""
    monkeypatch.setattr(pace, "STALL_SECONDS", 60)  # or a slow machine's writes all go to the engine
    (tmp_path / "a").write_bytes(bytes(8 * MIB))
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="n", filename=str(tmp_path / "a"))
        for name, granularity in (("b", 4096), ("wider", MIB)):
            daemon.execute("block-dirty-bitmap-add", node="n", name=name, granularity=granularity)
        for name in ("e", "f"):
            daemon.export("n", name=name, export_id=name, writable=True)
        with daemon.client("e") as client, daemon.client("f") as other:
            client.write(65536, b"x" * 8192)
            client.write(65536 + 8191, b"y" * length, flags)
            assert dirty(daemon, "b") == [(65536, (65536 + 8191 + length + 4095) // 4096 * 4096)]
            other.write(65536, b"x", flags)
            daemon.execute("block-dirty-bitmap-clear", node="n", name="b")
            for each, at in ((client, 65536), (other, 0), (client, 8192), (other, 65537)):
                each.write(at, b"z", flags)
            assert dirty(daemon, "b") == [(0, 4096), (8192, 12288), (65536, 65536 + 4096)]


def test_only_what_was_written_is_marked(tmp_path):
    with DaemonThread() as daemon:
        add(daemon, image(tmp_path / "a"))
        daemon.execute("block-dirty-bitmap-add", node="n", name="b", granularity=4096)
        daemon.export("n", writable=True)
        with daemon.client() as client:
            client.write(MIB, b"x")
            client.write(MIB, b"x" * 4096)
            client.zero(2 * MIB, 65536)
            client.read(4 * MIB, 4096)
        assert dirty(daemon, "b") == [(MIB, MIB + 4096), (2 * MIB, 2 * MIB + 65536)]


def test_persistent_bitmaps_survive_and_qemu_agrees(tmp_path):
    path = image(tmp_path / "a.qcow2")
    with DaemonThread() as daemon:
        add(daemon, path)
        for name, more in (("on", {}), ("off", {"disabled": True}), ("gone", {})):
            daemon.execute("block-dirty-bitmap-add", node="n", name=name, persistent=True, **more)
        daemon.execute("block-dirty-bitmap-add", node="n", name="passing")
        daemon.export("n", writable=True)
        with daemon.client() as client:
            client.write(3 * MIB, b"x" * 100000)
        wanted = digest(daemon, "on")
        daemon.execute("block-dirty-bitmap-remove", node="n", name="gone")
    assert {name: each["flags"] for name, each in stored(path).items()} == {"on": ["auto"], "off": []}
    peers.run("qemu-img", "check", "-q", path)
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": path}}
    theirs = qsd.theirs([("blockdev-add", node), ("x-debug-block-dirty-bitmap-sha256", {"node": "n", "name": "on"})])
    assert theirs[1] == {"sha256": wanted}
    peers.run("qemu-img", "bitmap", "--add", path, "theirs")
    peers.run("qemu-img", "bitmap", "--merge", "on", path, "theirs")
    with DaemonThread() as daemon:
        add(daemon, path)
        assert digest(daemon, "theirs") == digest(daemon, "on") == wanted
        crashed = tmp_path / "crashed.qcow2"
        shutil.copy(path, crashed)
        daemon.execute("block-dirty-bitmap-remove", node="n", name="theirs")
    assert set(stored(path)) == {"on", "off"}
    peers.run("qemu-img", "check", "-q", path)
    with DaemonThread() as daemon:
        add(daemon, crashed)
        assert bitmaps(daemon)["on"]["inconsistent"]
        with pytest.raises(Error, match="inconsistent"):
            daemon.execute("block-dirty-bitmap-clear", node="n", name="on")
        for name in ("on", "off", "theirs"):
            daemon.execute("block-dirty-bitmap-remove", node="n", name=name)
    assert stored(crashed) == {}
    peers.run("qemu-img", "check", "-q", str(crashed))


def test_the_digest_of_nothing_is_that_of_a_word(tmp_path):
    with DaemonThread() as daemon:
        add(daemon, image(tmp_path / "a", "512"))
        daemon.execute("block-dirty-bitmap-add", node="n", name="b")
        assert digest(daemon, "b") == hashlib.sha256(bytes(8)).hexdigest()


def test_the_image_command_does_what_qemu_img_does(tmp_path):
    steps = [
        ("--add", "-g", "4096", "T", "one"),
        ("--add", "--disable", "T", "two"),
        ("--merge", "src", "-b", "S", "-F", "qcow2", "T", "two"),
        ("--merge", "two", "--disable", "T", "one"),
        ("--add", "T", "three"),
        ("--clear", "--enable", "T", "two"),
        ("--remove", "T", "three"),
    ]
    source = image(tmp_path / "source")
    peers.run("qemu-img", "bitmap", "--add", source, "src")
    peers.run("qemu-io", "-c", "write 1M 8k", source)
    digests = {}
    for who, command in (
        ("theirs", lambda *argv: peers.run("qemu-img", "bitmap", *argv)),
        ("ours", lambda *argv: subprocess.run([*BLKFERRY, "bitmap", *argv], check=True, timeout=60)),
    ):
        target = image(tmp_path / who)
        for step in steps:
            command(*({"T": target, "S": source}.get(each, each) for each in step))
        peers.run("qemu-img", "check", "-q", target)
        flags = {name: (each["flags"], each["granularity"]) for name, each in stored(target).items()}
        with DaemonThread() as daemon:
            add(daemon, target)
            digests[who] = flags, {name: (digest(daemon, name), bitmaps(daemon)[name]["count"]) for name in flags}
    assert digests["ours"] == digests["theirs"]
    assert digests["ours"][1]["one"][1] == 65536


def test_a_bitmap_that_could_not_be_stored_is_an_error(tmp_path):
    """Not only a line in the log: whoever backs up by it would never know."""
    path = tmp_path / "image.qcow2"
    subprocess.run([*BLKFERRY, "create", "-f", "qcow2", path, "64G"], check=True, timeout=60, stdout=subprocess.DEVNULL)
    size = path.stat().st_size
    full = ["prlimit", f"--fsize={size}", *BLKFERRY, "bitmap", "--add", path, "b"]
    done = subprocess.run(full, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Could not write all of '{path}': File too large" in done.stderr
    assert "No errors were found" in peers.run("qemu-img", "check", path).stdout
