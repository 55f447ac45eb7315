"""Mounting and unmounting, with hardly a server behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import threading

import pytest
from responder import Responder

from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import mountinfo
from blkferry.exports.fuse.mounting import Mount, mount
from blkferry.exports.fuse.mountpoint import DEAD
from blkferry.plane import syscalls
from blkferry.schema.export import FuseExportAllowOther

AUTO = FuseExportAllowOther.AUTO


@pytest.fixture
def file(tmp_path):
    """A file to mount over, with nothing mounted over it in the end."""
    path = tmp_path / "a file, with \\ and #"
    path.write_bytes(b"below")
    yield path
    while mountinfo.topmost(str(path)) is not None:
        syscalls.umount(str(path), syscalls.MNT_DETACH)


@contextlib.asynccontextmanager
async def served(file, **options):
    made = await mount(str(file), **{"source": "the image", "allow_other": AUTO} | options)
    responder = Responder(made.fd)
    try:
        yield made, responder
    finally:
        responder.end()


async def refused(path, **options) -> Error:
    with pytest.raises(Error) as caught:
        await mount(str(path), **{"source": "s", "allow_other": AUTO} | options)
    return caught.value


def size(file) -> int:
    return os.stat(file).st_size


async def test_a_file_is_another_one_for_a_while(file):
    async with served(file) as (made, responder):
        assert await asyncio.to_thread(size, file) == 4096
        entry = mountinfo.topmost(str(file))
        assert (entry.type, entry.source) == ("fuse.blkferry", "the image")
        assert entry.options.endswith("user_id=0,group_id=0,default_permissions,allow_other,max_read=67108864")
        status = await asyncio.to_thread(os.stat, file)
        assert made == Mount(made.fd, str(file), status.st_dev, True)
        assert not os.get_blocking(made.fd)
        await made.unmount(lazy=False)
        assert responder.gone.wait(10)
        assert file.read_bytes() == b"below"
        await made.unmount(lazy=False)  # nothing is left to do


@pytest.mark.parametrize(("wanted", "lets_in"), [("on", True), ("auto", True), ("off", False)])
async def test_others_are_let_in_as_one_wants(file, wanted, lets_in):
    async with served(file, allow_other=FuseExportAllowOther(wanted)) as (made, _):
        assert made.allow_other is lets_in
        assert ("allow_other" in mountinfo.topmost(str(file)).options) is lets_in
        await made.unmount(lazy=False)


async def test_a_file_in_use_stays_unless_one_is_lazy(file):
    async with served(file) as (made, responder):
        opened = await asyncio.to_thread(os.open, file, os.O_RDONLY)
        with pytest.raises(Error) as caught:
            await made.unmount(lazy=False)
        assert caught.value.kind is ErrorKind.BUSY
        assert await asyncio.to_thread(size, file) == 4096
        await made.unmount(lazy=True)
        assert file.read_bytes() == b"below"
        assert os.fstat(opened).st_size == 4096
        assert not responder.gone.is_set()
        os.close(opened)
        assert responder.gone.wait(10)


async def test_who_has_it_open_is_cut_off_by_the_end_of_the_descriptor(file):
    async with served(file) as (made, _):
        opened = await asyncio.to_thread(os.open, file, os.O_RDONLY)
        await made.unmount(lazy=True)
    with pytest.raises(OSError, match="not connected"):
        os.pread(opened, 1, 0)
    with contextlib.suppress(OSError):
        os.close(opened)


async def test_an_unmount_from_outside_is_noticed(file):
    async with served(file) as (made, responder):
        await asyncio.to_thread(subprocess.run, ["umount", file], check=True)
        assert responder.gone.wait(10)
        await made.unmount(lazy=False)


@pytest.mark.parametrize("spelling", ["plain", "dots", "symlink", "relative"])
async def test_the_same_file_twice(file, spelling, monkeypatch):
    link = file.with_name("link")
    link.symlink_to(file.name)
    monkeypatch.chdir(file.parent)
    path = {"plain": file, "dots": f"{file.parent}/./{file.name}", "symlink": link, "relative": file.name}[spelling]
    async with served(file) as (made, _):
        error = await refused(path)
        assert (error.kind, error.message) == (ErrorKind.EXISTS, f"There already is a FUSE export on '{path}'")
        assert "the image" in error.hint
        await made.unmount(lazy=False)


async def test_a_dead_mount_of_ours_is_cleared_away(file):
    for _ in range(2):
        async with served(file):
            pass
        with pytest.raises(OSError) as caught:
            size(file)
        assert caught.value.errno in DEAD
    async with served(file) as (made, _):
        assert await asyncio.to_thread(size, file) == 4096
        await made.unmount(lazy=False)
    assert file.read_bytes() == b"below"


async def test_a_dead_mount_of_others_is_not(file):
    device = os.open("/dev/fuse", os.O_RDWR)
    syscalls.mount("x", str(file), "fuse.other", 0, f"fd={device},rootmode=100000,user_id=0,group_id=0")
    os.close(device)
    error = await refused(file)
    assert error.message == f"Failed to stat '{file}': Transport endpoint is not connected"
    assert error.hint == f"Who served fuse.other there is gone: umount '{file}', or fusermount3 -u '{file}'."


async def test_what_cannot_be_mounted_over(tmp_path):
    missing = await refused(tmp_path / "missing")
    assert missing.message == f"Failed to stat '{tmp_path}/missing': No such file or directory"
    assert "touch" in missing.hint
    directory = await refused(tmp_path)
    assert (directory.kind, directory.message) == (
        ErrorKind.INVALID_ARGUMENT,
        f"'{tmp_path}' is not a regular file",
    )
    os.mkfifo(tmp_path / "fifo")
    assert (await refused(tmp_path / "fifo")).message == f"'{tmp_path}/fifo' is not a regular file"


async def test_a_server_that_does_not_answer_holds_up_nobody(file, monkeypatch):
    """The path leads through a FUSE file system whose server says nothing: looking there would take for ever."""
    monkeypatch.setattr("blkferry.exports.fuse.mounting.LOOK_SECONDS", 0.2)
    silent = await mount(str(file), source="s", allow_other=AUTO)
    error = await refused(file)
    assert error.message == f"What is mounted at '{file}' does not answer"
    await silent.unmount(lazy=True)
    os.close(silent.fd)


async def test_what_is_mounted_over_ours_is_not_unmounted(file):
    async with served(file) as (made, _):
        other = file.with_name("other")
        other.write_bytes(b"other")
        await asyncio.to_thread(subprocess.run, ["mount", "--bind", other, file], check=True)
        with pytest.raises(Error, match="something else is mounted over it"):
            await made.unmount(lazy=True)
        assert file.read_bytes() == b"other"


async def test_a_mount_that_comes_too_late_is_taken_back(file, monkeypatch):
    begun, waiting = threading.Event(), threading.Event()
    real_mount = syscalls.mount

    def slow(*arguments):
        begun.set()
        waiting.wait(10)
        real_mount(*arguments)

    monkeypatch.setattr(syscalls, "mount", slow)
    attempt = asyncio.create_task(mount(str(file), source="s", allow_other=AUTO))
    await asyncio.to_thread(begun.wait, 10)
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    waiting.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "blkferry-patience"]:
        await asyncio.to_thread(thread.join, 10)
    assert mountinfo.topmost(str(file)) is None


async def test_without_the_device(file, monkeypatch):
    monkeypatch.setattr("blkferry.exports.fuse.mounting.DEVICE", "/dev/no-fuse")
    error = await refused(file)
    assert error.message == (
        "Failed to mount FUSE session to export: Could not open '/dev/no-fuse': No such file or directory"
    )
    assert "modprobe fuse" in error.hint


async def test_without_the_right_to_mount(file, monkeypatch):
    def denied(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(syscalls, "mount", denied)
    monkeypatch.setenv("PATH", str(file.parent))
    error = await refused(file)
    assert error.message == "Only root may mount without fusermount3, which is not there"
    assert "fuse3" in error.hint
    program = file.with_name("fusermount3")
    program.write_text("#!/bin/sh\necho fusermount3: failed to open /dev/fuse: Permission denied >&2; exit 1\n")
    program.chmod(0o755)
    error = await refused(file)
    assert error.message == ("Failed to mount FUSE session to export: failed to open /dev/fuse: Permission denied")
    assert error.hint == "Root has to let users in: chmod 666 /dev/fuse."
    program.write_text("#!/bin/sh\nexit 0\n")
    error = await refused(file)
    assert error.message == "Failed to mount FUSE session to export: fusermount3 sent no descriptor"
