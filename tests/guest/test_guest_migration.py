"""A guest that works with its vhost-user disk is migrated while it runs, from one export of the image to another.

What the back end writes to the guest's memory has to be in the dirty log, or the guest goes on with pages as they were
before it read something to them. (Its rings are sent by QEMU in any case.)
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import time
from pathlib import Path

import initramfs
import pytest
from guest_server import Server
from linux_guest import kernel, modules

from peers import KERNEL, peer, requires

pytestmark = [requires(KERNEL, "qemu-system-x86_64"), pytest.mark.timeout(300)]
PATIENCE = 90.0
MEMORY = "256M"
KERNEL_OPTIONS = "console=ttyS0 quiet mitigations=off nokaslr init_on_alloc=0"
"""A page that is filled by the disk must not be dirty already because the kernel has zeroed it."""
INIT = """\
#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
for module in {modules}; do insmod /modules/$module; done
mount -t devtmpfs devtmpfs dev
mkdir proc files
mount -t proc proc proc
mount -t tmpfs files files
content() {{ dd if=/dev/vda bs=64k count=64 2>/dev/null | md5sum; }}
expected=$(content)
round=0
while true; do
    # Other pages of memory are read to each time, which stay there for a while.
    dd if=/dev/urandom of=/files/filler bs=1M count=$((round % 3 + 1))
    echo 3 >/proc/sys/vm/drop_caches
    for look in 1 2 3 4 5; do
        test "$(content)" = "$expected" || echo "ANOTHER" >/dev/ttyS0
    done
    dd if=/files/filler of=/dev/vda bs=64k count=16 seek=$((64 + round % 50 * 16)) conv=fsync
    round=$((round + 1))
    echo "ROUND $round" >/dev/ttyS0
done 2>/dev/null
"""


class Machine:
    """A virtual machine whose disk is this export, and which says on its console what it finds."""

    def __init__(self, directory: Path, sockets: Path, name: str, *more: str) -> None:
        self._console = directory / f"console-{name}"
        self._console.touch()
        self._qmp = sockets / f"qmp-{name}"
        image = directory / "initramfs"
        if not image.exists():
            image.write_bytes(initramfs.build(modules(), load=["virtio_blk"], init=INIT))
        command = [
            *(*peer("setpriv"), "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=single"),
            *("-machine", "q35,memory-backend=memory", "-m", MEMORY, "-nodefaults", "-no-user-config"),
            *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on", "-display", "none"),
            *(*kernel(image), "-append", KERNEL_OPTIONS),
            *("-serial", f"file:{self._console}", "-qmp", f"unix:{self._qmp},server=on,wait=off"),
            *("-chardev", f"socket,id=disk,path={sockets / name}", "-device", "vhost-user-blk-pci,chardev=disk"),
        ]
        self.process = subprocess.Popen([*command, *more], stdin=subprocess.DEVNULL)

    @property
    def rounds(self) -> int:
        """How often it has read, looked again, and written."""
        said = self._console.read_text(errors="replace")
        assert "ANOTHER" not in said, "the guest finds something else than it read"
        return said.count("ROUND")

    def until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, "QEMU has ended"
            assert time.monotonic() < deadline, self._console.read_text(errors="replace")[-2000:]
            time.sleep(0.1)

    def execute(self, command: str, **arguments: object) -> dict:
        self.until(self._qmp.exists)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock, sock.makefile("rw") as lines:
            sock.connect(str(self._qmp))
            lines.readline()
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "event" in answer, answer
        return answer["return"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_guest_moves_while_it_works(tmp_path, sockets):
    disk = tmp_path / "disk"
    disk.write_bytes(random.Random(1).randbytes(4 << 20) + bytes(64 << 20))
    options = ["--blockdev", f"file,node-name=disk,filename={disk}"]
    for name in ("here", "there"):
        export = f"vhost-user-blk,id={name},node-name=disk,addr.type=unix,addr.path={sockets / name},writable=on"
        options += ["--export", export]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Server(tmp_path, *options))
        here = Machine(tmp_path, sockets, "here")
        stack.callback(here.kill)
        here.until(lambda: here.rounds >= 2)
        where = f"unix:{sockets / 'migration'}"
        there = Machine(tmp_path, sockets, "there", "-incoming", where)
        stack.callback(there.kill)
        there.until((sockets / "migration").exists)
        here.execute("migrate-set-parameters", **{"max-bandwidth": 200 << 20})
        here.execute("migrate", uri=where)
        here.until(lambda: here.execute("query-migrate").get("status") == "completed")
        assert here.execute("query-migrate")["ram"]["dirty-sync-count"] > 1
        there.until(lambda: there.rounds >= 3)
        here.kill()
        assert "violation" not in (tmp_path / "server.log").read_text()
