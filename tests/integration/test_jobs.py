"""Jobs over commands: blockdev-create, and what may be asked of its job."""

import os
import time

import pytest
from cow_driver import MADE, cow_driver
from qsd import PAUSE, compare

import peers
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("cow_driver")
__all__ = ["cow_driver"]


@pytest.fixture
def daemon():
    with DaemonThread() as daemon:
        yield daemon


def refused(daemon, command, **arguments):
    with pytest.raises(Error) as caught:
        daemon.execute(command, **arguments)
    return str(caught.value)


def states(daemon, job_id="j"):
    return [data["status"] for name, data in daemon.events if name == "JOB_STATUS_CHANGE" and data["id"] == job_id]


def concluded(daemon, job_id="j"):
    """What query-jobs says of a job at its end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        info = next(info for info in daemon.execute("query-jobs") if info["id"] == job_id)
        if info["status"] == "concluded":
            return info
        time.sleep(0.01)
    raise AssertionError(f"job {job_id} does not end: {info}")


def create(daemon, job_id="j", **options):
    daemon.execute("blockdev-create", job_id=job_id, options=options)
    return concluded(daemon, job_id)


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full", None])
def test_a_file_is_made(daemon, tmp_path, preallocation):
    path = tmp_path / "new.raw"
    path.write_bytes(b"old")
    more = {"preallocation": preallocation} if preallocation else {"nocow": True}
    info = create(daemon, driver="file", filename=str(path), size=3 * MIB + 5, **more)
    assert info == {"id": "j", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1}
    assert path.read_bytes() == bytes(3 * MIB + 5)
    allocated = os.stat(path).st_blocks * 512
    assert allocated == 0 if preallocation in {"off", None} else allocated >= 3 * MIB
    assert states(daemon) == ["created", "running", "waiting", "pending", "concluded"]
    daemon.execute("job-dismiss", id="j")
    assert states(daemon)[-1] == "null"
    assert daemon.execute("query-jobs") == []


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"filename": "/nope/x.raw"}, "Could not create '/nope/x.raw': No such file or directory"),
        ({"preallocation": "metadata"}, "Unsupported preallocation mode: metadata"),
        ({"size": 1 << 63}, "Could not resize file: Invalid argument"),
    ],
)
def test_a_failure_is_told_by_query_jobs(daemon, tmp_path, more, error):
    options = {"driver": "file", "filename": str(tmp_path / "x.raw"), "size": MIB} | more
    info = create(daemon, **options)
    assert info["error"] == error
    assert states(daemon) == ["created", "running", "aborting", "concluded"]


def test_a_file_that_is_written_is_not_emptied(daemon, tmp_path):
    path = tmp_path / "x.raw"
    path.write_bytes(b"data" * 128)
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path))
    daemon.export("f")
    error = create(daemon, driver="file", filename=str(path), size=MIB)["error"]
    assert error.startswith('Failed to get "write" lock')
    assert path.read_bytes() == b"data" * 128


def test_drivers_that_make_no_images_say_so(daemon, tmp_path):
    for driver in ("raw", "null-co", "host_device"):
        text = refused(daemon, "blockdev-create", job_id="j", options={"driver": driver})
        assert text == "Driver does not support blockdev-create"
    text = refused(daemon, "blockdev-create", job_id="j", options={"driver": "nope"})
    assert text == "Parameter 'driver' does not accept value 'nope'"
    assert daemon.events == []


def slow(daemon, tmp_path, seconds=60):
    options = {"driver": "test-cow", "file": {"driver": "file", "filename": str(tmp_path / "x")}, "size": MIB}
    daemon.execute("blockdev-create", job_id="j", options=options | {"seconds": seconds})


def test_a_job_that_runs_can_be_cancelled(daemon, tmp_path):
    slow(daemon, tmp_path)
    assert daemon.execute("query-jobs") == [
        {"id": "j", "type": "create", "status": "running", "current-progress": 0, "total-progress": 1}
    ]
    text = refused(daemon, "job-dismiss", id="j")
    assert text == "Job 'j' in state 'running' cannot accept command verb 'dismiss'"
    daemon.execute("job-cancel", id="j")
    assert concluded(daemon)["error"] == "Operation canceled"
    assert states(daemon) == ["created", "running", "aborting", "concluded"]


def test_the_daemon_ends_with_its_jobs(tmp_path):
    with DaemonThread() as daemon:
        slow(daemon, tmp_path)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert states(daemon) == ["created", "running", "aborting", "concluded", "null"]


def test_a_long_preallocation_is_cancelled(tmp_path):
    with DaemonThread() as daemon:
        options = {"driver": "file", "filename": str(tmp_path / "big"), "size": 1 << 40, "preallocation": "full"}
        daemon.execute("blockdev-create", job_id="j", options=options)
    assert states(daemon)[-3:] == ["aborting", "concluded", "null"]
    assert os.stat(tmp_path / "big").st_blocks * 512 < 1 << 36


def test_an_image_is_made_in_a_file(daemon, tmp_path):
    path = tmp_path / "x"
    create(daemon, "file", driver="file", filename=str(path), size=0)
    options = {"driver": "test-cow", "file": {"driver": "file", "filename": str(path)}, "backing-file": "base"}
    assert "error" not in create(daemon, size=MIB, **options)
    assert path.stat().st_size == MIB
    assert MADE[str(path)]["backing-file"] == "base"
    assert daemon.daemon.graph.nodes == {}
    assert daemon.daemon.graph.users == []


def test_an_image_is_made_in_a_node(daemon, tmp_path):
    path = tmp_path / "x"
    path.touch()
    text = create(daemon, driver="test-cow", file="f", size=MIB)["error"]
    assert text == "Cannot find device='f' nor node-name='f'"
    daemon.execute("object-add", qom_type="iothread", id="io")
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path))
    daemon.export("f", writable=False, iothread="io")
    text = create(daemon, "j2", driver="test-cow", file="f", size=MIB)["error"]
    assert text.startswith("Permission conflict on node 'f': permissions 'resize' are both required by the making")
    daemon.execute("block-export-del", id="e")
    assert "error" not in create(daemon, "j3", driver="test-cow", file="f", size=MIB)
    assert path.stat().st_size == MIB
    daemon.execute("blockdev-del", node_name="f")


@peers.requires("qemu-storage-daemon")
def test_texts_are_those_of_qemu(tmp_path):
    def make(job_id, **options):
        return "blockdev-create", {"job-id": job_id, "options": options}

    file = {"driver": "file", "filename": str(tmp_path / "a.raw"), "size": MIB}
    compare(
        [
            make("1bad", **file),
            make("j", driver="raw"),
            make("j", driver="null-co"),
            make("j", **file),
            PAUSE,
            make("j", **file),
            ("query-jobs", {}),
            *((f"job-{verb}", {"id": "j"}) for verb in ("pause", "resume", "cancel", "complete", "finalize")),
            *((f"job-{verb}", {"id": "x"}) for verb in ("pause", "resume", "cancel", "complete", "finalize")),
            ("job-dismiss", {"id": "j"}),
            ("job-dismiss", {"id": "j"}),
            make("nowhere", **file | {"filename": "/nope/a.raw"}),
            PAUSE,
            make("metadata", **file | {"preallocation": "metadata"}),
            PAUSE,
            make("huge", **file | {"size": 1 << 63}),
            PAUSE,
            ("query-jobs", {}),
        ]
    )
