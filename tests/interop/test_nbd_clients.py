"""NBD clients that nobody here wrote, over every kind of node."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

import peers
from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread

MIB = 1 << 20
SIZE = 8 * MIB
PROGRAMS = ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")

pytestmark = peers.requires(*PROGRAMS)


class Disk:
    def __init__(self, daemon, place):
        self.daemon = daemon
        self.place = place
        self.uri = f"nbd+unix:///?socket={daemon.socket}"

    def content(self) -> bytes:
        with self.daemon.client() as client:
            return client.read(0, client.size)

    def blocks(self, spans) -> set[int]:
        """The blocks of the file system that such parts of the disk lie in, but for those at the ends of a window."""
        start = self.place.start
        found = {n for first, end in spans for n in range((first + start) // 4096, -((-end - start) // 4096))}
        return found - {0, (start + SIZE) // 4096} if start else found

    def fill(self, offset, data) -> None:
        with self.daemon.client() as client:
            client.write(offset, data)


@pytest.fixture(params=nodes.KINDS)
def disk(request, tmp_path):
    with DaemonThread(engine="threads" if request.param == "threads" else "auto") as daemon:
        place = nodes.add(daemon, request.param, tmp_path, SIZE)
        daemon.export(place.node, description="a disk to test")
        yield Disk(daemon, place)


def spans(entries, *, data):
    """Join qemu-img map's entries into (start, end) of what is data, or what is not."""
    joined = []
    for entry in entries:
        if entry["data"] != data:
            continue
        start, end = entry["start"], entry["start"] + entry["length"]
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def test_nbdinfo(disk):
    disk.fill(2 * MIB, b"d" * MIB)
    (export,) = json.loads(peers.run("nbdinfo", "--json", disk.uri).stdout)["exports"]
    expected = {
        "export-size": SIZE,
        "description": "a disk to test",
        "is_read_only": False,
        "is_rotational": False,
        "contexts": ["base:allocation"],
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
    }
    for name in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        expected[f"can_{name}"] = True
    assert {name: export.get(name) for name in expected} == expected
    (listed,) = json.loads(peers.run("nbdinfo", "--list", "--json", disk.uri).stdout)["exports"]
    assert listed["export-name"] == ""
    assert "extended" in peers.run("nbdinfo", disk.uri).stdout
    extents = json.loads(peers.run("nbdinfo", "--map", "--json", disk.uri).stdout)
    assert sum(extent["length"] for extent in extents) == SIZE
    assert {extent["type"] for extent in extents} == {0, 3}
    data = [(e["offset"], e["offset"] + e["length"]) for e in extents if e["type"] == 0]
    assert disk.blocks(data) == disk.blocks([(2 * MIB, 3 * MIB)])


def test_nbdcopy_both_ways_keeps_holes(disk, image):
    source = image(SIZE)
    peers.run("nbdcopy", source.path, disk.uri)
    assert disk.content() == source.expect(0, SIZE)
    entries = json.loads(peers.run("qemu-img", "map", "--output=json", "-f", "raw", disk.uri).stdout)
    assert disk.blocks(spans(entries, data=True)) == disk.blocks((start, start + n) for start, n in source.data)
    copy = source.path.with_name("copy.raw")
    peers.run("nbdcopy", disk.uri, copy)
    assert copy.read_bytes() == source.expect(0, SIZE)
    assert copy.stat().st_blocks * 512 <= SIZE // 4 + 64 * 1024


def test_qemu_img(disk, image, tmp_path):
    source = image(SIZE)
    peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source.path, disk.uri)
    assert "identical" in peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", source.path, disk.uri).stdout
    info = json.loads(peers.run("qemu-img", "info", "--output=json", disk.uri).stdout)
    assert (info["format"], info["virtual-size"]) == ("raw", SIZE)
    back = tmp_path / "back.qcow2"
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri, back)
    assert "identical" in peers.run("qemu-img", "compare", "-f", "raw", disk.uri, back).stdout
    disk.fill(12345, b"!")
    assert peers.run("qemu-img", "compare", "-f", "raw", disk.uri, back, expect=1).returncode == 1


def test_qemu_io(disk):
    commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 513 100",  # unaligned at both ends
        "write -P 0x33 -f 4095 4098",
        "write -z 65536 65536",
        "write -zu 131072 65536",
        "discard 200704 4096",
        "flush",
        "aio_write -P 0x44 2M 1M",
        "aio_write -P 0x55 3M 64k",
        "aio_flush",
        "read -P 0x11 0 513",
        "read -P 0x22 513 100",
        "read -P 0x11 613 3482",
        "read -P 0x33 4095 4098",
        "read -P 0 65536 131072",
        "read -P 0x11 262144 786432",
        "read -P 0x44 2M 1M",
        "read -P 0x55 3M 64k",
        f"read -P 0 {4 * MIB} 4M",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    said = peers.run("qemu-io", "-f", "raw", "--discard=unmap", *arguments, disk.uri).stdout
    assert "Pattern verification failed" not in said
    assert said.count("read ") == sum(command.startswith("read") for command in commands)
    content = disk.content()
    assert content[:513] + content[613:4095] == b"\x11" * 3995
    assert content[513:613] == b"\x22" * 100
    assert set(content[200704:204800]) <= {0, 0x11}


def test_qemu_io_past_the_end(disk):
    done = peers.run("qemu-io", "-f", "raw", "-c", f"read {SIZE - 512} 1024", disk.uri, expect=1)
    assert "Input/output error" in done.stdout + done.stderr


@peers.requires("fio")
def test_fio_verifies_what_it_wrote(disk, tmp_path):
    """fio shares its way into NBD with libnbd: 16 in flight, random sizes, checksums in every block."""
    job = [
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={disk.uri}",
        "--iodepth=16",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--blockalign=512",
        f"--size={SIZE}",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--randseed=7",
        "--verify_state_save=0",
        "--output-format=json",
    ]
    if not peers.available("fio") or "nbd" not in peers.run("fio", "--enghelp").stdout:
        pytest.skip("this fio has no nbd engine")
    said = peers.run(*job, timeout=60).stdout
    report = json.loads(said[said.index("{") :])  # it greets the server first
    (done,) = report["jobs"]
    assert done["error"] == 0
    assert done["write"]["io_bytes"] >= SIZE
    assert done["read"]["io_bytes"] >= SIZE


def test_qemu_nbd_serves_what_it_takes_from_us(disk, image, sockets):
    """Two NBD servers in a row: qemu's own client is a block driver here, not a tool."""
    source = image(SIZE)
    disk.fill(0, source.expect(0, SIZE))
    relay = sockets / "relay"
    process = subprocess.Popen([*peers.peer("qemu-nbd"), "-f", "raw", "-k", str(relay), "--persistent", disk.uri])
    try:
        uri = f"nbd+unix:///?socket={relay}"
        for _ in range(200):
            if relay.exists():
                break
            time.sleep(0.02)
        assert "identical" in peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", source.path, uri).stdout
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 0x77 1000 5000", uri)
    finally:
        process.terminate()
        process.wait(10)
    assert disk.content()[999:6001] == source.expect(999, 1) + b"\x77" * 5000 + source.expect(6000, 1)
