"""What the meta contexts of an export say, as nbdinfo and libnbd read it from us and from qemu-storage-daemon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from served import change, create, daemon_of, mapped, qcow2, spelled

import peers
from blkferry.errors import Error

pytestmark = peers.requires("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo")

DEPTH = "qemu:allocation-depth"
K = 1024


@pytest.fixture(params=["ours", "theirs"])
def daemon(request, tmp_path):
    with daemon_of(request.param, tmp_path) as started:
        yield started


@pytest.fixture
def chain(tmp_path) -> Path:
    """Three layers, each longer than the one below it, with data and zeroes of their own."""
    base = create(tmp_path / "base.qcow2", "1M")
    change(base, "write 0 64k", "write -z 64k 64k", "write 512k 64k")
    middle = create(tmp_path / "middle.qcow2", "2M", base)
    change(middle, "write 128k 64k")
    top = create(tmp_path / "top.qcow2", "3M", middle)
    change(top, "write 256k 64k", "write -z 320k 64k")
    return top


CHAIN = [
    (0, 128 * K, 3),
    (128 * K, 64 * K, 2),
    (192 * K, 64 * K, 0),
    (256 * K, 128 * K, 1),
    (384 * K, 128 * K, 0),
    (512 * K, 64 * K, 3),
    (576 * K, 448 * K, 0),
    (1024 * K, 1024 * K, 3),  # behind the end of the base
    (2048 * K, 1024 * K, 2),  # behind the end of the one in the middle
]


def test_depth_names_the_layer_that_has_the_data(daemon, chain):
    daemon.execute("blockdev-add", **qcow2(chain, "top", read_only=True))
    assert mapped(daemon.export("top", writable=False, allocation_depth=True), DEPTH) == CHAIN


def test_depth_of_nodes_without_backing_files(daemon, tmp_path):
    (tmp_path / "disk.raw").write_bytes(bytes(64 * K) + b"x" * 64 * K)
    alone = create(tmp_path / "alone.qcow2", "256k")
    change(alone, "write 64k 64k")
    over = create(tmp_path / "over.qcow2", "256k", tmp_path / "disk.raw", "raw")
    file = {"driver": "file", "filename": str(tmp_path / "disk.raw")}
    daemon.execute("blockdev-add", driver="raw", node_name="raw", file=file, read_only=True)
    daemon.execute("blockdev-add", **qcow2(alone, "alone", read_only=True))
    daemon.execute("blockdev-add", **qcow2(over, "over", read_only=True))
    for node in ("raw", "alone", "over"):
        daemon.export(node, node, node, writable=False, allocation_depth=True)
    assert mapped(daemon.socket, DEPTH, "raw") == [(0, 128 * K, 1)]
    assert mapped(daemon.socket, DEPTH, "alone") == [(0, 64 * K, 0), (64 * K, 64 * K, 1), (128 * K, 128 * K, 0)]
    assert mapped(daemon.socket, DEPTH, "over") == [(0, 256 * K, 2)]


def test_depth_follows_an_export_to_an_overlay(daemon, chain, tmp_path):
    daemon.execute("blockdev-add", **qcow2(chain, "top"))
    overlay = create(tmp_path / "overlay.qcow2", "3M")
    daemon.execute("blockdev-add", **qcow2(overlay, "overlay"))
    socket = daemon.export("top", writable=True, allocation_depth=True)
    daemon.execute("blockdev-snapshot", node="top", overlay="overlay")
    peers.run("qemu-io", "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///?socket={socket}")
    moved = [(offset, length, value and value + 1) for offset, length, value in CHAIN]
    moved[0:1] = [(0, 64 * K, 1), (64 * K, 64 * K, 4)]
    assert mapped(socket, DEPTH) == moved


def test_contexts_that_were_not_asked_for_are_not_offered(daemon, chain):
    daemon.execute("blockdev-add", **qcow2(chain, "top", read_only=True))
    socket = daemon.export("top", writable=False)
    listed = json.loads(peers.run("nbdinfo", "--json", f"nbd+unix:///?socket={socket}").stdout)
    assert listed["exports"][0]["contexts"] == ["base:allocation"]


# Dirty bitmaps ---------------------------------------------------------------------------------------------------


BITMAP = "qemu:dirty-bitmap:"


@pytest.fixture
def marked(tmp_path) -> Path:
    """An image with the bitmaps "fine" (4 KiB), "rough" (64 KiB) and "past", which is disabled."""
    path = create(tmp_path / "marked.qcow2", "1052672")  # ends within a granule of the rough one
    peers.run("qemu-img", "bitmap", "--add", "--granularity", "4k", path, "fine")
    peers.run("qemu-img", "bitmap", "--add", "--granularity", "64k", path, "rough")
    peers.run("qemu-img", "bitmap", "--add", "--granularity", "64k", path, "past")
    change(path, "write 128k 64k")
    peers.run("qemu-img", "bitmap", "--disable", path, "past")
    change(path, "write 0 512", "write 8k 4k", "write 1048576 512")
    return path


FINE = [
    (0, 4 * K, 1),
    (4 * K, 4 * K, 0),
    (8 * K, 4 * K, 1),
    (12 * K, 116 * K, 0),
    (128 * K, 64 * K, 1),
    (192 * K, 832 * K, 0),
    (1024 * K, 4 * K, 1),
]
ROUGH = [(0, 64 * K, 1), (64 * K, 64 * K, 0), (128 * K, 64 * K, 1), (192 * K, 832 * K, 0), (1024 * K, 4 * K, 1)]
PAST = [(0, 128 * K, 0), (128 * K, 64 * K, 1), (192 * K, 836 * K, 0)]


def test_bitmaps_say_what_was_written(daemon, marked):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    names = ["rough", {"node": "m", "name": "fine"}, "past"]
    socket = daemon.export("m", writable=True, bitmaps=names, allocation_depth=True)
    listed = json.loads(peers.run("nbdinfo", "--json", f"nbd+unix:///?socket={socket}").stdout)
    assert listed["exports"][0]["contexts"] == [
        "base:allocation",
        DEPTH,
        *(BITMAP + name for name in ("rough", "fine", "past")),
    ]
    assert mapped(socket, BITMAP + "fine") == FINE
    assert mapped(socket, BITMAP + "rough") == ROUGH
    assert mapped(socket, BITMAP + "past") == PAST


def test_bitmaps_that_are_enabled_go_on_recording(daemon, marked):
    daemon.execute("blockdev-add", **qcow2(marked, "m", discard="unmap"))
    socket = daemon.export("m", writable=True, bitmaps=["rough", "past"])
    uri = f"nbd+unix:///?socket={socket}"
    peers.run("qemu-io", "-f", "raw", "-c", "write 512k 4k", "-c", "write -z 640k 4k", "-c", "discard 768k 64k", uri)
    recorded = [(512 * K, 64 * K, 1), (640 * K, 64 * K, 1), (768 * K, 64 * K, 1)]
    assert [each for each in mapped(socket, BITMAP + "rough") if each[2] and each not in ROUGH] == recorded
    assert mapped(socket, BITMAP + "past") == PAST


def test_bitmaps_of_backing_files_are_found_and_stay_with_their_node(daemon, marked, tmp_path):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    overlay = create(tmp_path / "overlay.qcow2", "2M")
    daemon.execute("blockdev-add", **qcow2(overlay, "overlay"))
    socket = daemon.export("m", writable=True, bitmaps=["rough"])
    daemon.execute("blockdev-snapshot", node="m", overlay="overlay")
    peers.run("qemu-io", "-f", "raw", "-c", "write 512k 64k", f"nbd+unix:///?socket={socket}")
    assert mapped(socket, BITMAP + "rough") == ROUGH  # the write went to the overlay
    daemon.export("overlay", "longer", "longer", writable=True, bitmaps=["past"])
    assert mapped(socket, BITMAP + "past", "longer") == [*PAST[:-1], (192 * K, 2048 * K - 192 * K, 0)]


def test_an_exported_bitmap_goes_on_when_its_node_is_reopened(daemon, marked):
    options = qcow2(marked, "m")
    daemon.execute("blockdev-add", **options)
    socket = daemon.export("m", writable=True, bitmaps=["rough"])
    daemon.execute("blockdev-reopen", options=[spelled(options | {"lazy_refcounts": True})])
    peers.run("qemu-io", "-f", "raw", "-c", "write 512k 4k", f"nbd+unix:///?socket={socket}")
    assert (512 * K, 64 * K, 1) in mapped(socket, BITMAP + "rough")
    with pytest.raises(Error, match="Bitmap 'rough' is currently in use"):
        daemon.export("m", "f", "f", writable=True, bitmaps=["rough"])


def test_qemu_img_maps_by_a_bitmap(daemon, marked):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    socket = daemon.export("m", writable=True, bitmaps=["fine"])
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap={BITMAP}fine"
    done = peers.run("qemu-img", "map", "--output=json", "--image-opts", options)
    found = [(each["start"], each["length"], int(not each["data"])) for each in json.loads(done.stdout)]
    assert found == FINE  # qemu-img calls dirty ranges holes


LIBNBD = """
import nbd, sys
socket, extended = sys.argv[1], sys.argv[2] == "64"
h = nbd.NBD()
h.set_request_extended_headers(extended)
for context in ("base:allocation", "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:past"):
    h.add_meta_context(context)
h.connect_unix(socket)
assert h.get_extended_headers_negotiated() == extended
seen = {}
def extent(context, offset, entries, error):
    seen.setdefault(context, []).append((offset, [tuple(each) for each in entries]))
def extent32(context, offset, entries, error):
    extent(context, offset, zip(entries[::2], entries[1::2]), error)
h.block_status_64(1052672, 0, extent) if extended else h.block_status(1052672, 0, extent32)
assert seen["qemu:dirty-bitmap:fine"] == [(0, FINE)], seen
assert seen["qemu:dirty-bitmap:past"] == [(0, [(131072, 0), (65536, 1), (856064, 0)])], seen
assert set(seen) == {"base:allocation", "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:past"}
seen.clear()
h.block_status_64(1052672 - 10000, 10000, extent, nbd.CMD_FLAG_REQ_ONE)
assert seen["qemu:dirty-bitmap:fine"] == [(10000, [(2288, 1)])], seen
if extended:
    seen.clear()
    h.block_status_filter(65536, 131072, ["qemu:dirty-bitmap:past"], extent)
    assert seen == {"qemu:dirty-bitmap:past": [(131072, [(65536, 1)])]}, seen
print("fine")
"""


@pytest.mark.parametrize("bits", ["32", "64"])
@peers.requires(peers.LIBNBD)
def test_libnbd_sees_the_same_in_all_forms(daemon, marked, bits):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    socket = daemon.export("m", writable=True, bitmaps=["fine", "past"])
    expected = [(length, value) for _, length, value in FINE]
    done = peers.libnbd_script(LIBNBD.replace("FINE", repr(expected)), socket, bits)
    assert done.stdout == "fine\n"


# What cannot be exported -----------------------------------------------------------------------------------------


REFUSED = [
    ({"bitmaps": ["nothing"]}, "Bitmap 'nothing' is not found"),
    ({"bitmaps": ["past", "fine"]}, "Enabled bitmap 'fine' incompatible with readonly export"),
    ({"bitmaps": [{"node": "nobody", "name": "fine"}]}, "Node 'nobody' not found"),
    ({"bitmaps": [{"node": "m", "name": "nothing"}]}, "Dirty bitmap 'nothing' not found"),
    ({"bitmaps": ["nothing"], "name": "taken"}, "NBD server already has export named 'taken'"),
    (
        {"bitmaps": ["past", "rough"], "writable": True},
        "Bitmap 'rough' is currently in use by another operation and cannot be used",
    ),
    (
        {"bitmaps": [{"node": "m", "name": "rough"}]},
        "Bitmap 'rough' is currently in use by another operation and cannot be used",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_bitmaps_that_cannot_be_exported(daemon, marked, options, text):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    daemon.export("m", "taken", "taken", writable=True, bitmaps=["rough"])
    with pytest.raises(Error) as caught:
        daemon.export("m", **({"writable": False} | options))
    assert caught.value.message == text
    daemon.export("m", writable=False, bitmaps=["past"])  # nothing is left behind, "past" is free


def test_a_bitmap_that_was_in_use_in_a_crash_cannot_be_exported(daemon, marked, tmp_path):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    daemon.export("m", writable=True, bitmaps=["rough"])
    crashed = Path(shutil.copy(marked, tmp_path / "crashed.qcow2"))
    daemon.execute("blockdev-add", **qcow2(crashed, "crashed"))
    for writable in (False, True):
        with pytest.raises(Error) as caught:
            daemon.export("crashed", "f", "f", writable=writable, bitmaps=["rough"])
        assert caught.value.message == "Bitmap 'rough' is inconsistent and cannot be used"


def test_bitmaps_are_free_again_once_the_export_has_gone(daemon, marked):
    daemon.execute("blockdev-add", **qcow2(marked, "m"))
    for _ in range(2):
        daemon.export("m", writable=True, bitmaps=["rough", "fine"])
        daemon.execute("block-export-del", id="e")
    daemon.export("m", writable=False, bitmaps=[{"node": "m", "name": "fine"}])
