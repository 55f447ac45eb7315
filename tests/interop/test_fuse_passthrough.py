"""FUSE passthrough: the kernel reads and writes the image itself, and nothing that must see it may begin meanwhile."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import pytest
from qmp_process import QmpProcess

from blkferry.errors import Error

SIZE = 1 << 20


@pytest.fixture(scope="module")
def process() -> Iterator[QmpProcess]:
    with QmpProcess() as process:
        yield process


@pytest.fixture
def daemon(process) -> Iterator[QmpProcess]:
    yield process
    process.clear()


@pytest.fixture
def image(daemon, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    daemon.execute("blockdev-add", driver="file", node_name="file", filename=str(path))
    daemon.execute("blockdev-add", driver="raw", node_name="n", file="file")
    return path


@pytest.fixture
def mounted(daemon, image, tmp_path):
    return daemon.mount("n", tmp_path / "disk", growable=True, passthrough=True)


def served(daemon) -> int:
    """How many requests the export has had."""
    (export,) = daemon.execute("query-block-exports")
    return export["clients"][0]["requests"]


def test_reads_writes_and_mappings_go_to_the_image(daemon, image, mounted):
    with mounted.open("r+b", buffering=0) as file:
        before = served(daemon)
        for number in range(200):
            os.pwrite(file.fileno(), b"%4d" % number, 4096 * number)
            assert os.pread(file.fileno(), 4, 4096 * number) == b"%4d" % number
        assert served(daemon) - before < 20
        with mmap.mmap(file.fileno(), SIZE) as mapping:
            assert mapping[4096 * 7 : 4096 * 7 + 4] == b"   7"
            mapping[:4] = b"maps"
            mapping.flush()
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 4, 0) == b"maps"
    assert image.read_bytes()[:4] == b"maps"
    assert image.read_bytes()[4096 * 199 :][:4] == b" 199"


def test_two_descriptors_and_another_export(daemon, image, mounted, tmp_path):
    other = daemon.mount("n", tmp_path / "other", "other")
    with mounted.open("r+b", buffering=0) as one, mounted.open("rb", buffering=0) as two, other.open("rb") as three:
        os.pwrite(one.fileno(), b"seen", 8192)
        assert os.pread(two.fileno(), 4, 8192) == b"seen"
        assert os.pread(three.fileno(), 4, 8192) == b"seen"


def test_the_file_grows_and_the_node_with_it(daemon, mounted):
    with mounted.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 4096, SIZE)
        assert os.fstat(file.fileno()).st_size == SIZE + 4096
    (node,) = (each for each in daemon.execute("query-named-block-nodes") if each["node-name"] == "n")
    assert node["image"]["virtual-size"] == SIZE + 4096


def test_times_are_those_of_the_image(mounted):
    before = os.stat(mounted).st_mtime_ns
    with mounted.open("r+b", buffering=0) as file:
        time.sleep(0.02)
        os.pwrite(file.fileno(), b"x", 0)
        assert os.fstat(file.fileno()).st_mtime_ns > before


def test_what_must_see_the_writes_is_refused_while_it_is_open(daemon, mounted):
    add = ("block-dirty-bitmap-add",)
    with mounted.open("r+b", buffering=0), pytest.raises(Error, match="Export 'e' is open by passthrough"):
        daemon.execute(*add, node="file", name="b")
    deadline = time.monotonic() + 10
    while True:
        try:
            daemon.execute(*add, node="file", name="b")
            break
        except Error:  # the kernel says after the close that it is closed
            assert time.monotonic() < deadline
    with mounted.open("r+b", buffering=0) as file:  # not by passthrough now
        os.pwrite(file.fileno(), b"x", 0)
        assert served(daemon) > 0
    (node,) = (each for each in daemon.execute("query-named-block-nodes") if each["node-name"] == "file")
    assert node["dirty-bitmaps"][0]["count"] == 65536


def test_a_hard_removal_waits_for_those_who_were_let_through(daemon, image, mounted):
    file = mounted.open("r+b", buffering=0)
    daemon.execute("block-export-del", id="e", mode="hard")
    (export,) = daemon.execute("query-block-exports")
    assert export["shutting-down"]
    os.pwrite(file.fileno(), b"late", 0)
    file.close()
    deadline = time.monotonic() + 10
    while daemon.execute("query-block-exports"):
        assert time.monotonic() < deadline
    assert image.read_bytes()[:4] == b"late"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"growable": False}, "Parameter 'passthrough' needs 'growable' where 'writable' is given"),
        ({"writethrough": True}, "its options"),
    ],
)
def test_what_passthrough_cannot_do(daemon, image, tmp_path, options, complaint):
    with pytest.raises(Error, match=complaint):
        daemon.mount("n", tmp_path / "disk", **({"growable": True, "passthrough": True} | options))
    assert os.stat(tmp_path / "disk").st_size == 0
    assert not daemon.execute("query-block-exports")


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        ({"driver": "raw", "file": "file", "offset": 512}, "the node is not a whole file"),
        ({"driver": "null-co", "size": SIZE}, "the node is not a whole file"),
    ],
)
def test_nodes_that_are_not_plain(daemon, image, tmp_path, node, complaint):
    daemon.execute("blockdev-add", node_name="other", **node)
    with pytest.raises(Error, match=complaint):
        daemon.mount("other", tmp_path / "disk", growable=True, passthrough=True)


def test_a_read_only_export_need_not_be_growable(daemon, image, tmp_path):
    path = daemon.mount("n", tmp_path / "disk", writable=False, passthrough=True)
    image.write_bytes(b"plain" + bytes(SIZE - 5))
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 5, 0) == b"plain"
