"""Files to mount over, and mounts of Python programs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os

import pytest

from blkferry.daemon.daemon import Daemon
from blkferry.daemon.mountpoints import Mountpoints, released
from blkferry.errors import Error, ErrorKind
from blkferry.exports.fuse import mountinfo
from blkferry.plane import syscalls

MIB = 1 << 20


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for each in mountinfo.mounts():
        if each.path.startswith(f"{tmp_path}/"):
            syscalls.umount(each.path, syscalls.MNT_DETACH)


@contextlib.asynccontextmanager
async def mounted(file, *, size: int = MIB, **options):
    async with Daemon() as daemon:
        disk = await daemon.open(f"memory:{size}", writable=True)
        yield daemon, await daemon.mount(disk, file, **options)


async def size(file) -> int:
    return (await asyncio.to_thread(os.stat, file)).st_size


async def test_what_is_made_is_taken_away(here):
    claims = Mountpoints()
    made = await claims.claim("new")
    assert (made.path, made.made, os.path.getsize("new")) == (f"{here}/new", True, 0)
    await claims.release(made)
    await claims.release(made)
    assert os.listdir() == []


async def test_what_was_there_or_is_another_by_now_stays(here):
    claims = Mountpoints()
    (here / "there").touch()
    there, made = await claims.claim("there"), await claims.claim("new")
    (here / "other").write_text("other")
    os.rename("other", "new")
    await claims.release_all()
    assert sorted(os.listdir()) == ["new", "there"]
    assert not there.made
    assert made.made


async def test_one_at_a_time(here):
    first, second = Mountpoints(), Mountpoints()
    claimed = await first.claim("file")
    with pytest.raises(Error) as caught:
        await second.claim("file")
    assert (caught.value.kind, caught.value.message) == (ErrorKind.BUSY, "Another blkferry has 'file'")
    assert not await released(claimed.path, 0.05)
    await first.release(claimed)
    assert await released(claimed.path, 10)
    await second.release(await second.claim("file"))


async def test_only_empty_files_unless_wanted(here):
    (here / "full").write_text("something")
    (here / "link").symlink_to("full")
    claims = Mountpoints()
    with pytest.raises(Error, match="'full' is not empty") as caught:
        await claims.claim("full", image=f"{here}/other")
    assert caught.value.kind is ErrorKind.EXISTS
    for options in ({"over": True}, {"image": f"{here}/link"}):
        await claims.release(await claims.claim("full", **options))
    assert (here / "full").read_text() == "something"
    with open("full") as file:  # nobody has it any more
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_file_that_cannot_be_made(here):
    with pytest.raises(Error) as caught:
        await Mountpoints().claim("no/file")
    assert caught.value.message == "Cannot make 'no/file': No such file or directory"


async def test_a_program_mounts_and_unmounts(here):
    async with mounted("file", growable=True) as (daemon, mount):
        assert (mount.path, mount.allow_other, await size("file")) == (f"{here}/file", True, MIB)
        await asyncio.to_thread(os.truncate, "file", 2 * MIB)
        assert daemon.exports.get(mount.id).root.node.length == 2 * MIB
        await mount.unmount()
        await mount.unmounted()
        await mount.unmount()  # which it is
        assert os.listdir() == []


async def test_the_end_of_a_program_unmounts(here):
    async with mounted("file"):
        assert await size("file") == MIB
    assert os.listdir() == []


async def test_a_program_is_told_of_an_unmount(here):
    async with mounted("file") as (_, mount):
        waiting = asyncio.create_task(mount.unmounted())
        await asyncio.to_thread(syscalls.umount, mount.path, 0)
        await mount.unmount()  # which is under way
        await asyncio.wait_for(waiting, 10)
        assert os.listdir() == []


async def test_force_is_needed_while_the_file_is_open(here):
    async with mounted("file") as (_, mount):
        opened = await asyncio.to_thread(os.open, "file", os.O_RDONLY)
        with pytest.raises(Error, match="still in use"):
            await mount.unmount()
        await mount.unmount(force=True)
        assert os.listdir() == []
        with contextlib.suppress(OSError):
            os.close(opened)


async def test_a_mount_that_fails_leaves_no_file(here):
    async with mounted("file") as (daemon, _):
        disk = await daemon.attach("disk0")
        with pytest.raises(Error, match="There already is a FUSE export on 'file'"):
            await daemon.mount(disk, "file")
        with pytest.raises(Error, match="Block export id 'mount0' is already in use"):
            await daemon.mount(disk, "second", export_id="mount0")
        assert os.listdir() == ["file"]
