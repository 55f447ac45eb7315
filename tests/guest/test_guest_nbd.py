"""The NBD client of the Linux kernel, in a guest, against blkferry-qsd out here."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from guest_server import Server
from linux_guest import HOST

from peers import KERNEL, requires, run

MIB = 1 << 20
SIZE = 64 * MIB
FORMATS = ("raw", "qcow2")
REATTACH = Path(__file__).with_name("reattach.py")

pytestmark = [
    requires(KERNEL, "qemu-system-x86_64", "nbd-client", "nbdcopy", "mkfs.ext4", "debugfs", "fio", "qemu-img"),
    pytest.mark.timeout(300),  # an emulated machine feels whatever else this one has to do
]


class Disk:
    """An image, and how to serve it as an export of its format's name."""

    def __init__(self, directory: Path, image_format: str) -> None:
        self.path = directory / f"disk.{image_format}"
        self.format = image_format
        run("qemu-img", "create", "-q", "-f", image_format, self.path, str(SIZE))

    def options(self, *, writable: bool = True) -> list[str]:
        node = self.format
        read_only = "off" if writable else "on"
        return [
            *("--blockdev", f"file,node-name={node}-file,filename={self.path},discard=unmap,read-only={read_only}"),
            *("--blockdev", f"{node},node-name={node},file={node}-file,discard=unmap,read-only={read_only}"),
            *("--export", f"nbd,id={node},node-name={node},writable={'on' if writable else 'off'}"),
        ]

    def raw(self) -> Path:
        """A raw copy of what a guest sees; for that the image must be sound."""
        if self.format != "raw":
            run("qemu-img", "check", "-q", self.path)
        copy = self.path.with_suffix(".copy")
        run("qemu-img", "convert", "-f", self.format, "-O", "raw", self.path, copy)
        return copy

    def data(self) -> int:
        """Bytes of the guest's disk that something is stored for."""
        entries = json.loads(run("qemu-img", "map", "--output=json", "-f", self.format, self.path).stdout)
        return sum(entry["length"] for entry in entries if entry["data"])


@pytest.fixture(params=FORMATS)
def disk(request, tmp_path) -> Disk:
    return Disk(tmp_path, request.param)


def attach(server: Server, disk: Disk, *options: str) -> str:
    """The line of a script that makes the disk /dev/nbd0."""
    return f"nbd-client {HOST} {server.port} /dev/nbd0 -N {disk.format} {' '.join(options)} >/dev/null 2>&1"


def refused(command: str) -> str:
    """Lines of a script that go on only if this command fails; a mere `!` would not end it."""
    return f"if {command}; then echo 'not refused'; exit 1; fi"


def clients(server: Server) -> int:
    """How many have come, each of which must have said that it goes: all else is logged as "disconnecting"."""
    assert "disconnecting" not in server.log
    return server.log.count(": connected")


def test_a_file_system_over_four_connections(guest, disk, tmp_path):
    with Server(tmp_path, *disk.options()) as server:
        guest.run(
            f"""
            modprobe -a nbd ext4
            {attach(server, disk, "-C 4")}
            mkfs.ext4 -q /dev/nbd0
            mkdir -p /run/disk
            mount /dev/nbd0 /run/disk
            fio --name=verify --directory=/run/disk --size=6M --bsrange=512-64k --rw=randwrite --ioengine=libaio \\
                --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --numjobs=2 \\
                --verify_state_save=0 --output=/dev/null
            seq 1 200000 >/run/disk/numbers
            umount /run/disk
            fsck.ext4 -f -n /dev/nbd0
            nbd-client -d /dev/nbd0
            """
        )
        server.end()
        assert clients(server) == 4
    copy = disk.raw()
    run("fsck.ext4", "-f", "-n", copy)
    numbers = run("debugfs", "-R", "cat /numbers", copy).stdout
    assert numbers == "".join(f"{number}\n" for number in range(1, 200001))


def test_a_read_only_export(guest, disk, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "greeting").write_text("hello\n")
    raw = tmp_path / "files.raw"
    run("mkfs.ext4", "-q", "-d", tmp_path / "files", raw, f"{SIZE >> 10}k")
    run("qemu-img", "convert", "-f", "raw", "-O", disk.format, raw, disk.path)
    before = disk.path.read_bytes()
    with Server(tmp_path, *disk.options(writable=False)) as server:
        guest.run(
            f"""
            modprobe -a nbd ext4
            {attach(server, disk)}
            test $(blockdev --getro /dev/nbd0) = 1
            {refused("dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct")}
            mkdir -p /run/disk
            mount -o ro /dev/nbd0 /run/disk
            test $(cat /run/disk/greeting) = hello
            {refused("touch /run/disk/greeting")}
            umount /run/disk
            nbd-client -d /dev/nbd0
            """
        )
        server.end()
        assert clients(server) == 1
    assert disk.path.read_bytes() == before


def test_discards_make_holes(guest, disk, tmp_path):
    with Server(tmp_path, *disk.options()) as server:
        guest.run(
            f"""
            modprobe nbd
            {attach(server, disk, "-b 4096")}
            test "$(blockdev --getsize64 --getss --getpbsz /dev/nbd0 | xargs)" = "{SIZE} 4096 4096"
            yes abcdefg | dd of=/dev/nbd0 bs=1M count=32 iflag=fullblock oflag=direct
            blkdiscard -o 8M -l 8M /dev/nbd0
            blkdiscard -z -o 20M -l 4M /dev/nbd0
            nbd-client -d /dev/nbd0
            """
        )
        server.end()
        assert clients(server) == 1
    assert disk.data() == 20 * MIB
    some = b"abcdefg\n" * (MIB // 8)
    expected = some * 8 + bytes(8 * MIB) + some * 4 + bytes(4 * MIB) + some * 8 + bytes(32 * MIB)
    assert disk.raw().read_bytes() == expected


def test_a_file_system_gives_back_what_it_does_not_use(guest, disk, tmp_path):
    with Server(tmp_path, *disk.options()) as server:
        guest.run(
            f"""
            modprobe -a nbd ext4
            {attach(server, disk)}
            mkfs.ext4 -q /dev/nbd0
            mkdir -p /run/disk
            mount /dev/nbd0 /run/disk
            yes | dd of=/run/disk/kept bs=1M count=4 iflag=fullblock
            yes | dd of=/run/disk/gone bs=1M count=24 iflag=fullblock
            umount /run/disk
            """
        )
        full = disk.path.stat().st_blocks * 512
        guest.run(
            """
            mount /dev/nbd0 /run/disk
            rm /run/disk/gone
            sync
            fstrim /run/disk
            umount /run/disk
            nbd-client -d /dev/nbd0
            """
        )
        server.end()
        assert clients(server) == 1
    assert disk.path.stat().st_blocks * 512 <= full - 20 * MIB
    assert run("debugfs", "-R", "cat /kept", disk.raw()).stdout == "y\n" * (2 * MIB)


def test_a_guest_that_writes_does_not_notice_restarts(guest, tmp_path):
    """Neither an orderly one nor a crash. A crashed qcow2 keeps what was flushed, so every write asks for that."""
    disks = [Disk(tmp_path, image_format) for image_format in FORMATS]
    fio = (
        "fio --size=16M --bs=4k --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 --sync=dsync --rate_iops=400"
        " --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0 --output=/dev/null"
    )
    with Server(tmp_path, *(option for disk in disks for option in disk.options())) as server:
        guest.start(
            f"""
            modprobe nbd
            for number in 0 1; do
                set -- {" ".join(FORMATS)}
                shift $number
                python3 {REATTACH} {HOST} {server.port} $1 $number 2 >/run/said$number &
                reattaching="$reattaching $!"
            done
            until grep -q attached /run/said0 && grep -q attached /run/said1; do sleep 0.1; done
            echo writing
            {fio} --name=0 --filename=/dev/nbd0 --name=1 --filename=/dev/nbd1
            kill $reattaching
            cat /run/said0 /run/said1
            nbd-client -d /dev/nbd0
            nbd-client -d /dev/nbd1
            """
        )
        guest.until("writing")
        for number in (signal.SIGTERM, signal.SIGKILL):
            time.sleep(2)
            server.end(number)
            time.sleep(1)
            server.start()
        assert guest.finish(timeout=180).count("attached again") == 4
        server.end()
    names = (word for number, disk in enumerate(disks) for word in (f"--name={number}", f"--filename={disk.raw()}"))
    run(*fio.split(), "--verify_only", *names)


def test_the_daemon_runs_in_a_guest(guest):
    """From the virtual environment that runs this test, at the path it has here; over a unix socket, and over vsock."""
    program = Path(sys.executable).with_name("blkferry-qsd")
    guest.run("modprobe -a nbd vsock_loopback")
    guest.run(
        f"""
        truncate -s 64M /run/disk.raw
        {program} --blockdev file,node-name=disk,filename=/run/disk.raw \\
            --nbd-server addr.type=unix,addr.path=/run/nbd.sock --export nbd,id=disk,node-name=disk,writable=on \\
            --nbd-server id=guests,addr.type=vsock,addr.cid=1,addr.port=10809 \\
            --export nbd,id=same,node-name=disk,server=guests --pidfile /run/qsd.pid --daemonize
        """,
        bare=True,
    )
    guest.run(
        """
        nbd-client -unix /run/nbd.sock /dev/nbd0 -N disk >/dev/null 2>&1
        yes | dd of=/dev/nbd0 bs=1M count=4 iflag=fullblock oflag=direct
        nbd-client -d /dev/nbd0
        nbdcopy nbd+vsock://1:10809/disk /run/copy
        yes | head -c 4M | cmp -n 4M - /run/copy
        kill $(cat /run/qsd.pid)
        while kill -0 $(cat /run/qsd.pid); do sleep 0.1; done
        cmp /run/copy /run/disk.raw
        test ! -e /run/nbd.sock
        """
    )
