"""`blkferry mount` and `umount` as processes: what becomes of files and images, and what one is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from cli_process import alive, finish, running, wait_for

from blkferry.exports.fuse import mountinfo
from blkferry.plane import syscalls
from peers import requires, run

MIB = 1 << 20

pytestmark = [
    requires("qemu-img", "fdisk"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="only root may mount, where there is /dev/fuse"
    ),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory to be in, with nothing mounted below it afterwards; so no daemon stays that a test began."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    while below := mounted(tmp_path):
        for path in below:
            syscalls.umount(path, syscalls.MNT_DETACH)


def mounted(directory: Path) -> list[str]:
    return [each.path for each in mountinfo.mounts() if each.path.startswith(f"{directory}/")]


def ok(*argv) -> str:
    done = finish("blkferry", *argv)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refusal(*argv) -> list[str]:
    done = finish("blkferry", *argv)
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr.splitlines()


def mount(*argv) -> int:
    """Mount in the background; return the pid of who serves."""
    return json.loads(ok("mount", "--json", *argv))["pid"]


def qcow2(path: str, size: str = "64M") -> str:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    return path


def test_an_image_is_a_file_until_it_is_unmounted(here, image):
    disk = image(4 * MIB)
    qcow2 = here / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", disk.path, qcow2)
    disk.path.unlink()
    assert ok("mount", "disk.qcow2") == (
        f"disk.qcow2: 4 MiB, read-only, is\n"
        f"  {here}/disk.raw\n"
        f"  look:    fdisk -l {here}/disk.raw\n"
        f"  attach:  sudo losetup --find --show --partscan --read-only {here}/disk.raw\n"
        f"  unmount: blkferry umount {here}/disk.raw\n"
    )
    assert Path("disk.raw").read_bytes() == disk.expect(0, disk.size)
    entry = mountinfo.topmost(f"{here}/disk.raw")
    assert (entry.type, entry.source) == ("fuse.blkferry", f"{here}/disk.qcow2")
    assert f"{here}/disk.raw: {here}/disk.qcow2\n" in ok("mount")
    assert ok("umount", "disk.raw") == ""
    assert os.listdir() == ["disk.qcow2"]


def test_what_was_written_is_in_the_image_when_umount_returns(here):
    qcow2("disk.qcow2")
    pid = mount("-w", "disk.qcow2", "new")
    with open("new", "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"written")
    ok("umount", "new")
    assert not os.path.exists("new")
    run("qemu-img", "check", "-q", "disk.qcow2")  # which locks it: the daemon is done with it
    run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "copy")
    with open("copy", "rb") as copy:
        copy.seek(3 * MIB)
        assert copy.read(7) == b"written"
    wait_for(lambda: not alive(pid))


def test_a_file_that_was_there_stays(here):
    qcow2("disk.qcow2")
    Path("there").touch()
    mount("disk.qcow2", "there")
    assert os.path.getsize("there") == 64 * MIB
    ok("umount", "there")
    assert os.path.getsize("there") == 0


def test_images_are_let_go_one_by_one(here):
    qcow2("a.qcow2", "1M")
    qcow2("b.qcow2", "2M")
    os.mkdir("directory")
    pid = mount("-w", "a.qcow2", "directory", "b.qcow2", "b file")
    assert (os.path.getsize("directory/a.raw"), os.path.getsize("b file")) == (MIB, 2 * MIB)
    ok("umount", "directory/a.raw")
    run("qemu-img", "check", "-q", "a.qcow2")
    run("qemu-img", "check", "-q", "b.qcow2", expect=1)
    assert alive(pid)
    ok("umount", "b file")
    run("qemu-img", "check", "-q", "b.qcow2")
    wait_for(lambda: not alive(pid))
    assert sorted(os.listdir()) == ["a.qcow2", "b.qcow2", "directory"]


def test_an_image_is_mounted_over_itself(here, image):
    disk = image(MIB)
    run("qemu-img", "convert", "-O", "qcow2", disk.path, "image")
    mount("image", "image")
    assert Path("image").read_bytes() == disk.expect(0, MIB)
    ok("umount", "image")
    run("qemu-img", "check", "-q", "-f", "qcow2", "image")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_although_the_file_is_open(here, number):
    qcow2("disk.qcow2")
    with running("blkferry", "mount", "-w", "-q", "--foreground", "disk.qcow2") as server:
        assert server.line() == f"{here}/disk.raw\n"
        opened = os.open("disk.raw", os.O_RDWR)
        os.write(opened, b"x" * MIB)
        assert server.end(number) == (0, "", "")
    assert os.listdir() == ["disk.qcow2"]
    for refused in (os.fsync, os.close):
        with pytest.raises(OSError, match="not connected"):
            refused(opened)
    run("qemu-img", "check", "-q", "disk.qcow2")


def test_umount_by_others_ends_it_too(here):
    qcow2("disk.qcow2")
    pid = mount("disk.qcow2")
    subprocess.run(["umount", "disk.raw"], check=True)
    wait_for(lambda: not alive(pid))
    assert os.listdir() == ["disk.qcow2"]


def test_what_a_killed_one_leaves_is_cleared_away(here):
    qcow2("disk.qcow2")
    pid = mount("-w", "disk.qcow2")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    with pytest.raises(OSError, match="not connected"):
        os.stat("disk.raw")
    mount("disk.qcow2")
    assert os.path.getsize("disk.raw") == 64 * MIB
    ok("umount", "disk.raw")
    assert mounted(here) == []


def test_umount_clears_away_what_a_killed_one_leaves(here):
    qcow2("disk.qcow2")
    pid = mount("disk.qcow2")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    assert f"{here}/disk.raw: {here}/disk.qcow2, no longer served\n" in ok("mount")
    done = finish("blkferry", "umount", "disk.qcow2", "disk.raw")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "blkferry: 'disk.qcow2' is not mounted by blkferry")
    assert os.path.getsize("disk.raw") == 0  # it was unmounted nevertheless


def test_a_file_in_use_is_cut_off_by_force_only(here):
    qcow2("disk.qcow2")
    pid = mount("-w", "disk.qcow2")
    opened = os.open("disk.raw", os.O_RDWR)
    first, second = refusal("umount", "disk.raw")
    assert first == "blkferry: 'disk.raw' is in use"
    assert f"(pid {os.getpid()})" in second
    assert second.endswith("Close it, or say --force to cut it off.")
    os.write(opened, b"still there")
    ok("umount", "--force", "disk.raw")
    for refused in (os.fsync, os.close):
        with pytest.raises(OSError, match=r"not connected|abort"):
            refused(opened)
    wait_for(lambda: not alive(pid))
    assert os.listdir() == ["disk.qcow2"]
    run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "copy")
    with open("copy", "rb") as copy:
        assert copy.read(11) == b"still there"


def test_what_is_in_the_way_is_said(here):
    qcow2("disk.qcow2")
    Path("full").write_text("something")
    assert refusal("mount", "disk.qcow2", "full") == [
        "blkferry: 'full' is not empty, and what is in it could not be seen while it is mounted over",
        "Name a file that is not there, or an empty one; --over hides what is in it for that time.",
    ]
    mount("disk.qcow2", "--over", "full")
    assert os.path.getsize("full") == 64 * MIB
    assert refusal("mount", "disk.qcow2", "full") == [
        "blkferry: There already is a FUSE export on 'full'",
        f"It shows {here}/disk.qcow2; `blkferry umount full` ends that.",
    ]
    first, second = refusal("umount", "disk.qcow2")
    assert first == "blkferry: 'disk.qcow2' is not mounted by blkferry"
    assert f"{here}/full" in second
    ok("umount", "full")
    assert Path("full").read_text() == "something"


def test_an_image_that_others_write_is_refused(here):
    qcow2("disk.qcow2")
    mount("-w", "disk.qcow2")
    first, second = refusal("mount", "disk.qcow2", "other")
    assert first.startswith("blkferry: Could not open 'disk.qcow2': Failed to get")
    assert "Is another process using the image" in second
    assert not os.path.exists("other")
    ok("umount", "disk.raw")


def test_with_the_options_of_qemu_storage_daemon(here):
    """Killed, started again over what is left, and ended."""
    qcow2("disk.qcow2")
    Path("file").touch()
    options = [
        *("--blockdev", "file,node-name=file,filename=disk.qcow2", "--blockdev", "qcow2,node-name=disk,file=file"),
        *("--export", "type=fuse,id=e,node-name=disk,mountpoint=file,writable=on,allow-other=off"),
        *("--daemonize", "--pidfile", "pid"),
    ]
    for number, word in ((signal.SIGKILL, b"first"), (signal.SIGTERM, b"later")):
        done = finish("blkferry-qsd", *options)
        assert (done.returncode, done.stderr) == (0, "")
        entry = mountinfo.topmost(f"{here}/file")
        assert (entry.source, "allow_other" in entry.options) == (f"{here}/disk.qcow2", False)
        with open("file", "r+b") as file:
            assert file.read(5) == (bytes(5) if word == b"first" else b"first")
            file.seek(0)
            file.write(word)
            os.fsync(file.fileno())
        pid = int(Path("pid").read_text())
        os.kill(pid, number)
        wait_for(lambda pid=pid: not alive(pid))
    assert (mounted(here), os.path.getsize("file"), os.path.exists("pid")) == ([], 0, False)
    run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "raw")
    with open("raw", "rb") as raw:
        assert raw.read(5) == b"later"
