"""VDUSE devices that a daemon in the guest makes, and what the guest's kernel makes of them."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import pytest

import peers
from peers import KERNEL, requires

MIB = 1 << 20
SIZE = 48 * MIB
PROGRAMS = Path(sys.executable).parent
QMP_SAY = Path(__file__).with_name("qmp_say.py")
QMP = "/run/qmp.sock"
BIN = "/run/bin"
MODULES = "vduse virtio_vdpa virtio_blk ext4"
MOUNT = """\
mkdir -p /run/disk
mount -t ext4 /dev/vda /run/disk
seq 1 50000 >/run/disk/numbers
"""
NOTHING_IS_LEFT = """\
test "$(ls /dev/vduse)" = control
test -z "$(ls /sys/bus/vdpa/devices)"
test -z "$(ls -A /run/blkferry)"
"""

pytestmark = [
    requires(KERNEL, "qemu-system-x86_64", "vdpa", "mkfs.ext4", "fio", "qemu-img", "qemu-io", "qemu-storage-daemon"),
    pytest.mark.timeout(300),  # an emulated machine feels whatever else this one has to do
]


class DaemonInGuest:
    """blkferry-qsd, or `blkferry`, inside of the guest."""

    def __init__(self, guest) -> None:
        self._guest = guest
        runner = peers.runner()
        guest.run(
            f"""
            mkdir -p {BIN}
            printf '#!/bin/sh\\nexec {runner} vdpa "$@"\\n' >{BIN}/vdpa
            chmod 755 {BIN}/vdpa
            for format in raw qcow2; do
                rm -f /run/disk.$format
                {runner} qemu-img create -q -f $format /run/disk.$format {SIZE}
            done
            """,
            bare=True,
        )

    def start(self, *options: str) -> None:
        """Start blkferry-qsd, and return when everything is up. Its log goes on in /run/daemon.log."""
        nodes = [
            f"--blockdev {form},node-name={form},file.driver=file,file.filename=/run/disk.{form},discard=unmap"
            ",file.discard=unmap"
            for form in ("raw", "qcow2")
        ]
        monitor = f"--chardev socket,id=qmp,path={QMP},server=on,wait=off --monitor chardev=qmp"
        self.run("blkferry-qsd", *nodes, *options, monitor, "--pidfile /run/daemon.pid", ready="/run/daemon.pid")

    def run(self, program: str, *options: str, ready: str) -> None:
        """Start a program, and return when it has written this file."""
        self._guest.run(
            f"""
            rm -f {ready}
            PATH={BIN}:$PATH {PROGRAMS / program} {" ".join(options)} </dev/null >/run/daemon.out 2>>/run/daemon.log &
            echo $! >/run/pid
            until test -s {ready}; do
                kill -0 $! || {{ cat /run/daemon.log; exit 1; }}
                sleep 0.05
            done
            """,
            bare=True,
        )

    def end(self, signal: str = "TERM") -> str:
        """End it, and return what it has logged in all its lives."""
        return self._guest.run(
            f"""
            kill -{signal} $(cat /run/pid)
            while kill -0 $(cat /run/pid) 2>/dev/null; do sleep 0.05; done
            cat /run/daemon.log
            """,
            bare=True,
        )

    def say(self, *words: str | dict[str, object]) -> list[object]:
        """QMP commands, each with its arguments, and the answers."""
        texts = [word if isinstance(word, str) else json.dumps(word) for word in words]
        said = self._guest.run(f"python3 {QMP_SAY} {QMP} {shlex.join(texts)}")
        return [json.loads(line) if line[0] in '{["' else line for line in said.splitlines()]


@pytest.fixture
def daemon(guest):
    guest.run(f"modprobe -a {MODULES}; rm -f /run/daemon.log")
    return DaemonInGuest(guest)


def export(form: str, name: str, *options: str) -> str:
    return ",".join([f"--export vduse-blk,id={form},node-name={form},name={name},writable=on", *options])


def refused(command: str) -> str:
    """Lines of a script that go on only if this command fails; a mere `!` would not end it."""
    return f"if {command}; then echo 'not refused'; exit 1; fi"


FIO = "fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/dev/null"


def test_disks_from_the_first_file_system_to_their_removal(guest, daemon):
    """Two at once: one with several queues, one with large blocks."""
    daemon.start(
        export("raw", "disk0", "num-queues=3", "queue-size=64", "serial=blk-7"),
        export("qcow2", "disk1", "logical-block-size=4096"),
    )
    guest.run(
        f"""
        vdpa dev add name disk0 mgmtdev vduse
        test $(cat /sys/block/vda/serial) = blk-7
        vdpa dev add name disk1 mgmtdev vduse
        test $(ls /sys/block/vda/mq | wc -l) = 3
        test "$(blockdev --getsize64 --getss /dev/vda | xargs)" = "{SIZE} 512"
        test "$(blockdev --getsize64 --getss /dev/vdb | xargs)" = "{SIZE} 4096"
        test "$(cat /sys/block/vda/queue/write_cache)" = 'write back'
        for disk in vda vdb; do
            mkfs.ext4 -q /dev/$disk
            mkdir -p /run/$disk
            mount /dev/$disk /run/$disk
            {FIO} --name=verify --directory=/run/$disk --size=2M --bsrange=4k-64k --rw=randwrite --iodepth=8 \\
                --do_verify=1 --numjobs=2
            seq 1 50000 >/run/$disk/numbers
            rm /run/$disk/verify*
            sync
            fstrim /run/$disk
            umount /run/$disk
        done
        blkdiscard -o 24M -l 8M /dev/vda
        yes | dd of=/dev/vda bs=1M count=1 seek=30 iflag=fullblock oflag=direct
        blkdiscard -z -o 30M -l 1M /dev/vda
        cmp -n 1M /dev/zero /dev/vda 0 30M
        """
    )
    (refusal,) = daemon.say("block-export-del", {"id": "raw"})
    assert refusal == {"class": "GenericError", "desc": "export 'raw' still in use"}
    ((export1, export0),) = daemon.say("query-block-exports")
    assert [client["peer"] for each in (export0, export1) for client in each["clients"]] == ["/dev/vda", "/dev/vdb"]
    guest.run("vdpa dev del disk0; vdpa dev del disk1")
    assert daemon.say("block-export-del", {"id": "raw"}) == [{}]
    assert daemon.end() == ""
    guest.run(
        f"""
        qemu-img check -q /run/disk.qcow2
        qemu-img convert -O raw /run/disk.qcow2 /run/copy
        test $(du -k /run/disk.raw | cut -f1) -lt 9000
        test $(du -k /run/disk.qcow2 | cut -f1) -lt 9000
        for copy in /run/disk.raw /run/copy; do
            fsck.ext4 -f -n $copy
            debugfs -R 'cat /numbers' $copy | cmp - /run/numbers
        done
        {NOTHING_IS_LEFT}
        """.replace("for copy", "seq 1 50000 >/run/numbers\n        for copy", 1)
    )


def test_a_read_only_disk_and_one_of_another_size(guest, daemon):
    daemon.start(export("raw", "disk0"), "--export vduse-blk,id=ro,node-name=qcow2,name=disk1")
    guest.run(
        f"""
        vdpa dev add name disk0 mgmtdev vduse
        vdpa dev add name disk1 mgmtdev vduse
        test "$(blockdev --getro /dev/vda /dev/vdb | xargs)" = "0 1"
        {refused("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct")}
        """
    )
    for node in ("raw", "qcow2"):
        assert daemon.say("block_resize", {"node-name": node, "size": 64 * MIB}) == [{}]
    guest.run(
        """
        for disk in vda vdb; do
            until test $(blockdev --getsize64 /dev/$disk) = 67108864; do sleep 0.05; done
        done
        yes | dd of=/dev/vda bs=1M count=1 seek=63 iflag=fullblock oflag=direct
        vdpa dev del disk0
        vdpa dev del disk1
        """
    )
    assert daemon.end() == ""
    guest.run(f"yes | head -c 1M | cmp -n 1M - /run/disk.raw 0 63M\n{NOTHING_IS_LEFT}")


def test_a_driver_that_writes_does_not_notice_crashes_and_restarts(guest, daemon):
    """A crashed qcow2 keeps what was flushed, so that is done with every write."""
    options = (export("raw", "disk0", "num-queues=2"), export("qcow2", "disk1", "writethrough=on"))
    daemon.start(*options)
    verify = f"{FIO} --size=3M --bs=4k --rw=randwrite --iodepth=16"
    jobs = "--name=a --filename=/dev/vda --name=b --offset=10M --filename=/dev/vda --name=c --filename=/dev/vdb"
    guest.run(
        f"""
        vdpa dev add name disk0 mgmtdev vduse
        vdpa dev add name disk1 mgmtdev vduse
        ({verify} --rate_iops=100 --do_verify=0 {jobs}; echo $? >/run/fio) </dev/null >/run/fio.out 2>&1 &
        """
    )
    for signal in ("KILL", "TERM"):
        time.sleep(1)
        daemon.end(signal)
        daemon.start(*options)
    guest.run(
        f"""
        until test -s /run/fio; do sleep 0.1; done
        test $(cat /run/fio) = 0 || {{ cat /run/fio.out; exit 1; }}
        {verify} --verify_only {jobs}
        vdpa dev del disk0
        vdpa dev del disk1
        """
    )
    log = daemon.end()
    for name in ("disk0", "disk1"):
        left = (
            f"blkferry-qsd: '{name}' stays on the vDPA bus: what is asked of it waits until a daemon serves it again\n"
        )
        assert left in log
        log = log.replace(left, "")
    assert log == ""
    guest.run(f"qemu-img check -q /run/disk.qcow2 || test $? = 3  # leaks, and no worse\n{NOTHING_IS_LEFT}")


def test_removal_by_force(guest, daemon):
    """By the daemon itself; and where it may not, requests fail until somebody else takes the device off the bus."""
    daemon.start(export("raw", "disk0"), export("qcow2", "disk1"))
    guest.run(
        """
        vdpa dev add name disk0 mgmtdev vduse
        vdpa dev add name disk1 mgmtdev vduse
        mkfs.ext4 -q /dev/vda
        """
    )
    guest.run(MOUNT, bare=True)
    gone = "wait:BLOCK_EXPORT_DELETED"
    hard = {"id": "raw", "mode": "hard"}
    assert daemon.say("block-export-del", hard, gone, {}, "blockdev-del", {"node-name": "raw"})[::2] == [{}, {}]
    guest.run("umount /run/disk", bare=True)
    guest.run(
        """
        test ! -e /dev/vda
        e2fsck -p /run/disk.raw || test $? = 1 # what the journal has; that there is no other damage
        debugfs -R 'cat /numbers' /run/disk.raw | tail -n 1 | grep -x 50000
        """
    )
    guest.run(f"printf '#!/bin/sh\\necho not today >&2; exit 1\\n' >{BIN}/vdpa", bare=True)
    assert daemon.say("block-export-del", {"id": "qcow2", "mode": "hard"}) == [{}]
    ((export1,),) = daemon.say("query-block-exports")
    assert export1["shutting-down"]
    guest.run(
        f"""
        {refused("dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct")}
        timeout 10 vdpa dev del disk1
        until test "$(ls /dev/vduse)" = control; do sleep 0.05; done
        """
    )
    assert daemon.say("blockdev-del", {"node-name": "qcow2"}, "query-block-exports") == [{}, []]
    log = daemon.end()
    assert "Cannot take 'disk1' off the vDPA bus: not today" in log
    assert "all requests to 'disk1' fail until somebody takes it off the vDPA bus: vdpa dev del disk1" in log
    guest.run(NOTHING_IS_LEFT)


def test_wrong_input_leaves_nothing_behind(guest, daemon):
    guest.run("modprobe -r virtio_vdpa vduse")
    daemon.start()

    def add(*cases: dict[str, object]) -> list[str]:
        """Add an export with these options, one after the other, and tell what is said about each."""
        common = {"type": "vduse-blk", "id": "e", "node-name": "raw", "name": "disk0"}
        answers = daemon.say(*(word for case in cases for word in ("block-export-add", common | case)))
        return [answer.get("desc", "") for answer in answers]

    failed = "failed to create vduse device"
    assert add({}) == [f"{failed}: Failed to open /dev/vduse/control: No such file or directory"]
    guest.run(f"modprobe -a {MODULES}; rm -rf /run/blkferry; mkdir -m 755 /run/blkferry")
    sizes, blocks, names = (0, 2, 3, 2048), (0, 256, 513, 4 << 20), ("", "a/b", "control", "x" * 256)
    assert add(
        {"num-queues": 0},
        *({"queue-size": size} for size in sizes),
        *({"logical-block-size": size} for size in blocks),
        *({"name": name} for name in names),
        {},
    ) == [
        "num-queues must be greater than 0",
        *["queue-size is invalid"] * len(sizes),
        *["parameter logical-block-size must be a power of 2 between 512 and 2097152"] * len(blocks),
        *(f"'{name}' cannot be the name of a VDUSE device" for name in names),
        "failed to set reconnect log file: '/run/blkferry' is not a directory of ours alone",
    ]
    guest.run(f"chmod 700 /run/blkferry\n{NOTHING_IS_LEFT}")
    assert add({}, {"id": "f"}) == ["", f"{failed}: 'disk0' is served by another process"]
    guest.run("vdpa dev add name disk0 mgmtdev vduse")
    daemon.end("KILL")
    daemon.start()
    assert add({"num-queues": 2}, {"writable": True}, {"queue-size": 512}, {}) == [
        *[f"{failed}: VDUSE device 'disk0' was made with other options"] * 2,
        "failed to set reconnect log file: '/run/blkferry/vduse-disk0.log' is one of other options",
        "",
    ]
    guest.run("dd if=/dev/vda of=/dev/null bs=4k count=10 iflag=direct; vdpa dev del disk0")
    daemon.end()
    guest.run(NOTHING_IS_LEFT)


def test_serve_makes_a_device_of_an_image_and_takes_it_away(guest, daemon):
    daemon.run("blkferry", "serve -w --json --vduse disk0,num-queues=2 /run/disk.qcow2", ready="/run/daemon.out")
    said = json.loads(guest.run("cat /run/daemon.out"))
    assert said["exports"] == [
        {"name": "disk0", "image": "/run/disk.qcow2", "size": SIZE, "writable": True, "device": "/dev/vda"}
    ]
    guest.run(
        """
        mkfs.ext4 -q /dev/vda
        """
    )
    guest.run(MOUNT, bare=True)
    assert daemon.end() == ""
    guest.run("umount /run/disk", bare=True)
    guest.run(
        f"""
        test ! -e /dev/vda
        {NOTHING_IS_LEFT}
        qemu-img check -q /run/disk.qcow2
        qemu-img convert -O raw /run/disk.qcow2 /run/copy
        debugfs -R 'cat /numbers' /run/copy | tail -n 1 | grep -x 50000
        """
    )


def test_a_disk_for_a_guest(guest, daemon):
    """By vhost-vdpa, with a driver in user space whose memory is its own: QEMU's, as qemu-io has it."""
    guest.run("modprobe -r virtio_vdpa; modprobe vhost_vdpa")
    daemon.start(export("raw", "disk0"))
    disk = "driver=virtio-blk-vhost-vdpa,path=/dev/vhost-vdpa-0,cache.direct=on"
    said = guest.run(
        f"""
        vdpa dev add name disk0 mgmtdev vduse
        qemu-io --image-opts {disk} -c 'write -P 7 1M 256k' -c 'write -P 9 3M 64k' -c flush
        qemu-io --image-opts {disk} -c 'read -P 7 1M 256k' -c 'read -P 9 3M 64k' -c 'read -P 0 2M 64k'
        vdpa dev del disk0
        modprobe -r vhost_vdpa
        """
    )
    assert "Pattern verification failed" not in said
    assert daemon.end() == ""
    guest.run(f"qemu-io -f raw -c 'read -P 7 1M 256k' /run/disk.raw\n{NOTHING_IS_LEFT}")
