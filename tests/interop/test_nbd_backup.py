"""Incremental backups pulled over NBD with nothing but QEMU's and libnbd's tools, while the disk is in use.

Each cycle puts an overlay on the disk that a guest writes to. What is below it stands still from then on, with a bitmap
that says what was written since the cycle before; the overlay has a bitmap for the next one.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from served import change, create, daemon_of, mapped, qcow2

import peers

pytestmark = peers.requires("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo", peers.LIBNBD)

SIZE = 4 << 20
GRANULARITY = 65536

COPY = """
import nbd, sys
uri, path, ranges = sys.argv[1], sys.argv[2], sys.argv[3:]
h = nbd.NBD()
h.connect_uri(uri)
with open(path, "r+b") as copy:
    for each in ranges:
        offset, length = map(int, each.split("+"))
        copy.seek(offset)
        copy.write(h.pread(length, offset))
"""

WRITE = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for each in sys.argv[2:]:
    offset, length, byte = map(int, each.split(","))
    if byte:
        h.pwrite(bytes([byte]) * length, offset)
    else:
        h.zero(length, offset)
h.flush()
"""


@pytest.fixture(params=["ours", "theirs"])
def daemon(request, tmp_path):
    with daemon_of(request.param, tmp_path) as started:
        yield started


class Guest:
    """Writes over NBD, and knows what its disk must hold."""

    def __init__(self, uri: str, content: bytes, seed: int) -> None:
        self.content = bytearray(content)
        self._uri = uri
        self._random = random.Random(seed)

    def work(self) -> set[int]:
        """Write here and there; the granules that this touches."""
        orders, touched = [], set()
        for _ in range(6):
            offset, length = self._random.randrange(SIZE - 99_999), self._random.randrange(1, 99_999)
            byte = self._random.randrange(4)
            orders.append(f"{offset},{length},{byte}")
            self.content[offset : offset + length] = bytes([byte]) * length
            touched |= set(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))
        peers.libnbd_script(WRITE, self._uri, *orders)
        return touched


def uri(socket: str, name: str) -> str:
    return f"nbd+unix:///{name}?socket={socket}"


def add_bitmap(image: Path, name: str) -> None:
    peers.run("qemu-img", "bitmap", "--add", "--granularity", str(GRANULARITY), image, name)


def dirty_ranges(socket: str, export: str, bitmap: str) -> list[tuple[int, int]]:
    return [
        (offset, length)
        for offset, length, is_dirty in mapped(socket, f"qemu:dirty-bitmap:{bitmap}", export)
        if is_dirty
    ]


def granules(ranges: list[tuple[int, int]]) -> set[int]:
    return {each // GRANULARITY for offset, length in ranges for each in range(offset, offset + length, GRANULARITY)}


def pull(socket: str, export: str, ranges: list[tuple[int, int]], target: Path, previous: Path) -> None:
    """Make `target`, which has the ranges of the export on top of the backup before it."""
    peers.run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri(socket, export), target)
    reads = [option for offset, length in ranges for option in ("-c", f"read {offset} {length}")]
    if reads:
        peers.run("qemu-io", "-C", "-f", "qcow2", *reads, target)
    peers.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", previous, target)


def test_backups_are_pulled_while_the_disk_is_written_to(daemon, tmp_path):
    disk = create(tmp_path / "disk.qcow2", str(SIZE))
    change(disk, "write -P 7 0 1M", "write -P 9 3M 300k")
    content = bytes([7]) * (1 << 20) + bytes(2 << 20) + bytes([9]) * (300 << 10) + bytes(SIZE - (3 << 20) - (300 << 10))
    add_bitmap(disk, "since0")
    daemon.execute("blockdev-add", **qcow2(disk, "disk0"))
    socket = daemon.export("disk0", "guest", "guest", writable=True)
    guest = Guest(uri(socket, "guest"), content, seed=1)

    daemon.export("disk0", "backup", "backup", writable=False)
    previous = tmp_path / "backup0.qcow2"
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(socket, "backup"), previous)
    daemon.execute("block-export-del", id="backup")
    mirror = tmp_path / "mirror.raw"
    mirror.write_bytes(content)

    touched: set[int] = set()
    for cycle in (1, 2, 3):
        touched |= guest.work()
        overlay = create(tmp_path / f"disk{cycle}.qcow2", str(SIZE))
        add_bitmap(overlay, f"since{cycle}")
        frozen, active, bitmap = f"disk{cycle - 1}", f"disk{cycle}", f"since{cycle - 1}"
        daemon.execute("blockdev-add", **qcow2(overlay, active))
        daemon.execute("blockdev-snapshot", node=frozen, overlay=active)
        expected = bytes(guest.content)
        daemon.export(frozen, "backup", "backup", writable=False, bitmaps=[bitmap])
        later = guest.work()  # nothing of this is in the backup

        ranges = dirty_ranges(socket, "backup", bitmap)
        assert granules(ranges) == touched
        backup = tmp_path / f"backup{cycle}.qcow2"
        pull(socket, "backup", ranges, backup, previous)
        peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", backup, uri(socket, "backup"))
        peers.libnbd_script(COPY, uri(socket, "backup"), mirror, *(f"{offset}+{length}" for offset, length in ranges))
        assert mirror.read_bytes() == expected
        daemon.execute("block-export-del", id="backup")
        previous, touched = backup, later

    restored = tmp_path / "restored.raw"
    peers.run("qemu-img", "convert", "-O", "raw", previous, restored)
    assert restored.read_bytes() == expected
