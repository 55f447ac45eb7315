"""The measures: a workload's rate, latency and server CPU; what idling costs; how long the first byte takes.

CPU is utime + stime of /proc/PID/stat: all threads of the server's process, those that ended included, and the kernel's
io_uring workers, which are threads of the process that submits. What the kernel does elsewhere on a server's behalf
(interrupts, write-back by kworkers) is charged to none of the servers.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import certificates
from images import SIZE, Image, content, settle
from mounted import showing
from probe import EXPORT, Probe
from servers import BLKFERRY_RAW, STOP_SECONDS, Access, BenchError, Server, peer, running, serving, wait_ready
from workloads import Row

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
FIO_GRACE = 30.0  # to start, to connect, and to write its answer
NOBODY = 65534
TRIAL_BYTES = 16 << 20
SETTLE_SECONDS = 1.0  # an idle server may still poll for a moment after its last request


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one workload against one server."""

    iops: float
    p50_us: float
    p99_us: float
    cpu_us: float  # per request


@dataclass(frozen=True, slots=True)
class Idle:
    """What a server with one silent client used up."""

    seconds: float
    ticks: int
    cpu_us: float
    wakeups: int


def cpu_ticks(pid: int) -> int:
    """User and system time of a process and all threads it ever had."""
    # The command's name stands in parentheses and may hold anything, so count from its end.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def thread_totals(pid: int) -> tuple[int, int]:
    """CPU time in ns and voluntary switches of the threads that live now: finer than ticks, for short looks."""
    nanoseconds = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        switches += int(status["voluntary_ctxt_switches"])
    return nanoseconds, switches


def fio(row: Row, target: Path, seconds: float) -> dict[str, object]:
    """Run the client to its end; the answer is fio's own account of the (one, grouped) job.

    `target` is a socket, or a file where the row's engine wants one. libnbd takes no credentials from fio. It looks for
    them in the home directory of whoever is not root.
    """
    command = [
        *(_as_nobody("fio") if row.tls and not os.geteuid() else peer("fio")),
        f"--name={row.name}",
        f"--ioengine={row.engine}",
        *_where(row, target),
        f"--rw={row.pattern}",
        f"--bs={row.block_size}",
        f"--iodepth={row.depth}",
        f"--numjobs={row.connections}",
        f"--size={SIZE}",
        f"--runtime={max(1, round(seconds * 1000))}ms",
        "--thread",
        "--group_reporting",
        "--output-format=json",
    ]
    command += [f"--io_size={row.most_bytes}"] if row.most_bytes else ["--time_based", "--norandommap"]
    environment = os.environ | {"HOME": str(target.parent)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=environment
    )
    try:
        output, errors = process.communicate(timeout=seconds + FIO_GRACE)
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio did not end within {seconds + FIO_GRACE:.0f} s") from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=STOP_SECONDS)
    text = output.decode(errors="replace")
    if process.returncode != 0 or "{" not in text:
        heard = (errors.decode(errors="replace") + text.partition("{")[0]).strip()
        raise BenchError(f"fio ended with {process.returncode}: {heard[-1500:]}")
    job: dict[str, object] = json.loads(text[text.index("{") :])["jobs"][0]
    return job


def _where(row: Row, target: Path) -> list[str]:
    if row.engine == "nbd":
        return [f"--uri=nbd{'s' if row.tls else ''}+unix:///{EXPORT}?socket={quote(str(target))}"]
    return [f"--filename={target}", f"--direct={0 if row.buffered else 1}", "--invalidate=0"]


def _as_nobody(program: str) -> list[str]:
    return [*peer("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", program]


def credentials(scratch: Path) -> Path:
    """Certificates for the TLS rows, where libnbd looks for them; made once for a run."""
    directory = scratch / ".pki" / "libnbd"
    if not directory.exists():
        certificates.make(directory)
        for path in (scratch, *directory.parents[:2], directory, *directory.iterdir()):
            path.chmod(0o755)
    return directory


def guest(row: Row, socket: Path, requests: int) -> float:
    """Seconds that QEMU's own virtio-blk driver (libblkio) takes for so many requests."""
    command = [*peer("qemu-img"), "bench", "-c", str(requests), "-d", str(row.depth), "-s", str(row.block_size)]
    command += ["-w", "--pattern=165"] if row.is_write else []  # zeroes would make later copies sparse
    command += ["--image-opts", f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FIO_GRACE * 2)
    except subprocess.TimeoutExpired:
        raise BenchError(f"qemu-img did not end within {FIO_GRACE * 2:.0f} s") from None
    found = re.search(r"Run completed in ([0-9.]+) seconds", ran.stdout)
    if ran.returncode or found is None:
        raise BenchError(f"qemu-img ended with {ran.returncode}: {(ran.stderr + ran.stdout).strip()[-1500:]}")
    return float(found[1])


def run_guest(row: Row, server: Server, access: Access, seconds: float) -> Sample:
    """A workload over vhost-user. qemu-img counts requests, not seconds, and knows no percentiles."""
    assert access.guest_socket is not None
    with serving(server, access) as pid:
        settle(access.image, row.cache)
        trial = TRIAL_BYTES // row.block_size
        requests = max(trial, round(seconds * trial / guest(row, access.guest_socket, trial)))
        before = cpu_ticks(pid)
        taken = guest(row, access.guest_socket, requests)
        ticks = cpu_ticks(pid) - before
    return Sample(requests / taken, math.nan, math.nan, ticks * TICK_SECONDS * 1e6 / requests)


def run_workload(row: Row, server: Server, image: Path, scratch: Path, seconds: float) -> Sample:
    access = Access(
        image,
        scratch / "sock",
        writable=row.is_write,
        direct=row.direct,
        iothread=row.iothread,
        format=row.image.format,
        content=None if row.image is Image.QCOW2_FRESH else content(image),
        certificates=credentials(scratch) if row.tls else None,
        guest_socket=scratch / "guest" if row.vhost_user else None,
    )
    if row.vhost_user:
        return run_guest(row, server, access, seconds)
    with _started(row, server, access) as (pid, target):
        settle(access.content if server is BLKFERRY_RAW and access.content else image, row.cache)
        if row.tls:
            access.socket.chmod(0o777)
        before = cpu_ticks(pid)
        job = fio(row, target, seconds)
        ticks = cpu_ticks(pid) - before
    account = job["write" if row.is_write else "read"]
    assert isinstance(account, dict)
    requests = account["total_ios"]
    if job.get("error") or not requests:
        raise BenchError(f"fio reported error {job.get('error')} after {requests} requests")
    percentiles = account["clat_ns"]["percentile"]
    return Sample(
        iops=float(account["iops"]),
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        cpu_us=ticks * TICK_SECONDS * 1e6 / requests,
    )


@contextmanager
def _started(row: Row, server: Server, access: Access) -> Iterator[tuple[int, Path]]:
    if row.engine != "nbd":
        with showing(server, access) as (pid, path):
            yield pid, path
        return
    with serving(server, access) as pid:
        yield pid, access.socket


def measure_idle(server: Server, image: Path, scratch: Path, seconds: float) -> Idle:
    access = Access(image, scratch / "sock", content=image)
    with serving(server, access) as pid, Probe.read_one(access.socket):
        time.sleep(SETTLE_SECONDS)
        ticks, (nanoseconds, switches) = cpu_ticks(pid), thread_totals(pid)
        time.sleep(seconds)
        ticks_after, (nanoseconds_after, switches_after) = cpu_ticks(pid), thread_totals(pid)
    return Idle(
        seconds=seconds,
        ticks=ticks_after - ticks,
        cpu_us=(nanoseconds_after - nanoseconds) / 1000,
        wakeups=switches_after - switches,
    )


def first_byte(server: Server, image: Path, scratch: Path) -> float:
    """Seconds from exec to the first answered read.

    A shell stands where the server will be, in its mount namespace if it has one, and execs it on our word: what it
    takes to enter the peers root is nobody's start-up time. We try to connect every half millisecond.
    """
    access = Access(image, scratch / "sock", content=image)
    access.socket.unlink(missing_ok=True)
    argv = server.command(access)
    prefix = list(peer("sh")) if argv[0] == peer("sh")[0] else ["/bin/sh"]
    waiting = [*prefix, "-c", 'echo waiting; read -r go && exec "$@" </dev/null', "sh"]
    waiting += argv[1:] if len(prefix) > 1 else argv
    with running(waiting, scratch, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + STOP_SECONDS
        while b"waiting" not in (scratch / "log").read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"a shell to start {server.label} from did not start")
            time.sleep(0.005)
        assert process.stdin is not None
        start = time.perf_counter()
        process.stdin.write(b"\n")
        process.stdin.flush()
        probe = wait_ready(server, process, access.socket, pause=0.0005)
        taken = time.perf_counter() - start
        probe.close()
    return taken
