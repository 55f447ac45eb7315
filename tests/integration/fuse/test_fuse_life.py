"""The life of FUSE exports: made, in use, removed, unmounted by others, moved; and what stays behind: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time

import pytest

from blkferry.errors import Error
from blkferry.exports.fuse import mountinfo, transfers
from blkferry.exports.fuse.session import Session
from blkferry.plane import syscalls
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client
from peers import requires, run

MIB = 1 << 20
MAPPER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
    mapped[:6] = b"mapped"
    print("written", flush=True)
    sys.stdin.read()
    mapped[:6]
"""
"""Must be a process of its own: where a page is missing it waits for the daemon, with all of its interpreter."""

GONE = ("BLOCK_EXPORT_DELETED", {"id": "e"})


@pytest.fixture
def daemon():
    with DaemonThread() as running:
        yield running


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"below")
    yield path
    while mountinfo.topmost(str(path)) is not None:
        syscalls.umount(str(path), syscalls.MNT_DETACH)


@pytest.fixture
def node(daemon):
    daemon.execute("blockdev-add", driver="memory", node_name="n", size=MIB)
    return "n"


def export(daemon, node, file, export_id="e", **options) -> None:
    daemon.execute("block-export-add", type="fuse", id=export_id, node_name=node, mountpoint=str(file), **options)


def exports(daemon) -> list[str]:
    return [each["id"] for each in daemon.execute("query-block-exports")]


def wait_for(what) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def closed(fd: int) -> None:
    """Close what may have been cut off."""
    with contextlib.suppress(OSError):
        os.close(fd)


def test_added_used_and_removed(daemon, node, file):
    export(daemon, node, file, writable=True)
    with file.open("r+b") as opened:
        opened.write(b"hello")
    (info,) = daemon.execute("query-block-exports")
    assert (info["type"], info["mountpoint"], info["allow-other"]) == ("fuse", str(file), True)
    daemon.execute("block-export-del", id="e")
    assert daemon.events == [GONE]
    assert file.read_bytes() == b"below"
    export(daemon, node, file)
    assert file.read_bytes()[:5] == b"hello"
    daemon.execute("block-export-del", id="e", mode="hard")
    wait_for(lambda: daemon.events == [GONE, GONE])
    assert file.read_bytes() == b"below"
    assert exports(daemon) == []


def test_allow_other_off_is_told(daemon, node, file):
    export(daemon, node, file, allow_other="off")
    (info,) = daemon.execute("query-block-exports")
    assert info["allow-other"] is False


def as_nobody(*argv) -> subprocess.CompletedProcess[str]:
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *map(str, argv)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("allow_other", ["off", "on", "auto"])
def test_others_are_kept_out_or_let_in_as_the_mode_says(daemon, node, allow_other):
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        file = os.path.join(directory, "file")
        with open(file, "w"):
            pass
        export(daemon, node, file, writable=True, allow_other=allow_other)
        assert os.stat(file).st_mode & 0o7777 == 0o600
        assert "Permission denied" in as_nobody("cat", file).stderr
        if allow_other == "off":
            with pytest.raises(PermissionError):
                os.chmod(file, 0o644)
            with pytest.raises(OSError, match="not supported"):
                os.chown(file, 65534, 65534)
        else:
            os.chmod(file, 0o644)
            assert as_nobody("cat", file).stdout == "\0" * MIB
            assert "Permission denied" in as_nobody("truncate", "--size=0", file).stderr
            os.chown(file, 65534, 65534)
            assert as_nobody("dd", "if=/dev/zero", f"of={file}", "bs=4k", "count=1", "conv=notrunc").returncode == 0
        daemon.execute("block-export-del", id="e")


def test_a_safe_removal_is_refused_while_the_file_is_open(daemon, node, file):
    export(daemon, node, file)
    opened = os.open(file, os.O_RDONLY)
    with pytest.raises(Error) as caught:
        daemon.execute("block-export-del", id="e")
    assert caught.value.message == "export 'e' still in use"
    assert f"(pid {os.getpid()})" in caught.value.hint
    assert os.pread(opened, 4, 0) == bytes(4)
    os.close(opened)
    daemon.execute("block-export-del", id="e")  # at once: the kernel knows that it is closed
    assert exports(daemon) == []


def test_a_hard_removal_cuts_off(daemon, node, file):
    export(daemon, node, file)
    opened = os.open(file, os.O_RDONLY)
    daemon.execute("block-export-del", id="e", mode="hard")
    wait_for(lambda: GONE in daemon.events)
    with pytest.raises(OSError, match="not connected"):
        os.fsync(opened)
    closed(opened)
    assert file.read_bytes() == b"below"


def test_what_was_written_by_mmap_is_not_lost(daemon, node, file):
    export(daemon, node, file, writable=True)
    with subprocess.Popen(
        [sys.executable, "-c", MAPPER, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as mapper:
        assert mapper.stdout.readline() == b"written\n"
        daemon.execute("block-export-del", id="e", mode="hard")
        wait_for(lambda: GONE in daemon.events)
    export(daemon, node, file)
    assert file.read_bytes()[:6] == b"mapped"


@pytest.mark.parametrize("lazily", [False, True])
def test_an_unmount_from_outside_ends_the_export(daemon, node, file, lazily):
    export(daemon, node, file)
    opened = os.open(file, os.O_RDONLY) if lazily else None
    subprocess.run(["umount", *(["-l"] if lazily else []), file], check=True)
    if opened is not None:
        assert os.pread(opened, 4, 0) == bytes(4)
        assert exports(daemon) == ["e"]
        os.close(opened)
    wait_for(lambda: daemon.events == [GONE])
    assert exports(daemon) == []
    daemon.execute("blockdev-del", node_name=node)


@pytest.mark.parametrize("opened", [False, True])
def test_an_unmount_that_another_namespace_does_not_hear_of(daemon, node, file, opened):
    """The kernel keeps the connection for the copy of the mount that is there."""
    export(daemon, node, file)
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo there; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout.readline() == b"there\n"
        if opened:
            with file.open("rb"):
                subprocess.run(["umount", "-l", file], check=True)
                time.sleep(0.1)
                assert exports(daemon) == ["e"]
        else:
            subprocess.run(["umount", file], check=True)
        wait_for(lambda: daemon.events == [GONE])
        other.communicate(b"\n")
    assert exports(daemon) == []


def test_a_file_that_is_open_in_another_namespace_is_in_use(daemon, node, file):
    export(daemon, node, file)
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", 'exec 3<"$0"; echo open; read end', file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(Error) as caught:
            daemon.execute("block-export-del", id="e")
        assert f"sh (pid {other.pid})" in caught.value.hint
        assert os.path.getsize(file) == MIB
        other.communicate(b"\n")
    daemon.execute("block-export-del", id="e")
    assert daemon.events == [GONE]


def test_an_unmount_while_it_is_still_being_made(daemon, node, file, monkeypatch):
    agree = Session.ready

    async def ready(session):
        await agree(session)
        told, tell = asyncio.Event(), session._on_ended
        session._on_ended = lambda: (tell(), told.set())
        await asyncio.to_thread(syscalls.umount, str(file), 0)
        await told.wait()

    monkeypatch.setattr(Session, "ready", ready)
    export(daemon, node, file)
    wait_for(lambda: daemon.events == [GONE])
    assert exports(daemon) == []


def test_another_spelling_of_an_exported_file_is_refused_at_once(daemon, node, file):
    link = file.with_name("link")
    link.symlink_to(file)
    export(daemon, node, file)
    for path in (file, f"{file.parent}/./file", link):
        with pytest.raises(Error) as caught:
            export(daemon, node, path, "other")
        assert caught.value.message == f"There already is a FUSE export on '{path}'"
    assert exports(daemon) == ["e"]
    assert os.path.getsize(file) == MIB


def test_a_failed_one_leaves_nothing(daemon, node, tmp_path):
    for path, message in (
        (tmp_path / "missing", f"Failed to stat '{tmp_path}/missing': No such file or directory"),
        (tmp_path, f"'{tmp_path}' is not a regular file"),
    ):
        with pytest.raises(Error) as caught:
            export(daemon, node, path, writable=True)
        assert caught.value.message == message
    assert (exports(daemon), daemon.events) == ([], [])
    daemon.execute("blockdev-del", node_name=node)


def test_an_image_is_exported_over_itself(daemon, file):
    file.write_bytes(b"image" + bytes(MIB - 5))
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(file))
    export(daemon, "f", file, writable=True)
    with file.open("r+b") as opened:
        assert opened.read(5) == b"image"
        opened.seek(0)
        opened.write(b"IMAGE")
    daemon.execute("block-export-del", id="e")
    assert file.read_bytes()[:5] == b"IMAGE"


def test_the_end_of_the_daemon_unmounts(file):
    opened = None
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="n", size=MIB)
        export(daemon, "n", file)
        opened = os.open(file, os.O_RDONLY)
    assert daemon.events == [GONE]
    assert file.read_bytes() == b"below"
    closed(opened)


def test_a_process_that_sleeps_in_a_read_does_not_hold_up_a_hard_removal(daemon, file, monkeypatch):
    monkeypatch.setattr("blkferry.exports.fuse.mounting.SYNC_SECONDS", 0.1)
    daemon.execute("blockdev-add", driver="null-co", node_name="slow", size=MIB, latency_ns=2 * 10**9)
    export(daemon, "slow", file)
    reader = subprocess.Popen([sys.executable, "-c", f"open({str(file)!r}, 'rb').read(1)"], stderr=subprocess.DEVNULL)
    wait_for(lambda: daemon.execute("query-block-exports")[0]["clients"])
    daemon.execute("block-export-del", id="e", mode="hard", timeout=1)
    assert reader.wait(20) == 1
    wait_for(lambda: daemon.events == [GONE])
    assert file.read_bytes() == b"below"


def test_the_node_moves_while_the_file_is_open(daemon, node, file):
    daemon.execute("object-add", qom_type="iothread", id="io")
    export(daemon, node, file)
    with file.open("rb", buffering=0) as opened:
        path = daemon.export(node, export_id="nbd", iothread="io")
        with Client.connect(path, "") as client:
            client.write(0, b"new")
        assert opened.read(3) == b"new"
        daemon.execute("block-export-del", id="nbd")
    daemon.execute("block-export-del", id="e")
    assert daemon.events[-1] == GONE


def test_a_node_cannot_be_made_of_what_shows_one(daemon, node, file, tmp_path):
    export(daemon, node, file, writable=True)
    for path in (file, tmp_path / "link"):
        if path != file:
            path.symlink_to(file)
        with pytest.raises(Error) as caught:
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path))
        assert caught.value.message == f"'{path}' shows a node of this daemon"
        assert caught.value.hint == "Use the node itself: 'n'."
        with pytest.raises(Error, match="shows a node of this daemon"):
            daemon.call(lambda path=path: daemon.daemon.open(path))
    daemon.execute("block-export-del", id="e")
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(file))


@requires("qemu-img")
def test_a_mounted_file_is_another_daemons_image(daemon, file, tmp_path, image):
    disk = image(MIB)
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(disk.path))
    export(daemon, "f", file, writable=True)
    second = tmp_path / "second"
    second.touch()
    with DaemonThread() as other:
        other.execute("blockdev-add", driver="file", node_name="f", filename=str(file))
        export(other, "f", second, writable=True)
        assert second.read_bytes() == disk.expect(0, MIB)
        with second.open("r+b") as opened:
            opened.write(b"all the way down")
        with pytest.raises(Error) as caught:
            daemon.execute("block-export-del", id="e")
        assert caught.value.message == "export 'e' still in use"
        run("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", disk.path, second)
    daemon.execute("block-export-del", id="e")
    assert disk.path.read_bytes()[:16] == b"all the way down"


def test_another_servers_disk_costs_no_task_for_a_request(daemon, file, monkeypatch):
    monkeypatch.setattr(transfers, "_read", None)
    monkeypatch.setattr(transfers, "_write_all", None)
    data = os.urandom(20_000)
    with DaemonThread() as upstream:
        upstream.execute("blockdev-add", driver="memory", node_name="m", size=MIB)
        path = upstream.export("m", writable=True)
        daemon.execute("blockdev-add", driver="nbd", node_name="n", server={"type": "unix", "path": path})
        export(daemon, "n", file, writable=True)
        opened = os.open(file, os.O_RDWR)
        assert os.pwrite(opened, data, 1000) == len(data)
        assert os.pread(opened, len(data), 1000) == data
        monkeypatch.undo()  # waiting for a server that is gone does
        upstream.execute("block-export-del", id="e", mode="hard")
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(opened, data, 0)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(opened, 512, 0)
        closed(opened)  # which flushes, as no server does any more
        daemon.execute("block-export-del", id="e", mode="hard")
