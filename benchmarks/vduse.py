"""Random reads of a VDUSE device, blkferry beside qemu-storage-daemon, in one emulated guest.

    .venv/bin/python benchmarks/vduse.py [ROUNDS]

Both daemons run all the time, and take turns. Needs the peers root (`make peers`). An emulated machine is twenty times
slower than this one, and Python suffers more from that than C does: only the ratios mean something, and they flatter C.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/guest")]

from linux_guest import Guest  # noqa: E402 - it is found there only now

DEPTHS = (1, 32)
SECONDS = 3
OPTIONS = "--blockdev file,node-name=disk,filename=/run/{0}.raw --export vduse-blk,id=e,node-name=disk,name={0}"
READ = f"""\
before=$(cut -d' ' -f14,15 /proc/$(cat /run/$1.pid)/stat | tr ' ' +)
fio --name=read --filename=$2 --rw=randread --bs=4k --iodepth=$3 --ioengine=libaio --direct=1 --time_based \\
    --runtime={SECONDS} --minimal >/run/fio
after=$(cut -d' ' -f14,15 /proc/$(cat /run/$1.pid)/stat | tr ' ' +)
echo $(cut -d';' -f8 /run/fio) $((($after) - ($before)))
"""


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        guest = Guest(Path(directory))
        try:
            devices = start(guest)
            for depth in DEPTHS:
                print(f"4 KiB random reads, {depth} at a time")
                measure(guest, devices, depth, rounds)
        finally:
            guest.kill()


def start(guest: Guest) -> dict[str, str]:
    """Both daemons, each with its device; returns these by the daemons' names."""
    guest.run(
        """
        modprobe -a vduse virtio_vdpa virtio_blk
        for name in blkferry qsd; do dd if=/dev/urandom of=/run/$name.raw bs=1M count=64 2>/dev/null; done
        qemu-storage-daemon """
        + OPTIONS.format("qsd")
        + " --pidfile /run/qsd.pid --daemonize"
    )
    program = ROOT / ".venv/bin/blkferry-qsd"
    guest.run(f"{program} {OPTIONS.format('blkferry')} --pidfile /run/blkferry.pid --daemonize", bare=True)
    guest.run("for name in blkferry qsd; do vdpa dev add name $name mgmtdev vduse; done; sleep 1")
    return {"blkferry": "/dev/vda", "qsd": "/dev/vdb"}


def measure(guest: Guest, devices: dict[str, str], depth: int, rounds: int) -> None:
    ratios, found = [], {}
    for number in range(rounds):
        for name in sorted(devices, reverse=bool(number % 2)):
            iops, ticks = map(int, guest.run(f"set -- {name} {devices[name]} {depth}\n{READ}").split())
            found[name] = iops
            print(f"  {name:8} {iops:6} IOPS  {ticks * 10_000 / max(iops * SECONDS, 1):6.0f} us of CPU each")
        ratios.append(found["blkferry"] / found["qsd"])
    print(f"  blkferry / qsd: {statistics.median(ratios):.2f} (of {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
