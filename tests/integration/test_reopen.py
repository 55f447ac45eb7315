"""blockdev-reopen: other options for nodes in use, all or nothing, with clients that do not notice."""

import os

import pytest
from cow_driver import Cow, cow_driver
from qsd import compare

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

SIZE = 1 << 20
pytestmark = pytest.mark.usefixtures("cow_driver")
__all__ = ["cow_driver"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def daemon(image):
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", **file(image))
        yield daemon


def file(path, name="f", **more):
    return {"driver": "file", "node-name": name, "filename": str(path), **more}


def raw(name="r", child="f", **more):
    return {"driver": "raw", "node-name": name, "file": child, **more}


def memory(name, **more):
    return {"driver": "memory", "node-name": name, "size": SIZE, **more}


def cow(name, child, **more):
    return {"driver": "test-cow", "node-name": name, "file": child, **more}


def reopen(daemon, *options):
    daemon.execute("blockdev-reopen", options=list(options))


def refused(daemon, *options):
    with pytest.raises(Error) as caught:
        reopen(daemon, *options)
    return str(caught.value)


def shown(daemon, name):
    return next(n for n in daemon.execute("query-named-block-nodes") if n["node-name"] == name)


def node(daemon, name):
    return daemon.daemon.graph.nodes[name]


def test_a_client_stays_while_direct_io_comes_and_goes(daemon, image):
    daemon.export("f")
    with daemon.client() as client:
        expected = bytearray(image.read_bytes())
        for number, cache in enumerate([{"direct": True}, {"direct": False}, {"direct": True, "no-flush": True}, None]):
            reopen(daemon, file(image, **({"cache": cache} if cache else {})))
            storage = node(daemon, "f").storage
            wanted = cache or {}
            assert storage.direct is wanted.get("direct", False)
            assert storage.no_flush is wanted.get("no-flush", False)
            assert (node(daemon, "f").alignment > 1) is storage.direct
            assert shown(daemon, "f")["cache"]["direct"] is storage.direct
            client.write(number * 5000, b"n" * 777)
            expected[number * 5000 : number * 5000 + 777] = b"n" * 777
            client.flush()
            assert client.read(0, SIZE) == expected
    assert image.read_bytes() == expected


def test_read_only_and_back(daemon, image):
    reopen(daemon, file(image, **{"read-only": True}))
    assert shown(daemon, "f")["ro"] is True
    with pytest.raises(Error, match="Cannot export read-only node as writable"):
        daemon.export("f")
    reopen(daemon, file(image))
    daemon.export("f")
    with daemon.client() as client:
        client.write(0, b"w")
        assert client.read(0, 1) == b"w"
    text = refused(daemon, file(image, **{"read-only": True}))
    assert text == "Read-only block node 'f' cannot support read-write users"
    assert shown(daemon, "f")["ro"] is False
    with daemon.client() as client:
        client.write(0, b"x")


def test_read_only_reaches_inline_children(image):
    with DaemonThread() as daemon:
        options = {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": str(image)}}
        daemon.execute("blockdev-add", **options)
        (inner,) = (name for name in daemon.daemon.graph.nodes if name.startswith("#"))
        for read_only in (True, False, True):
            reopen(daemon, {**options, "read-only": read_only, "cache": {"direct": read_only}})
            assert shown(daemon, inner)["ro"] is read_only
            assert shown(daemon, inner)["cache"]["direct"] is read_only
            assert node(daemon, "r").alignment == node(daemon, inner).alignment
        daemon.export("r", writable=False)
        assert "Cannot change the option 'filename'" in refused(
            daemon, {**options, "file": {"driver": "file", "filename": "/elsewhere"}}
        )


def test_a_file_that_is_opened_again_is_the_same_one(daemon, image, tmp_path):
    image.rename(tmp_path / "moved")
    image.write_bytes(b"an impostor")
    reopen(daemon, file(image, **{"read-only": True}))
    daemon.export("f", writable=False)
    with daemon.client() as client:
        assert client.read(0, 4) == bytes(range(4))


def test_nothing_changes_when_one_of_them_is_refused(daemon, image):
    daemon.execute("blockdev-add", **memory("m"))
    daemon.execute("blockdev-add", **cow("c", "m"))
    before = daemon.execute("query-named-block-nodes")
    wanted = [file(image, cache={"direct": True}, **{"read-only": True}), cow("c", "m", colour="black")]
    assert refused(daemon, *wanted) == "There is no black"
    assert refused(daemon, *reversed(wanted)) == "There is no black"
    assert daemon.execute("query-named-block-nodes") == before
    assert node(daemon, "f").storage.direct is False
    assert [step[0] for step in node(daemon, "c").log] == ["prepare", "abort"] * 2
    files = set(os.listdir("/proc/self/fd"))
    assert refused(daemon, *wanted) == "There is no black"
    assert set(os.listdir("/proc/self/fd")) == files


def test_a_driver_prepares_before_anything_changes_and_commits_after(daemon):
    daemon.execute("blockdev-add", **memory("m"))
    daemon.execute("blockdev-add", **cow("c", "m"))
    reopen(daemon, cow("c", "m", colour="blue"))
    assert node(daemon, "c").log == [("prepare", "red", "blue"), ("commit", "blue")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"driver": "file", "filename": "x"}, "node-name not specified"),
        (file("x", "nope"), "Failed to find node with node-name='nope'"),
        ({"driver": "null-co", "node-name": "f"}, "Cannot change the option 'driver'"),
        (file("x"), "Cannot change the option 'filename'"),
        (memory("m") | {"size": 512}, "Cannot change the option 'size'"),
        (cow("c", "m", shape="square"), "Cannot change the option 'shape'"),
        (cow("c", "nope"), "Cannot find device='' nor node-name='nope'"),
        (cow("c", "c"), "Making 'c' a file child of 'c' would create a cycle"),
        (cow("c", {"driver": "memory", "size": 512}), "Cannot change the option 'file.driver'"),
        (cow("c", "m", backing="c"), "Making 'c' a backing child of 'c' would create a cycle"),
        (cow("c", "m", active=False), "Inactive nodes are not supported"),
        (
            cow("c", "m", **{"detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
    ],
)
def test_refusals(daemon, options, text):
    daemon.execute("blockdev-add", **memory("m"))
    daemon.execute("blockdev-add", **cow("c", "m"))
    assert refused(daemon, options) == text


def test_what_every_node_can_change(daemon, image):
    reopen(daemon, file(image, discard="unmap", **{"detect-zeroes": "unmap"}))
    assert shown(daemon, "f")["detect_zeroes"] == "unmap"
    assert node(daemon, "f").unmaps is True
    reopen(daemon, file(image, **{"auto-read-only": True, "drop-cache": False}))
    assert shown(daemon, "f")["detect_zeroes"] == "off"
    assert node(daemon, "f").unmaps is False
    assert node(daemon, "f").storage.writable is False
    daemon.export("f")
    assert node(daemon, "f").storage.writable is True
    reopen(daemon, file(image))
    with daemon.client() as client:
        client.write(0, b"w")


def test_memory_and_null_disks(daemon):
    daemon.execute("blockdev-add", **memory("m"))
    null = {"driver": "null-co", "node-name": "n", "size": SIZE}
    daemon.execute("blockdev-add", **null)
    reopen(daemon, memory("m", **{"read-only": True}), {**null, "read-only": True})
    for name in "mn":
        assert shown(daemon, name)["ro"] is True
    reopen(daemon, memory("m"), null)
    daemon.export("m")
    with daemon.client() as client:
        client.write(3, b"w")
        assert client.read(3, 1) == b"w"


def test_a_window_moves(daemon):
    daemon.execute("blockdev-add", **raw(size=512))
    reopen(daemon, raw(size=1024, offset=512))
    assert shown(daemon, "r")["image"]["virtual-size"] == 1024
    assert refused(daemon, raw(offset=511)) == "Specified offset is not multiple of 512"
    assert "has to be smaller or equal" in refused(daemon, raw(size=SIZE, offset=512))
    daemon.export("r")
    with daemon.client() as client:
        assert client.read(0, 2) == bytes([0, 1])
        reopen(daemon, raw(size=1024, offset=1536))
        client.write(0, b"moved")
        assert "permissions 'resize' are both required by blockdev-reopen" in refused(daemon, raw(size=512))
        assert client.read(0, 5) == b"moved"
    assert os.pread(node(daemon, "f").storage.fd, 5, 1536) == b"moved"


def test_another_file_below(daemon, tmp_path):
    other = tmp_path / "b.raw"
    other.write_bytes(b"b" * SIZE)
    daemon.execute("blockdev-add", **file(other, "g"))
    daemon.execute("blockdev-add", **raw())
    daemon.export("r")
    with daemon.client() as client:
        assert client.read(0, 2) == bytes([0, 1])
        reopen(daemon, raw(child="g"))
        assert client.read(0, 2) == b"bb"
        client.write(0, b"c")
        daemon.execute("blockdev-del", node_name="f")  # nobody uses it any more
        with pytest.raises(Error, match="Node 'g' is busy: node is used as file of node 'r'"):
            daemon.execute("blockdev-del", node_name="g")
    assert other.read_bytes()[:2] == b"cb"


def test_a_child_that_cannot_be_had_leaves_the_old_one(daemon, tmp_path):
    other = tmp_path / "b.raw"
    other.write_bytes(b"b" * SIZE)
    daemon.execute("blockdev-add", **file(other, "g", **{"read-only": True}))
    daemon.execute("blockdev-add", **raw())
    daemon.export("r")
    with daemon.client() as client:
        assert refused(daemon, raw(child="g")) == "Block node is read-only: 'g'"
        client.write(0, b"w")
        assert client.read(0, 2) == b"w\x01"
    assert [edge.user.name for edge in node(daemon, "f").parents] == ["r"]
    assert node(daemon, "g").parents == []


def test_backing_files_come_and_go(daemon):
    for name in ("top", "one", "two"):
        daemon.execute("blockdev-add", **memory(name))
    for name, fill in (("one", b"1"), ("two", b"2")):
        daemon.export(name, name, name)
        with daemon.client(name) as client:
            client.write(0, fill * 8192)
        daemon.execute("block-export-del", id=name, mode="hard")
    daemon.execute("blockdev-add", **cow("c", "top", backing="one"))
    daemon.export("c")
    with daemon.client() as client:
        client.write(4096, b"c")
        for backing, seen in (("one", b"1"), ("two", b"2"), (None, b"\0"), ("one", b"1")):
            reopen(daemon, cow("c", "top", backing=backing))
            assert client.read(0, 1) == seen
            assert client.read(4096, 2) == b"c1"
        assert refused(daemon, cow("c", "top")) == "backing is missing for 'c'"
    reopen(daemon, cow("c", "top", backing=None))
    daemon.execute("blockdev-del", node_name="one")


def test_a_node_in_an_iothread(daemon, image):
    daemon.execute("object-add", qom_type="iothread", id="io")
    daemon.execute("blockdev-add", **raw())
    daemon.export("r", iothread="io")
    daemon.execute("blockdev-add", **memory("m"))
    with daemon.client() as client:
        reopen(daemon, file(image, cache={"direct": True}))
        assert client.read(0, 2) == bytes([0, 1])
        reopen(daemon, raw(child="m"))
        assert client.read(0, 2) == bytes(2)
        assert node(daemon, "m").services is node(daemon, "r").services is not daemon.daemon.services


def test_a_child_that_was_only_there_for_its_parent_goes(daemon):
    daemon.execute("blockdev-add", **memory("m"))
    daemon.execute("blockdev-add", driver="raw", node_name="r", file={"driver": "memory", "size": SIZE})
    assert any(name.startswith("#") for name in daemon.daemon.graph.nodes)
    reopen(daemon, raw(child="m"))
    assert not any(name.startswith("#") for name in daemon.daemon.graph.nodes)


def test_the_test_driver_is_a_driver():
    assert Cow.reopenable == {"colour"}


@peers.requires("qemu-storage-daemon")
def test_texts_are_those_of_qemu(tmp_path):
    paths = [tmp_path / name for name in ("a.raw", "b.raw")]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    one, two = file(paths[0]), file(paths[1], "g")
    null = {"driver": "null-co", "node-name": "n", "size": SIZE}

    def again(*options):
        return "blockdev-reopen", {"options": list(options)}

    compare(
        [
            ("blockdev-add", one),
            ("blockdev-add", two),
            ("blockdev-add", raw()),
            ("blockdev-add", null),
            again({"driver": "file", "filename": "x"}),
            again(file("x", "nope")),
            again(file(paths[1])),
            again(one | {"aio": "threads"}),
            again(one | {"locking": "off"}),
            again(one | {"aio-max-batch": 3}),
            again(one | {"force-share": True}),
            again(one | {"cache": {"direct": True}}),
            again(one | {"read-only": True}),
            again(one | {"detect-zeroes": "unmap", "discard": "unmap"}),
            again(one | {"auto-read-only": True}),
            again(one),
            again(null | {"size": 512}),
            again(null | {"latency-ns": 3}),
            again({"driver": "null-co", "node-name": "n"}),
            again(null | {"read-only": True}),
            again(raw(offset=512)),
            again(raw(child="nope")),
            again(raw(child="r")),
            again(raw(child={"driver": "null-co"})),
            again(raw(child="g")),
            again(raw()),
            again(one, raw(child="nope")),
            ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "s")}}}),
            ("block-export-add", {"type": "nbd", "id": "e", "node-name": "r", "writable": True}),
            again(raw(**{"read-only": True})),
            again(one | {"read-only": True}),
            again(one | {"read-only": True}, raw(**{"read-only": True})),
            again(raw()),
        ]
    )
