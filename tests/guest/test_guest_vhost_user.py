"""Disks of a guest that are vhost-user-blk exports of blkferry-qsd out here, by QEMU's vhost-user-blk-pci.

One guest has a disk of every kind of ring: what one of them can, all must.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guest_server import Server
from linux_guest import Guest

from peers import KERNEL, requires, run

MIB = 1 << 20
SIZE = 64 * MIB

pytestmark = [
    requires(KERNEL, "qemu-system-x86_64", "fio", "qemu-img", "mkfs.ext4", "blkdiscard"),
    pytest.mark.timeout(300),  # an emulated machine feels whatever else this one has to do
]


class Disk(NamedTuple):
    """An image, how it is exported, and how the guest has it."""

    name: str
    image_format: str
    export: str
    device: str

    def path(self, directory: Path) -> Path:
        return directory / f"{self.name}.{self.image_format}"


DISKS = (
    Disk("split", "raw", "num-queues=4,serial=first-disk", "num-queues=4"),
    Disk("packed", "raw", "num-queues=4", "num-queues=4,packed=on"),
    Disk("plain", "raw", "num-queues=1", "num-queues=1,event_idx=off,indirect_desc=off"),
    Disk("bare", "raw", "num-queues=2", "num-queues=2,packed=on,event_idx=off,indirect_desc=off"),
    Disk("image", "qcow2", "num-queues=4,writethrough=on", "num-queues=4"),
)
SPLIT, PACKED, PLAIN, BARE, IMAGE = DISKS
LETTERS = {disk.name: letter for disk, letter in zip(DISKS, "abcde", strict=True)}
ALL = [f"/dev/vd{letter}" for letter in LETTERS.values()]


class Machine:
    """A daemon with all the disks, and a guest that has them; the guest is booted when it is needed."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self._sockets = sockets
        self._qmp = sockets / "qmp"
        self._guest: Guest | None = None
        options = ["--chardev", f"socket,id=qmp,path={self._qmp},server=on,wait=off", "--monitor", "chardev=qmp"]
        for disk in DISKS:
            path = disk.path(directory)
            run("qemu-img", "create", "-q", "-f", disk.image_format, path, str(SIZE))
            node = f"file,node-name={disk.name}-file,filename={path},discard=unmap"
            export = f"vhost-user-blk,id={disk.name},addr.type=unix,addr.path={self._socket(disk)},writable=on"
            options += [
                *("--blockdev", node),
                *("--blockdev", f"{disk.image_format},node-name={disk.name},file={disk.name}-file,discard=unmap"),
                *("--export", f"{export},node-name={disk.name},{disk.export}"),
            ]
        self.server = Server(directory, *options)
        self.server.start()

    def _socket(self, disk: Disk) -> Path:
        return self._sockets / disk.name

    def guest(self) -> Guest:
        if self._guest is None or not self._guest.alive:
            devices = []
            for disk in DISKS:
                devices += ["-chardev", f"socket,id={disk.name},path={self._socket(disk)},reconnect-ms=100"]
                devices += ["-device", f"vhost-user-blk-pci,chardev={disk.name},{disk.device}"]
            self._guest = Guest(self.directory, devices)
            self._guest.run("modprobe -a virtio_blk ext4")
        return self._guest

    def execute(self, command: str, **arguments: object) -> object:
        """Give the daemon a QMP command, which must succeed."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock, sock.makefile("rw") as lines:
            sock.connect(str(self._qmp))
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                lines.readline()
                lines.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                lines.flush()
            answer = json.loads(lines.readline())
        assert "return" in answer, answer
        return answer["return"]

    def raw(self, disk: Disk) -> bytes:
        """What is on a disk, as another program sees it. The guest does not write."""
        copy = self.directory / "copy"
        run("qemu-img", "convert", "-U", "-f", disk.image_format, "-O", "raw", disk.path(self.directory), copy)
        return copy.read_bytes()

    def close(self) -> None:
        if self._guest is not None:
            self._guest.kill()
        self.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    sockets = tmp_path_factory.mktemp("s")
    made = Machine(tmp_path_factory.mktemp("vhost-user"), sockets)
    yield made
    made.close()


@pytest.fixture
def guest(machine) -> Guest:
    return machine.guest()


def fio(*files: str, size: str, more: str = "") -> str:
    """A command that writes these files at the same time and verifies them."""
    jobs = " ".join(f"--name={number} --filename={file}" for number, file in enumerate(files))
    return (
        f"fio --size={size} --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --do_verify=1"
        f" --verify_fatal=1 --verify_state_save=0 --output=/dev/null {more} {jobs}"
    )


def test_the_guest_finds_the_disks(guest):
    said = guest.run(
        """
        for disk in /sys/block/vd?; do
            echo $(cat $disk/size) $(ls $disk/mq | wc -l) $(cat $disk/queue/write_cache) $(cat $disk/serial)
            grep -o . $disk/device/features | tr -d '\\n' | cut -c 29,30,35
        done
        """
    )
    assert said.splitlines() == [
        *("131072 4 write back first-disk", "110"),
        *("131072 4 write back vhost_user_blk", "111"),
        *("131072 1 write back vhost_user_blk", "000"),
        *("131072 2 write back vhost_user_blk", "001"),
        *("131072 4 write through vhost_user_blk", "110"),
    ]


def test_what_is_written_is_there(guest, machine):
    guest.run(
        f"""
        {fio(*ALL, size="3M", more="--bsrange=512-64k --numjobs=2 --offset_increment=8M --fsync=20")}
        for disk in {" ".join(ALL)}; do
            yes abcdefg | dd of=$disk bs=1M count=32 iflag=fullblock oflag=direct status=none
            blkdiscard -o 8M -l 8M $disk
            blkdiscard -z -o 20M -l 4M $disk
            yes abcdefg | head -c 1000 | dd of=$disk bs=512 seek=90000 conv=fsync status=none
        done
        """
    )
    some = b"abcdefg\n" * (MIB // 8)
    for disk in DISKS:
        raw = machine.raw(disk)
        assert raw[: 32 * MIB] == some * 8 + bytes(8 * MIB) + some * 4 + bytes(4 * MIB) + some * 8, disk
        assert raw[90000 * 512 :][:1000] == some[:1000], disk
        entries = json.loads(
            run("qemu-img", "map", "-U", "--output=json", "-f", disk.image_format, disk.path(machine.directory)).stdout
        )
        assert not any(entry["data"] for entry in entries if 8 * MIB <= entry["start"] < 16 * MIB), disk


def test_a_file_system(guest, machine):
    disks = " ".join(f"/dev/vd{LETTERS[disk.name]}" for disk in (SPLIT, IMAGE))
    guest.run(
        f"""
        for disk in {disks}; do
            mkfs.ext4 -q -F $disk
            mkdir -p /run$disk
            mount $disk /run$disk
            seq 1 100000 >/run$disk/numbers
            fstrim /run$disk
            umount /run$disk
            fsck.ext4 -f -n $disk >/dev/null
        done
        """
    )
    for disk in (SPLIT, IMAGE):
        copy = machine.directory / "copy"
        machine.raw(disk)
        assert run("debugfs", "-R", "cat /numbers", copy).stdout == "".join(
            f"{number}\n" for number in range(1, 100001)
        )


@pytest.mark.parametrize("disk", [SPLIT, PACKED, IMAGE], ids=lambda disk: disk.name)
def test_the_guest_sees_another_size_at_once(guest, machine, disk):
    device = f"/dev/vd{LETTERS[disk.name]}"
    guest.start(
        f"""
        echo reading
        while test $(blockdev --getsize64 {device}) = {SIZE}; do
            dd if={device} of=/dev/null bs=64k count=16 iflag=direct status=none
        done
        echo abcdefg | dd of={device} bs=512 seek={SIZE // 512} conv=sync,fsync oflag=direct status=none
        blockdev --getsize64 {device}
        """
    )
    guest.until("reading")
    machine.execute("block_resize", **{"node-name": disk.name, "size": SIZE + 16 * MIB})
    assert guest.finish().strip() == str(SIZE + 16 * MIB)
    assert machine.raw(disk)[SIZE:][:8] == b"abcdefg\n"
    machine.execute("block_resize", **{"node-name": disk.name, "size": SIZE})
    guest.run(f"until test $(blockdev --getsize64 {device}) = {SIZE}; do sleep 0.05; done")


def test_the_cache_is_switched(guest, machine):
    said = guest.run(
        """
        echo 'write through' >/sys/block/vda/cache_type
        cat /sys/block/vda/cache_type
        echo 'write back' >/sys/block/vda/cache_type
        cat /sys/block/vda/cache_type
        """
    )
    assert said.splitlines() == ["write through", "write back"]


def test_a_guest_that_writes_does_not_notice_restarts(guest, machine):
    """Neither orderly ones nor crashes: what was in flight is done again."""
    command = fio(*ALL, size="8M", more="--bs=4k --rate_iops=200 --fsync=50")
    guest.start(f"echo writing\n{command}\necho verified")
    guest.until("writing")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        time.sleep(2)
        machine.server.end(number)
        time.sleep(0.3)
        machine.server.start()
    assert guest.finish(timeout=200).endswith("verified\n")
    assert "violation" not in machine.server.log
    assert "stopped" not in machine.server.log


def test_a_guest_that_boots_again_has_its_disks(guest, machine):
    guest.run(f"for disk in {' '.join(ALL)}; do yes $disk | dd of=$disk bs=64k count=4 oflag=direct; done")
    guest.reboot()
    said = guest.run(
        f"modprobe virtio_blk; for disk in {' '.join(ALL)}; do dd if=$disk bs=512 count=1 | head -n 1; done 2>/dev/null"
    )
    assert said.splitlines() == ALL


def test_the_export_is_in_use_and_goes_by_force_only(guest, machine):
    (info,) = [each for each in machine.execute("query-block-exports") if each["id"] == SPLIT.name]
    (client,) = info["clients"]
    assert client["peer"].startswith("pid ")
    assert client["requests"] > 0
    with pytest.raises(AssertionError, match="export 'split' still in use"):
        machine.execute("block-export-del", id=SPLIT.name)
    guest.run("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")
