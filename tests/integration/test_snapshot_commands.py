"""Overlays that take over a node's users, snapshots inside images, and backing chains in queries."""

import threading

import pytest
from cow_driver import BLOCK, MADE, cow_driver

from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import ConnectionEnded

SIZE = 1 << 20
pytestmark = pytest.mark.usefixtures("cow_driver")
__all__ = ["cow_driver"]


@pytest.fixture
def daemon(tmp_path):
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="base", filename=str(tmp_path / "base"))
        yield daemon


def add_cow(daemon, name, size=SIZE, **more):
    inner = {"driver": "memory", "size": size}
    daemon.execute("blockdev-add", driver="test-cow", node_name=name, file=inner, **more)


def refused(daemon, command, **arguments):
    with pytest.raises(Error) as caught:
        daemon.execute(command, **arguments)
    return str(caught.value)


def exported(daemon):
    return {export["id"]: export["node-name"] for export in daemon.execute("query-block-exports")}


def shown(daemon, name, **flat):
    return next(n for n in daemon.execute("query-named-block-nodes", **flat) if n["node-name"] == name)


def node(daemon, name):
    return daemon.daemon.graph.nodes[name]


def test_an_export_follows_to_the_overlay(daemon, tmp_path):
    daemon.export("base")
    with daemon.client() as client:
        client.write(0, b"old")
        assert client.read(0, 4) == b"oldb"
        add_cow(daemon, "ov", backing=None)
        daemon.execute("blockdev-snapshot", node="base", overlay="ov")
        assert exported(daemon) == {"e": "ov"}
        assert client.read(0, 4) == b"oldb"
        client.write(1, b"NEW")
        client.flush()
        assert client.read(0, 5) == b"oNEWb"
        assert client.read(SIZE - 3, 3) == b"bbb"
        assert (tmp_path / "base").read_bytes()[:4] == b"oldb"
        assert shown(daemon, "base")["ro"] is True
        add_cow(daemon, "ov2", backing=None)
        daemon.execute("blockdev-snapshot", node="ov", overlay="ov2")
        client.write(0, b"3")
        assert client.read(0, 5) == b"3NEWb"
        assert exported(daemon) == {"e": "ov2"}
    daemon.execute("block-export-del", id="e", mode="hard")
    for name in ("base", "ov"):
        above = {"base": "ov", "ov": "ov2"}[name]
        busy = f"Node '{name}' is busy: node is used as backing hd of '{above}'"
        assert refused(daemon, "blockdev-del", node_name=name) == busy
        assert refused(daemon, "block_resize", node_name=name, size=SIZE) == busy
        assert refused(daemon, "blockdev-snapshot", node=name, overlay="ov2") == busy
    for name in ("ov2", "ov", "base"):
        daemon.execute("blockdev-del", node_name=name)


def test_all_users_follow_and_permissions_hold(daemon):
    daemon.export("base", "a", "a")
    daemon.export("base", "b", "b", writable=False)
    disk = daemon.call(lambda: daemon.daemon.attach("base"))
    add_cow(daemon, "ov", backing=None)
    daemon.execute("blockdev-snapshot", node="base", overlay="ov")
    assert exported(daemon) == {"a": "ov", "b": "ov"}
    with daemon.client("a") as one, daemon.client("b") as other:
        one.write(BLOCK, b"w")
        assert other.read(BLOCK, 2) == b"wb"
    assert daemon.call(lambda: disk.read(BLOCK, 2)) == b"wb"
    text = refused(daemon, "block_resize", node_name="ov", size=2 * SIZE)
    assert text.startswith("Permission conflict on node 'ov'")
    assert [edge.user.describe() for edge in node(daemon, "base").parents] == ["node 'ov'"]


def test_requests_in_flight_all_the_while(daemon):
    daemon.export("base")
    failures = []
    stop = threading.Event()

    def hammer(seed):
        try:
            with daemon.client() as client:
                count = 0
                while not stop.is_set():
                    offset = (seed * 64 + count % 64) * BLOCK
                    fill = bytes([count % 250 + 1])
                    client.write(offset, fill * 700)
                    if client.read(offset, 701) != fill * 700 + b"b":
                        failures.append((seed, count))
                    count += 1
        except (OSError, AssertionError, ConnectionEnded) as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    below = "base"
    for number in range(8):
        add_cow(daemon, f"ov{number}", backing=None)
        daemon.execute("blockdev-snapshot", node=below, overlay=f"ov{number}")
        below = f"ov{number}"
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert shown(daemon, "ov7")["backing_file_depth"] == 8


def test_an_overlay_comes_to_the_thread_of_its_base(daemon):
    daemon.execute("object-add", qom_type="iothread", id="io")
    daemon.export("base", iothread="io")
    add_cow(daemon, "ov", backing=None)
    with daemon.client() as client:
        client.write(0, b"1")
        daemon.execute("blockdev-snapshot", node="base", overlay="ov")
        client.write(1, b"2")
        assert client.read(0, 3) == b"12b"
    assert node(daemon, "ov").services is node(daemon, "base").services is not daemon.daemon.services


def test_refusals(daemon):
    add_cow(daemon, "ov", backing=None)
    add_cow(daemon, "small", size=512, backing=None)
    add_cow(daemon, "backed", backing="base")
    daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE)
    for node_name, overlay, text in (
        ("nope", "ov", "Cannot find device='nope' nor node-name='nope'"),
        ("ov", "nope", "Cannot find device='nope' nor node-name='nope'"),
        ("ov", "m", "The overlay does not support backing images"),
        ("ov", "ov", "Making 'ov' a backing child of 'ov' would create a cycle"),
        ("m", "backed", "The overlay already has a backing image"),
    ):
        assert refused(daemon, "blockdev-snapshot", node=node_name, overlay=overlay) == text
    daemon.export("m", "m", "m")
    text = refused(daemon, "blockdev-snapshot", node="m", overlay="small")
    assert text == "Node 'small' is smaller than node 'm', whose users it would get"
    daemon.export("ov", "ov", "ov")
    assert refused(daemon, "blockdev-snapshot", node="m", overlay="ov") == "The overlay is already in use"
    assert exported(daemon) == {"m": "m", "ov": "ov"}


def test_a_larger_overlay_is_welcome(daemon):
    daemon.export("base")
    add_cow(daemon, "ov", size=2 * SIZE, backing=None)
    with daemon.client() as client:
        daemon.execute("blockdev-snapshot", node="base", overlay="ov")
        assert client.read(SIZE - 1, 1) == b"b"


def test_a_refusal_changes_nothing(daemon):
    daemon.export("base")
    add_cow(daemon, "ov", backing=None, read_only=True)
    with daemon.client() as client:
        client.write(0, b"1")
        text = refused(daemon, "blockdev-snapshot", node="base", overlay="ov")
        assert text == "Block node is read-only: 'ov'"
        client.write(1, b"2")
        assert client.read(0, 3) == b"12b"
    assert exported(daemon) == {"e": "base"}
    assert shown(daemon, "base")["ro"] is False
    assert "backing" not in node(daemon, "ov").children
    assert len(node(daemon, "base").parents) == 1
    daemon.execute("blockdev-del", node_name="ov")


def test_a_disk_of_a_program_follows_and_its_node_goes_with_it(tmp_path):
    with DaemonThread() as daemon:
        (tmp_path / "d").write_bytes(b"d" * SIZE)
        disk = daemon.call(lambda: daemon.daemon.open(tmp_path / "d", writable=True))
        add_cow(daemon, "ov", backing=None)
        daemon.execute("blockdev-snapshot", node=disk.name, overlay="ov")
        assert disk.name == "ov"
        daemon.call(lambda: disk.write(0, b"w"))
        daemon.call(disk.close)
        daemon.execute("blockdev-del", node_name="ov")
        assert (tmp_path / "d").read_bytes()[:1] == b"d"


# blockdev-snapshot-sync ----------------------------------------------------------------------------------------


def sync(daemon, path, name="s", **more):
    arguments = {"node_name": "base", "snapshot_file": str(path), "snapshot_node_name": name, "format": "test-cow"}
    daemon.execute("blockdev-snapshot-sync", **arguments | more)


def test_an_overlay_is_made_and_put_on(daemon, tmp_path):
    daemon.export("base")
    path = tmp_path / "overlay"
    with daemon.client() as client:
        sync(daemon, path)
        assert exported(daemon) == {"e": "s"}
        client.write(0, b"w")
        assert client.read(0, 2) == b"wb"
        assert path.stat().st_size == SIZE
        assert MADE[str(path)] == {"backing-file": str(tmp_path / "base"), "backing-fmt": "file"}
        (tmp_path / "existing").write_bytes(bytes(SIZE))
        sync(daemon, tmp_path / "existing", "s2", node_name="s", mode="existing")
        assert client.read(0, 2) == b"wb"
    assert shown(daemon, "s2")["backing_file_depth"] == 2
    assert str(tmp_path / "existing") not in MADE


def test_a_relative_name_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(bytes(SIZE))
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="base", filename="base")
        (tmp_path / "deep").mkdir()
        sync(daemon, "deep/overlay")
    assert MADE["deep/overlay"]["backing-file"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"node_name": "nope"}, "Cannot find device='' nor node-name='nope'"),
        ({"node_name": "base", "snapshot_node_name": "base"}, "New overlay node-name already in use"),
        ({"snapshot_node_name": "1x"}, "Invalid node-name: '1x'"),
        ({"format": "nope"}, "Unknown file format 'nope'"),
        ({"format": "raw"}, "Backing file not supported for file format 'raw'"),
        ({"snapshot_file": "/nope/x"}, "Could not create '/nope/x': No such file or directory"),
        ({"mode": "existing"}, "Could not open '/nowhere': No such file or directory"),
    ],
)
def test_what_an_overlay_cannot_be_made_of(daemon, more, text):
    arguments = {"node_name": "base", "snapshot_file": "/nowhere", "snapshot_node_name": "s", "format": "test-cow"}
    assert refused(daemon, "blockdev-snapshot-sync", **arguments | more) == text
    assert set(daemon.daemon.graph.nodes) == {"base"}


def test_a_device_is_never_found(daemon):
    text = refused(daemon, "blockdev-snapshot-sync", device="base", snapshot_file="/nope/x")
    assert text == "Cannot find device='base' nor node-name=''"
    text = refused(daemon, "blockdev-snapshot-sync", node_name="base", snapshot_file="/nope/x")
    assert text == "New overlay node-name missing"


def test_an_overlay_that_cannot_be_put_on_is_closed_again(daemon, tmp_path):
    (tmp_path / "tiny").write_bytes(bytes(512))
    daemon.export("base")
    arguments = {"node_name": "base", "snapshot_file": str(tmp_path / "tiny"), "snapshot_node_name": "s"}
    text = refused(daemon, "blockdev-snapshot-sync", format="test-cow", mode="existing", **arguments)
    assert "is smaller than node 'base'" in text
    assert set(daemon.daemon.graph.nodes) == {"base"}


# Inside images -------------------------------------------------------------------------------------------------


def test_snapshots_inside_an_image(daemon):
    add_cow(daemon, "c", backing=None)
    daemon.export("c")
    create, delete = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"
    with daemon.client() as client:
        for name in ("one", "two"):
            daemon.execute(create, device="c", name=name)
        client.write(0, b"w")
        assert client.read(0, 1) == b"w"
    assert [each["name"] for each in shown(daemon, "c")["image"]["snapshots"]] == ["one", "two"]
    assert refused(daemon, create, device="c", name="one") == "Snapshot with name 'one' already exists on device 'c'"
    assert refused(daemon, create, device="c", name="") == "Name is empty"
    assert refused(daemon, delete, device="c") == "Name or id must be provided"
    text = refused(daemon, delete, device="c", name="three")
    assert text == "Snapshot with id 'null' and name 'three' does not exist on device 'c'"
    text = refused(daemon, delete, device="c", id="1", name="two")
    assert text == "Snapshot with id '1' and name 'two' does not exist on device 'c'"
    gone = daemon.execute(delete, device="c", name="one")
    clock = {"date-sec": 1, "date-nsec": 2, "vm-clock-sec": 3, "vm-clock-nsec": 4, "vm-state-size": 0}
    assert gone == {"id": "1", "name": "one", **clock}
    daemon.execute(delete, device="c", id="2", name="two")
    assert "snapshots" not in shown(daemon, "c")["image"]


def test_nodes_that_keep_no_snapshots(daemon):
    create, delete = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"
    text = refused(daemon, create, device="base", name="x")
    assert text == "Block format 'file' used by device 'base' does not support internal snapshots"
    text = refused(daemon, delete, device="base", name="x")
    assert text == "Failed to get a snapshot list: Operation not supported"
    for command in (create, delete):
        text = refused(daemon, command, device="nope", name="x")
        assert text == "Cannot find device='nope' nor node-name='nope'"
    add_cow(daemon, "c", backing="base")
    assert refused(daemon, create, device="base", name="x") == "Need a root block node"
    add_cow(daemon, "ro", backing=None, read_only=True)
    assert refused(daemon, create, device="ro", name="x") == "Device 'ro' is read only"


def test_the_name_of_the_backing_file(daemon):
    add_cow(daemon, "c", backing="base")
    add_cow(daemon, "top", backing="c", read_only=True)

    def change(image, name, device="top"):
        daemon.execute("change-backing-file", device=device, image_node_name=image, backing_file=name)

    for image, name, kept in (("c", "/x", ("/x", "file")), ("top", "/y", ("/y", "test-cow")), ("c", "", (None, None))):
        change(image, name)
        assert node(daemon, image).backing_name == kept
    assert shown(daemon, "top")["ro"] is True
    assert shown(daemon, "c")["ro"] is False
    add_cow(daemon, "other", backing=None)
    for image, device, text in (
        ("base", "top", "not allowing backing file change on an image without a backing file"),
        ("c", "nope", "Cannot find device='nope' nor node-name='nope'"),
        ("nope", "top", "Cannot find device='' nor node-name='nope'"),
        ("c", "c", "Need a root block node"),
        ("c", "other", "'other' and image file are not in the same chain"),
    ):
        with pytest.raises(Error) as caught:
            change(image, "/z", device)
        assert str(caught.value) == text


# Queries and events --------------------------------------------------------------------------------------------


def test_chains_in_queries(daemon, tmp_path):
    add_cow(daemon, "middle", backing="base")
    add_cow(daemon, "top", backing="middle")
    top = shown(daemon, "top")
    assert top["backing_file_depth"] == 2
    assert top["backing_file"] == node(daemon, "middle").filename()
    assert top["image"]["cluster-size"] == BLOCK
    assert top["image"]["backing-image"]["format"] == "test-cow"
    bottom = top["image"]["backing-image"]["backing-image"]
    assert (bottom["filename"], bottom["format"]) == (str(tmp_path / "base"), "file")
    assert bottom["format-specific"] == {"type": "file", "data": {}}
    flat = shown(daemon, "top", flat=True)
    assert "backing-image" not in flat["image"]
    assert (flat["backing_file_depth"], flat["backing_file"]) == (0, top["backing_file"])
    assert "backing_file" not in shown(daemon, "base")


def test_an_inline_backing_file_is_only_read(daemon):
    add_cow(daemon, "c", backing={"driver": "memory", "node-name": "b", "size": SIZE})
    assert shown(daemon, "b")["ro"] is True
    assert shown(daemon, "c")["ro"] is False


def test_a_node_in_an_iothread_tells_of_its_corruption(daemon):
    daemon.execute("object-add", qom_type="iothread", id="io")
    daemon.export("base", iothread="io")
    data = {"device": "", "node-name": "base", "msg": "bad", "fatal": True}

    async def tell():
        base = node(daemon, "base")
        base.services.loop.call_soon_threadsafe(base.emit, "BLOCK_IMAGE_CORRUPTED", data)

    daemon.call(tell)
    with daemon.client() as client:
        client.read(0, 1)
    daemon.execute("query-jobs")
    assert ("BLOCK_IMAGE_CORRUPTED", data) in daemon.events
