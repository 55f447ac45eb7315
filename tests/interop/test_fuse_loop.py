"""A mounted image as a loop device: partitions, a file system on one of them, and both sound in the image."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from cli_process import finish

from blkferry.exports.fuse import mountinfo
from blkferry.plane import syscalls
from peers import requires, run

pytestmark = [
    requires("qemu-img", "sfdisk", "fsck.ext4", "mkfs.ext4"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"),
        reason="only root may mount and set up loop devices, where there are /dev/fuse and /dev/loop-control",
    ),
]


def do(*argv) -> str:
    return subprocess.run(list(map(str, argv)), check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def ok(*argv) -> str:
    done = finish("blkferry", *argv)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


class Bench:
    """Things that are set up, to be put away in the other order, whatever happens."""

    def __init__(self) -> None:
        self._undo: list[list[str]] = []

    def later(self, *argv) -> None:
        self._undo.append(list(map(str, argv)))

    def put_away(self) -> None:
        while self._undo:
            do(*self._undo.pop())

    def abandon(self) -> None:
        for command in reversed(self._undo):
            subprocess.run(command, check=False, capture_output=True, timeout=60)


@pytest.fixture
def bench(tmp_path):
    made = Bench()
    yield made
    made.abandon()
    while left := [each.path for each in mountinfo.mounts() if each.path.startswith(str(tmp_path))]:
        for path in left:
            syscalls.umount(path, syscalls.MNT_DETACH)


def loop(bench, file, *options) -> str:
    device = do("losetup", "--find", "--show", *options, file)
    bench.later("losetup", "--detach", device)
    return device


def partitions(file) -> list[tuple[int, int]]:
    """Where partitions begin and how long they are, in bytes."""
    table = json.loads(run("sfdisk", "--json", file).stdout)["partitiontable"]
    return [(part["start"] * table["sectorsize"], part["size"] * table["sectorsize"]) for part in table["partitions"]]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_disk_with_partitions_and_a_file_system(bench, tmp_path, image_format):
    image, file, directory = tmp_path / "image", tmp_path / "file", tmp_path / "directory"
    directory.mkdir()
    run("qemu-img", "create", "-q", "-f", image_format, image, "96M")
    ok("mount", "-q", "-w", "-f", image_format, image, file)
    run("sfdisk", "--quiet", file, stdin="label: gpt\nsize=40M\nsize=+\n")
    assert len(partitions(file)) == 2
    start, length = partitions(file)[1]
    device = loop(bench, file, "--offset", start, "--sizelimit", length, "--direct-io=on")
    run("mkfs.ext4", "-q", "-E", "nodiscard", device)
    do("mount", device, directory)
    bench.later("umount", directory)
    contents = {f"{number}": os.urandom(100_000 + number) for number in range(30)}
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    done = finish("blkferry", "umount", file)
    assert done.returncode == 1
    assert f"losetup --detach {device}" in done.stderr
    bench.put_away()
    released(file)
    ok("umount", file)

    if image_format == "qcow2":
        run("qemu-img", "check", "-q", image)
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw)
    assert partitions(raw)[1] == (start, length)
    device = loop(bench, raw, "--offset", start, "--sizelimit", length, "--read-only")
    run("fsck.ext4", "-f", "-n", device)
    do("mount", "-o", "ro", device, directory)
    bench.later("umount", directory)
    for name, data in contents.items():
        assert (directory / name).read_bytes() == data
    bench.put_away()


def released(file: Path) -> None:
    """Wait until no loop device uses a file: `losetup --detach` lets the kernel take its time."""
    deadline = time.monotonic() + 20
    while do("losetup", "--associated", file):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_read_only_one_can_be_looked_at(bench, tmp_path):
    image, file, directory = tmp_path / "image", tmp_path / "file", tmp_path / "directory"
    directory.mkdir()
    with image.open("wb") as new:
        new.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-F", "-d", tmp_path / "directory", image)
    ok("mount", "-q", image, file)
    device = loop(bench, file, "--read-only")
    run("fsck.ext4", "-f", "-n", device)
    do("mount", "-o", "ro", device, directory)
    bench.later("umount", directory)
    assert (directory / "lost+found").is_dir()
    bench.put_away()
    released(file)
    ok("umount", file)
