"""Sharing images with QEMU's tools, and block devices of the host."""

from __future__ import annotations

import os
import subprocess

import pytest

import peers
from blkferry.errors import Error, ErrorKind
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import CmdFlag, Errno, Mode

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x11" * MIB)
    return path


def add_file(daemon, path, **options):
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), **options)


@peers.requires("qemu-io", "qemu-img")
class TestLocks:
    def test_what_we_write_others_may_not(self, path):
        with DaemonThread() as daemon:
            add_file(daemon, path)
            peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", path)  # a node that nobody uses holds no lock
            daemon.export("f")
            done = peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", path, expect=1)
            assert 'Failed to get "write" lock' in done.stderr
            done = peers.run("qemu-img", "resize", "-f", "raw", path, "2M", expect=1)
            assert "lock" in done.stderr
            daemon.execute("block-export-del", id="e")
            peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", path)

    def test_what_we_only_read_others_may_read(self, path):
        with DaemonThread() as daemon:
            add_file(daemon, path)
            daemon.export("f", writable=False)
            peers.run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", path)
            done = peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", path, expect=1)
            assert 'Failed to get "write" lock' in done.stderr

    @pytest.mark.parametrize("writable", [False, True])
    def test_what_others_write_we_may_not(self, path, writable):
        holder = subprocess.Popen(
            [*peers.peer("qemu-io"), "-f", "raw", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            holder.stdin.write(b"read 0 512\n")
            holder.stdout.read(1)  # it has the image now
            with DaemonThread() as daemon:
                add_file(daemon, path)
                daemon.serve()
                with pytest.raises(Error) as caught:
                    daemon.export("f", writable=writable)
                assert caught.value.kind is ErrorKind.BUSY
                assert str(caught.value).startswith("Failed to get ")
                assert f"qemu-io (pid {holder.pid})" in str(caught.value)
                assert str(path) in caught.value.hint
                assert daemon.execute("query-block-exports") == []
                holder.communicate(b"quit\n", timeout=10)
                daemon.export("f", writable=writable)
                with daemon.client() as client:
                    assert client.read(0, 512) == b"\x11" * 512
        finally:
            holder.kill()
            holder.communicate()

    def test_two_of_us(self, path):
        with DaemonThread() as one, DaemonThread() as other:
            for daemon in (one, other):
                add_file(daemon, path)
                daemon.serve()
            one.export("f")
            with pytest.raises(Error, match=f"pid {os.getpid()}"):
                other.export("f", writable=False)
            one.execute("block-export-del", id="e")
            one.export("f", writable=False)
            other.export("f", writable=False)

    def test_locking_may_be_switched_off(self, path):
        with DaemonThread() as daemon:
            add_file(daemon, path, locking="off")
            daemon.export("f")
            peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", path)


@pytest.fixture(params=[512, 4096])
def loop_device(request, tmp_path):
    """A block device of 16 MiB with sectors of this size."""
    if os.geteuid() != 0:
        pytest.skip("only root can set up loop devices")
    path = tmp_path / "backing.img"
    path.touch()
    os.truncate(path, 16 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", str(request.param), path],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no loop device to be had: {made.stderr}")
    device = made.stdout.strip()
    yield device, request.param, path
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_a_block_device(loop_device, direct, window):
    device, sector, backing = loop_device
    with DaemonThread() as daemon:
        options = {"driver": "host_device", "filename": device, "discard": "unmap", "cache": {"direct": direct}}
        if window:
            daemon.execute(
                "blockdev-add", driver="raw", node_name="d", offset=512, size=8 * MIB, discard="unmap", file=options
            )
        else:
            daemon.execute("blockdev-add", node_name="d", **options)
        daemon.export("d")
        size, start = (8 * MIB, 512) if window else (16 * MIB, 0)
        for mode in Mode:
            with daemon.client(mode=mode) as client:
                assert client.size == size
                assert client.block_size.minimum == (sector if direct else 1)
                content = bytearray(os.urandom(2 * MIB))
                client.write(1000, content[1000:], CmdFlag.FUA)
                client.zero(0, 1000)
                content[:1000] = bytes(1000)
                for offset, length, flags in ((5000, 3, 0), (8192, 65536, 0), (100_001, 77_777, CmdFlag.NO_HOLE)):
                    client.zero(offset, length, flags)
                    content[offset : offset + length] = bytes(length)
                fast = client.call(6, 300_000, 100_000, CmdFlag.FAST_ZERO)
                if fast.error:
                    assert fast.error == Errno.ENOTSUP
                else:
                    content[300_000:400_000] = bytes(100_000)
                assert client.read(0, 2 * MIB) == content
                client.trim(1 << 20, 1 << 20)
                assert client.read(0, 1 << 20) == content[: 1 << 20]
                for byte, was in zip(client.read(1 << 20, 1 << 20), content[1 << 20 :], strict=True):
                    assert byte in (0, was)
                client.flush()
                if mode is not Mode.SIMPLE:
                    assert sum(n for n, _ in client.block_status(0, size)[0]) <= size
                assert client.call(1, size - 512, 1024, 0, bytes(1024)).error == Errno.ENOSPC
                client.write(size - 512, b"e" * 512)
                assert client.read(size - 513, 513)[1:] == b"e" * 512
        assert backing.stat().st_size == 16 * MIB
    with open(device, "rb") as seen:
        seen.seek(start)
        assert seen.read(1000) == bytes(1000)


def test_files_and_devices_are_not_mixed_up(loop_device, path):
    device, _, _ = loop_device
    with DaemonThread() as daemon:
        with pytest.raises(Error, match="'file' driver requires"):
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=device)
        with pytest.raises(Error, match="'host_device' driver requires"):
            daemon.execute("blockdev-add", driver="host_device", node_name="f", filename=str(path))
        daemon.execute("blockdev-add", driver="host_device", node_name="f", filename=device)
        with pytest.raises(Error, match="Cannot grow device files"):
            daemon.execute("block_resize", node_name="f", size=32 * MIB)
