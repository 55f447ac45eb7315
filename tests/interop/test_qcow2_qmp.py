"""A qcow2 disk's life over QMP, with qemu-img looking at what it leaves behind."""

import json
import time

import pytest

from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from peers import requires, run

pytestmark = requires("qemu-img", "qemu-io")
MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def daemon():
    with DaemonThread() as daemon:
        yield daemon


def file(path):
    return {"driver": "file", "filename": str(path)}


def add(daemon, name, path, **more):
    daemon.execute("blockdev-add", driver="qcow2", node_name=name, file=file(path), **more)


def job(daemon, options, expect=""):
    """Run blockdev-create to its end; the job stays until it is dismissed."""
    daemon.execute("blockdev-create", job_id="j", options=options)
    deadline = time.monotonic() + 20
    while True:
        (state,) = daemon.execute("query-jobs")
        if state["status"] == "concluded":
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    daemon.execute("job-dismiss", id="j")
    assert expect in state.get("error", "")
    assert bool(expect) == ("error" in state)


def create(daemon, path, size=SIZE, **more):
    job(daemon, {"driver": "file", "filename": str(path), "size": 0})
    job(daemon, {"driver": "qcow2", "file": file(path), "size": size} | more)


def check(path):
    run("qemu-img", "check", "-q", path)


def info(path):
    return json.loads(run("qemu-img", "info", "-U", "--output=json", path).stdout)


def pattern(path, *reads):
    run("qemu-io", "-r", "-f", "qcow2", *(word for read in reads for word in ("-c", f"read -P {read}")), path)


def test_create_write_and_read_it_back(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    create(daemon, path, **{"cluster-size": 4096, "refcount-bits": 8, "lazy-refcounts": True})
    add(daemon, "d", path)
    daemon.export("d", writable=True)
    with daemon.client() as client:
        client.write(1000, b"\x07" * 100_000)
        client.flush()
        client.zero(4096, 8192)
        client.trim(3 * MIB, MIB)
        assert client.read(999, 3) == b"\0\x07\x07"
    daemon.execute("block-export-del", id="e", mode="hard")
    wait_until_gone(daemon, "e")
    daemon.execute("blockdev-del", node_name="d")
    check(path)
    pattern(path, "7 1000 3096", "0 4096 8192", "7 12288 80k")
    assert info(path)["cluster-size"] == 4096


def wait_until_gone(daemon, export):
    deadline = time.monotonic() + 10
    while any(each["id"] == export for each in daemon.execute("query-block-exports")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_refused_creation_says_why_in_its_job(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    job(daemon, {"driver": "file", "filename": str(path), "size": 0})
    job(
        daemon,
        {"driver": "qcow2", "file": file(path), "size": SIZE, "cluster-size": 1000},
        expect="Cluster size must be a power of two between 512 and 2048k",
    )


def test_overlays_take_over_exports_and_keep_their_base(daemon, tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(daemon, base)
    add(daemon, "base", base)
    daemon.export("base", writable=True)
    with daemon.client() as client:
        client.write(0, b"\x01" * MIB)
        daemon.execute(
            "blockdev-snapshot-sync", node_name="base", snapshot_file=str(top), snapshot_node_name="top", format="qcow2"
        )
        assert daemon.execute("query-block-exports")[0]["node-name"] == "top"
        client.write(4096, b"\x02" * 4096)
        assert client.read(0, 4096) == b"\x01" * 4096
        assert client.read(4096, 4096) == b"\x02" * 4096
        client.flush()
    daemon.stop()
    check(base)
    check(top)
    pattern(base, "1 0 1M")
    pattern(top, "1 0 4k", "2 4k 4k", "1 8k 1016k")
    assert info(top)["backing-filename"] == str(base)
    assert info(top)["backing-filename-format"] == "qcow2"


def test_an_overlay_that_was_made_before(daemon, tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(daemon, base)
    create(daemon, top, **{"backing-file": "base.qcow2", "backing-fmt": "qcow2"})
    add(daemon, "base", base)
    add(daemon, "top", top, backing=None)
    daemon.execute("blockdev-snapshot", node="base", overlay="top")
    nodes = {node["node-name"]: node for node in daemon.execute("query-named-block-nodes")}
    assert nodes["top"]["backing_file_depth"] == 1
    assert nodes["top"]["image"]["backing-image"]["filename"] == str(base)


def test_internal_snapshots(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    create(daemon, path)
    add(daemon, "d", path)
    daemon.export("d", writable=True)
    with daemon.client() as client:
        client.write(0, b"\x01" * MIB)
        daemon.execute("blockdev-snapshot-internal-sync", device="d", name="one")
        client.write(0, b"\x02" * 4096)
        daemon.execute("blockdev-snapshot-internal-sync", device="d", name="two")
        client.write(0, b"\x03" * 4096)
        with pytest.raises(Error, match="already exists"):
            daemon.execute("blockdev-snapshot-internal-sync", device="d", name="two")
        gone = daemon.execute("blockdev-snapshot-delete-internal-sync", device="d", name="one")
        assert (gone["id"], gone["name"]) == ("1", "one")
        assert client.read(0, 4096) == b"\x03" * 4096
        client.flush()
        with pytest.raises(Error, match="does not exist"):
            daemon.execute("blockdev-snapshot-delete-internal-sync", device="d", name="one")
    daemon.stop()
    check(path)
    assert [each["name"] for each in info(path)["snapshots"]] == ["two"]
    run("qemu-img", "snapshot", "-a", "two", path)
    pattern(path, "2 0 4k", "1 4k 1020k")


def test_a_snapshot_can_be_read_beside_the_disk(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-c", "write -P 5 0 64k", path)
    run("qemu-img", "snapshot", "-c", "then", path)
    run("qemu-io", "-c", "write -P 6 0 64k", path)
    for name, more, byte in (("now", {}, b"\x06"), ("then", {"snapshot": "then"}, b"\x05")):
        add(daemon, name, path, read_only=True, **more)
        daemon.export(name, name, name, writable=False)
        with daemon.client(name) as client:
            assert client.read(0, 65536) == byte * 65536
    with pytest.raises(Error, match="Can't find snapshot 'never'") as caught:
        add(daemon, "never", path, read_only=True, snapshot="never")
    assert caught.value.hint == "Known snapshots: 1 (then)."
    with pytest.raises(Error, match="can only be opened read-only"):
        add(daemon, "written", path, snapshot="then")


def test_resize_and_change_backing_file(daemon, tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(daemon, base)
    create(daemon, top, **{"backing-file": str(base), "backing-fmt": "qcow2"})
    add(daemon, "top", top)
    daemon.execute("block_resize", node_name="top", size=2 * SIZE)
    with pytest.raises(Error, match="must be a multiple of 512"):
        daemon.execute("block_resize", node_name="top", size=SIZE + 1)
    daemon.execute("change-backing-file", device="top", image_node_name="top", backing_file="base.qcow2")
    daemon.execute("blockdev-del", node_name="top")
    check(top)
    assert info(top)["virtual-size"] == 2 * SIZE
    assert info(top)["backing-filename"] == "base.qcow2"


def test_reopen_read_only_leaves_a_finished_image(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    create(daemon, path, **{"lazy-refcounts": True})
    add(daemon, "d", path)
    daemon.export("d", writable=True)
    with daemon.client() as client:
        client.write(0, b"\x01" * MIB)
        client.flush()
        client.disconnect()
    daemon.execute("block-export-del", id="e", mode="hard")
    wait_until_gone(daemon, "e")
    options = {"driver": "qcow2", "node-name": "d", "file": file(path)}
    daemon.execute("blockdev-reopen", options=[options | {"read-only": True}])
    assert info(path)["format-specific"]["data"]["lazy-refcounts"]
    assert not info(path)["dirty-flag"]
    run("qemu-img", "check", "-q", "-U", path)
    daemon.execute("blockdev-reopen", options=[options | {"l2-cache-size": 65536}])
    daemon.export("d", writable=True)
    with daemon.client() as client:
        client.write(MIB, b"\x02" * MIB)
        assert client.read(0, 2 * MIB) == b"\x01" * MIB + b"\x02" * MIB
    daemon.stop()
    check(path)
    pattern(path, "1 0 1M", "2 1M 1M")


def test_corruption_takes_the_node_offline_for_writing(daemon, tmp_path):
    path = tmp_path / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-c", "write -P 5 0 1M", path)
    header = path.read_bytes()[:104]
    l1 = int.from_bytes(header[40:48], "big")
    l2 = int.from_bytes(path.read_bytes()[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    with path.open("r+b") as image:
        image.seek(l2 + 8)
        image.write((0x8000_0000_0000_0000 | l1).to_bytes(8, "big"))  # the second cluster is the L1 table
    add(daemon, "d", path)
    daemon.export("d", writable=True)
    events = []
    daemon.call(lambda: subscribe(daemon, events))
    with daemon.client() as client:
        client.write(0, b"\x06" * 512)
        for offset in (65536, 0):
            with pytest.raises(OSError, match="writing to file failed"):
                client.write(offset, b"\x07" * 512)
        assert client.read(0, 512) == b"\x06" * 512
        assert client.read(131072, 512) == b"\x05" * 512
    (event,) = [data for name, data in events if name == "BLOCK_IMAGE_CORRUPTED"]
    assert event["node-name"] == "d"
    assert event["fatal"]
    assert "active L1 table" in event["msg"]
    daemon.stop()
    assert info(path)["format-specific"]["data"]["corrupt"]
    with DaemonThread() as again, pytest.raises(Error, match="Image is corrupt; cannot be opened read/write"):
        add(again, "d", path)


async def subscribe(daemon, events):
    daemon.daemon.subscribe(lambda name, data: events.append((name, data)))


@pytest.mark.parametrize("more", ["", ",extended_l2=on,cluster_size=16k"])
def test_a_raw_data_file_grows_as_qemus_does(daemon, tmp_path, more):
    """Every new cluster has its place at once; the raw file holds zeroes there, also where it was longer before."""
    maps = []
    for name in ("theirs", "ours"):
        path, raw = tmp_path / f"{name}.qcow2", tmp_path / f"{name}.raw"
        options = f"data_file={raw},data_file_raw=on{more}"
        run("qemu-img", "create", "-f", "qcow2", "-o", options, path, str(MIB + 4096))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 3 0 {MIB + 4096}", path)
        if name == "ours":
            with raw.open("ab") as file_:
                file_.write(b"\x07" * MIB)  # what somebody left there
            add(daemon, "d", path)
            daemon.execute("block_resize", node_name="d", size=3 * MIB)
            daemon.execute("blockdev-del", node_name="d")
            assert raw.read_bytes() == b"\x03" * (MIB + 4096) + bytes(2 * MIB - 4096)
        else:
            run("qemu-img", "resize", "-f", "qcow2", path, str(3 * MIB))
        check(path)
        pattern(path, f"3 0 {MIB + 4096}", f"0 {MIB + 4096} {2 * MIB - 4096}")
        extents = json.loads(run("qemu-img", "map", "--output=json", path).stdout)
        maps.append([{key: value for key, value in extent.items() if key != "filename"} for extent in extents])
    if not more:  # QEMU maps no subcluster of its own, so that what others write to the raw file stays unseen
        assert maps[0] == maps[1]
