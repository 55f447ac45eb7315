"""What a file that is exported by FUSE does when programs use it, by real system calls."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import program
from qmp_process import QmpProcess

from blkferry.errors import Error
from blkferry.plane.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate

SIZE = 1 << 20
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
COLLAPSE, INSERT = 0x08, 0x20
KINDS = ("raw", "direct", "qcow2")


@pytest.fixture(scope="module")
def process() -> Iterator[QmpProcess]:
    with QmpProcess() as process:
        yield process


@pytest.fixture
def daemon(process) -> Iterator[QmpProcess]:
    """The daemon of the module, without nodes and exports."""
    yield process
    process.clear()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@functools.cache
def empty_qcow2() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        argv = [program("blkferry"), "image", "create", "-f", "qcow2", f"{directory}/image", str(SIZE)]
        subprocess.run(argv, check=True, capture_output=True)
        return Path(directory, "image").read_bytes()


def add_node(daemon, tmp_path, kind="raw", *, size=SIZE, content=b"", **options):
    """A node "n" over a new image that begins with `content`."""
    path = tmp_path / "image"
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    if kind == "qcow2":
        path.write_bytes(empty_qcow2())
        daemon.execute("blockdev-add", driver="qcow2", node_name="n", file=file, discard="unmap", **options)
    else:
        with path.open("wb") as image:
            image.write(content)
            image.truncate(size)
        daemon.execute("blockdev-add", node_name="n", cache={"direct": kind == "direct"}, **file, **options)
    return path


@pytest.fixture
def mounted(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    return daemon.mount("n", tmp_path / "disk")


def refused(call, *arguments) -> int:
    """The errno that a call fails with."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


class File:
    """An open file, closed at the end of a block."""

    def __init__(self, path, flags=os.O_RDWR):
        self.fd = os.open(path, flags)

    def __enter__(self):
        return self.fd

    def __exit__(self, *_exc):
        os.close(self.fd)


# Attributes ----------------------------------------------------------------------------------------------------------


def test_the_file_looks_like_a_file(daemon, tmp_path):
    image = add_node(daemon, tmp_path, content=b"x" * 8192)
    path = daemon.mount("n", tmp_path / "disk")
    seen = os.stat(path)
    assert stat.S_ISREG(seen.st_mode)
    assert stat.S_IMODE(seen.st_mode) == 0o600
    assert (seen.st_size, seen.st_nlink, seen.st_uid, seen.st_gid) == (SIZE, 1, os.getuid(), os.getgid())
    assert seen.st_blksize == 4096
    assert seen.st_blocks == os.stat(image).st_blocks


def test_a_read_only_file_says_so(daemon, tmp_path):
    add_node(daemon, tmp_path)
    path = daemon.mount("n", tmp_path / "disk", writable=False)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o400
    assert refused(os.open, path, os.O_RDWR) == errno.EACCES
    assert refused(os.open, path, os.O_RDONLY | os.O_TRUNC) == errno.EACCES
    assert refused(os.truncate, path, 4096) == errno.EACCES
    assert refused(os.chmod, path, 0o600) == errno.EROFS
    os.chmod(path, 0o440)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o440


def test_times_stay_until_something_is_written(mounted):
    before = os.stat(mounted)
    time.sleep(1.1)  # longer than the kernel believes what it was told
    assert os.stat(mounted).st_mtime_ns == before.st_mtime_ns
    with File(mounted) as fd:
        os.pwrite(fd, b"a", 0)
    after = os.stat(mounted)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns >= after.st_mtime_ns
    assert os.stat(mounted).st_mtime_ns == after.st_mtime_ns


def test_mode_and_owner_can_be_changed_and_times_cannot(mounted):
    os.chmod(mounted, 0o664)
    os.chown(mounted, 12, 34)
    seen = os.stat(mounted)
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid) == (0o664, 12, 34)
    assert refused(os.utime, mounted, (1, 1)) == errno.ENOTSUP


def test_without_allow_other_the_file_is_its_owners(daemon, tmp_path):
    add_node(daemon, tmp_path)
    path = daemon.mount("n", tmp_path / "disk", allow_other="off")
    assert refused(os.chmod, path, 0o640) == errno.EPERM
    assert refused(os.chown, path, 12, 34) == errno.ENOTSUP
    os.chmod(path, 0o400)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o400


def test_statfs_is_the_image_as_a_file_system(daemon, tmp_path):
    image = add_node(daemon, tmp_path, content=b"x" * 65536)
    path = daemon.mount("n", tmp_path / "disk")
    seen = os.statvfs(path)
    assert seen.f_blocks * seen.f_frsize == SIZE
    assert seen.f_bfree * seen.f_frsize == SIZE - os.stat(image).st_blocks * 512
    assert seen.f_namemax == 255


def test_what_a_regular_file_does_not_do(mounted):
    assert refused(os.listdir, mounted) == errno.ENOTDIR
    assert refused(os.open, mounted / "x", os.O_RDONLY) == errno.ENOTDIR
    assert refused(os.getxattr, mounted, "user.x") == errno.ENOTSUP
    assert refused(os.unlink, mounted) == errno.EBUSY
    with File(mounted) as fd:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.ioctl(fd, 0x1268, ctypes.byref(ctypes.c_int())) == -1
        assert ctypes.get_errno() == errno.ENOTTY


# Reading and writing -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(mounted):
    with File(mounted) as fd:
        pattern = os.urandom(300_000)
        assert os.pwrite(fd, pattern, 12_345) == len(pattern)
        assert os.pread(fd, len(pattern), 12_345) == pattern
        assert os.pread(fd, 12_345, 0) == bytes(12_345)
        os.fsync(fd)
        assert os.pread(fd, SIZE, SIZE - 100) == bytes(100)
        assert os.pread(fd, 10, SIZE) == b""


def test_requests_of_a_mebibyte(mounted):
    pattern = os.urandom(SIZE)
    with File(mounted) as fd:
        assert os.pwrite(fd, pattern, 0) == SIZE
        assert os.pread(fd, SIZE, 0) == pattern
        assert os.pread(fd, SIZE, 4095) == pattern[4095:]


def test_direct_io(mounted):
    with mmap.mmap(-1, 65536) as memory, File(mounted, os.O_RDWR | os.O_DIRECT) as fd:
        memory[:] = pattern = os.urandom(65536)
        assert os.pwritev(fd, [memory], 4096) == 65536
        memory[:] = bytes(65536)
        assert os.preadv(fd, [memory], 4096) == 65536
        assert memory[:] == pattern


def test_mappings_and_calls_see_the_same(mounted):
    with File(mounted) as fd:
        os.pwrite(fd, b"written" * 1000, 5000)
        with mmap.mmap(fd, SIZE) as mapping:
            assert mapping[5000:12000] == b"written" * 1000
            mapping[5003:5007] = b"MAPS"
            assert os.pread(fd, 10, 5000) == b"wriMAPSwri"
            os.pwrite(fd, b"CALL", 5001)
            assert mapping[5000:5010] == b"wCALLPSwri"
            mapping[SIZE - 3 :] = b"end"
            mapping.flush()
        assert os.pread(fd, 10, SIZE - 3) == b"end"


def test_a_private_mapping(mounted):
    with File(mounted, os.O_RDWR) as fd:
        os.pwrite(fd, b"here", 4096)
    with File(mounted, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapping:
        assert mapping[4096:4100] == b"here"


def test_a_file_that_does_not_grow_takes_what_fits(mounted):
    with File(mounted) as fd:
        assert os.pwrite(fd, b"x" * 100, SIZE - 60) == 60
        assert refused(os.pwrite, fd, b"x", SIZE) == errno.ENOSPC
        assert refused(os.pwrite, fd, b"x", SIZE + 4096) == errno.ENOSPC
    with File(mounted, os.O_WRONLY | os.O_APPEND) as fd:
        assert refused(os.write, fd, b"x") == errno.ENOSPC
    assert os.stat(mounted).st_size == SIZE


def test_a_growable_file_grows(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk", growable=True)
    with File(path) as fd:
        assert os.pwrite(fd, b"x" * 1024, SIZE - 512) == 1024
        assert os.fstat(fd).st_size == SIZE + 512
        assert os.pwrite(fd, b"y" * 512, SIZE * 2) == 512
        assert os.fstat(fd).st_size == SIZE * 2 + 512
        assert os.pread(fd, 1024, SIZE) == b"x" * 512 + bytes(512)
        assert os.pread(fd, 4096, SIZE * 2) == b"y" * 512
        assert refused(os.pwrite, fd, b"x", (1 << 63) - 512) == errno.EFBIG
    with File(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"z" * 4096)
    with File(path) as fd:
        assert os.pread(fd, 9999, SIZE * 2 + 512) == b"z" * 4096


def test_opening_to_truncate(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    fixed = daemon.mount("n", tmp_path / "fixed", "fixed")
    with File(fixed) as fd:
        os.pwrite(fd, b"kept", 0)
    with File(fixed, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == SIZE  # as a block device: it could not be written any more
        assert os.pread(fd, 4, 0) == b"kept"
    daemon.execute("block-export-del", id="fixed")
    growable = daemon.mount("n", tmp_path / "growable", "growable", growable=True)
    with File(growable, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new!" * 128)
        assert os.pread(fd, 9999, 0) == b"new!" * 128


# Changing what is there ----------------------------------------------------------------------------------------------


def test_truncate_shrinks_and_grows(mounted):
    with File(mounted) as fd:
        os.pwrite(fd, b"x" * SIZE, 0)
        os.ftruncate(fd, 8192)
        assert os.fstat(fd).st_size == 8192
        os.ftruncate(fd, 65536)
        assert os.pread(fd, SIZE, 0) == b"x" * 8192 + bytes(65536 - 8192)
        assert refused(os.ftruncate, fd, (1 << 63) - 1) == errno.EFBIG


def test_an_odd_length_is_not_for_qcow2(daemon, tmp_path):
    add_node(daemon, tmp_path, "qcow2")
    path = daemon.mount("n", tmp_path / "disk", growable=True)
    assert refused(os.truncate, path, 1000) == errno.EINVAL
    with File(path) as fd:
        assert refused(os.pwrite, fd, b"x" * 100, SIZE) == errno.EINVAL


def test_holes_and_zeroes(mounted):
    with File(mounted) as fd:
        os.pwrite(fd, b"x" * SIZE, 0)
        fallocate(fd, PUNCH, 65536, 131072)
        fallocate(fd, PUNCH, 1000, 10)
        fallocate(fd, FALLOC_FL_ZERO_RANGE, 524288, 100_000)
        fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, SIZE - 512, 4096)
        fallocate(fd, PUNCH, SIZE - 1024, 1 << 30)
        fallocate(fd, PUNCH, SIZE * 4, 4096)  # nothing is there already
        assert os.fstat(fd).st_size == SIZE
        expected = bytearray(b"x" * SIZE)
        for start, end in ((65536, 196608), (1000, 1010), (524288, 624288), (SIZE - 1024, SIZE)):
            expected[start:end] = bytes(end - start)
        assert os.pread(fd, SIZE, 0) == expected


def test_space_behind_the_end(mounted):
    with File(mounted) as fd:
        assert refused(fallocate, fd, 0, 0, 4096) == errno.EOPNOTSUPP
        assert refused(fallocate, fd, FALLOC_FL_KEEP_SIZE, 0, 4096) == errno.EOPNOTSUPP
        assert refused(fallocate, fd, COLLAPSE, 0, 4096) == errno.EOPNOTSUPP
        assert refused(fallocate, fd, INSERT, 0, 4096) == errno.EOPNOTSUPP
        fallocate(fd, 0, SIZE, 8192)
        assert os.fstat(fd).st_size == SIZE + 8192
        fallocate(fd, FALLOC_FL_ZERO_RANGE, SIZE + 4096, 65536)
        assert os.fstat(fd).st_size == SIZE + 4096 + 65536
        assert not any(os.pread(fd, SIZE, SIZE))


def test_seeking_data_and_holes(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk")
    with File(path) as fd:
        os.pwrite(fd, b"x" * 65536, 131072)
        os.fsync(fd)
        seek = os.lseek
        assert seek(fd, 0, os.SEEK_DATA) == 131072
        assert seek(fd, 140_000, os.SEEK_DATA) == 140_000
        assert seek(fd, 0, os.SEEK_HOLE) == 0
        assert seek(fd, 131072, os.SEEK_HOLE) == 196608
        assert refused(seek, fd, 196608, os.SEEK_DATA) == errno.ENXIO
        assert refused(seek, fd, SIZE, os.SEEK_DATA) == errno.ENXIO
        assert refused(seek, fd, SIZE + 1, os.SEEK_HOLE) == errno.ENXIO
        assert seek(fd, 0, os.SEEK_END) == SIZE
        os.pwrite(fd, b"x", SIZE - 1)
        assert seek(fd, SIZE - 1, os.SEEK_HOLE) == SIZE


def test_copy_file_range(mounted):
    with File(mounted) as fd:
        pattern = os.urandom(4096)
        os.pwrite(fd, pattern, 4096)
        assert os.copy_file_range(fd, fd, 4096, 4096, 524288) == 4096
        assert os.pread(fd, 4096, 524288) == pattern


# Life ----------------------------------------------------------------------------------------------------------------


def test_a_size_changed_by_qmp_is_seen_at_once(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk")
    with File(path) as fd:
        for size in (SIZE * 2, SIZE // 2, SIZE):
            assert os.fstat(fd).st_size != size
            daemon.execute("block_resize", node_name="n", size=size)
            assert os.fstat(fd).st_size == size
            assert os.lseek(fd, 0, os.SEEK_END) == size


def test_two_exports_of_a_node_show_the_same(daemon, kind, tmp_path):
    add_node(daemon, tmp_path, kind)
    one, two = (daemon.mount("n", tmp_path / name, name) for name in ("one", "two"))
    with File(one) as first, File(two) as second:
        for number in range(20):
            os.pwrite(first, b"%4d" % number, 4096 * number)
            assert os.pread(second, 4, 4096 * number) == b"%4d" % number
        os.ftruncate(first, 4096)
        assert os.fstat(second).st_size == 4096


def test_a_bitmap_hears_of_every_write(daemon, tmp_path, kind):
    """Those over what has its place already, too, with other records and with none before it."""
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk")

    def dirty():
        (node,) = (each for each in daemon.execute("query-named-block-nodes") if each["node-name"] == "n")
        return node["dirty-bitmaps"][0]["count"]

    with File(path) as fd:
        for number in range(5):
            os.pwrite(fd, b"before" * 10000, 65536 * number)
        daemon.execute("block-dirty-bitmap-add", node="n", name="b", granularity=65536)
        for _ in range(2):
            for number in (0, 0, 3, 3, 5):
                os.pwrite(fd, b"after" * 1000, 65536 * number)
            assert dirty() == 3 * 65536
            os.pwrite(fd, b"both", 65536 * 2 - 2)
            assert dirty() == 5 * 65536
            fallocate(fd, PUNCH, 65536 * 7, 65536)
            assert dirty() == 6 * 65536
            daemon.execute("block-dirty-bitmap-clear", node="n", name="b")


def test_a_safe_removal_is_refused_while_the_file_is_open(daemon, mounted):
    with File(mounted), pytest.raises(Error, match="export 'e' still in use"):
        daemon.execute("block-export-del", id="e")
    daemon.execute("block-export-del", id="e")
    assert os.stat(mounted).st_size == 0  # the file underneath


def test_a_hard_removal_cuts_clients_off(daemon, mounted):
    fd = os.open(mounted, os.O_RDWR)
    daemon.execute("block-export-del", id="e", mode="hard")
    deadline = time.monotonic() + 10
    while daemon.execute("query-block-exports"):
        assert time.monotonic() < deadline
    assert refused(os.pread, fd, 10, 0) == errno.ENOTCONN
    assert refused(os.close, fd) == errno.ENOTCONN
    assert os.stat(mounted).st_size == 0


def test_unmounted_by_somebody_else_the_export_goes(daemon, mounted):
    subprocess.run(["umount", mounted], check=True)
    deadline = time.monotonic() + 10
    while daemon.execute("query-block-exports"):
        assert time.monotonic() < deadline
    assert daemon.events[-1]["data"] == {"id": "e"}


def test_who_uses_it_can_be_asked(daemon, mounted):
    (export,) = daemon.execute("query-block-exports")
    assert export["clients"] == []
    with File(mounted) as fd:
        os.pwrite(fd, b"x" * 4096, 0)
        os.pread(fd, 8192, 0)
        (export,) = daemon.execute("query-block-exports")
        (client,) = export["clients"]
        assert re.fullmatch(rf"processes {os.getpid()}", client["peer"])
        assert (client["received"], client["sent"]) == (4096, 8192)


def test_in_an_iothread_and_moved_to_another(daemon, kind, tmp_path):
    for name in ("one", "two"):
        daemon.execute("object-add", qom_type="iothread", id=name)
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk", iothread="one")
    with File(path) as fd:
        os.pwrite(fd, b"one", 0)
        daemon.mount("n", tmp_path / "other", "other", iothread="two")
        assert os.pread(fd, 3, 0) == b"one"
        os.pwrite(fd, b"two", 0)
        assert os.pread(fd, 3, 0) == b"two"
    daemon.clear()
    for name in ("one", "two"):
        daemon.execute("object-del", id=name)
