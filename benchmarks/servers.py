"""The servers that are compared: how a fair person starts each, and the life of one such process.

A command line here is what its own manual would have you write for the job: default threads, default caching, and the
same access (read-only or writable, iothread or not) for all. It knows nothing of workloads or of what is measured.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from probe import EXPORT, Probe

HERE = Path(__file__).resolve().parent
START_SECONDS = 10.0
STOP_SECONDS = 10.0


class BenchError(Exception):
    """Why something could not be measured."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a server is asked to export, and how."""

    image: Path
    socket: Path
    writable: bool = False
    direct: bool = False
    iothread: bool = False
    format: str = "raw"
    content: Path | None = None  # the raw image with the bytes that a client is to see; None where nobody knows them
    certificates: Path | None = None  # TLS is required, with these
    guest_socket: Path | None = None  # where the same disk is a vhost-user-blk export, too

    @property
    def mountpoint(self) -> Path:
        """Where servers that show a file show it."""
        return self.socket.with_name("disk")


@dataclass(frozen=True, slots=True)
class Server:
    """One way to run one program."""

    label: str
    family: str
    command: Callable[[Access], list[str]]
    note: str = ""
    is_judge: bool = True  # whether targets count against it: false where it does not do the same job
    bitmaps: int = 0  # how many dirty bitmaps are added to its disk before it is measured
    mounts: bool = True  # whether the file that it shows is another one than the image


@functools.cache
def runner() -> str | None:
    """The script that runs programs of the peers root, or None when there is no root."""
    tool = HERE.parent / "tools" / "peers"
    answer = subprocess.run([sys.executable, tool, "runner"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


@functools.cache
def peer(program: str) -> tuple[str, ...]:
    """The start of a command line that runs a peer: from the peers root when there is one, else from PATH."""
    if prefix := runner():
        return prefix, program
    found = shutil.which(program)
    if found is None:
        raise BenchError(f"{program} is not on PATH and there is no peers root (`make peers` makes it)")
    return (found,)


def ours(program: str) -> str:
    """A program of blkferry, from the environment that runs the benchmark."""
    return str(Path(sys.executable).with_name(program))


def qsd_options(access: Access, *, aio: str = "") -> list[str]:
    """The options that QSD and blkferry-qsd share: being the same is the point."""
    image = str(access.image).replace(",", ",,")
    is_raw = access.format == "raw"
    blockdev = f"driver=file,node-name={'disk' if is_raw else 'file'},filename={image}"
    blockdev += f",read-only={'off' if access.writable else 'on'}"
    export = f"type=nbd,id=export,node-name=disk,name={EXPORT},writable={'on' if access.writable else 'off'}"
    options = []
    if access.direct:
        blockdev += ",cache.direct=on"
    if aio:
        blockdev += f",aio={aio}"
    if access.iothread:
        options += ["--object", "iothread,id=io1"]
        export += ",iothread=io1"
    socket = str(access.socket).replace(",", ",,")
    options += ["--blockdev", blockdev]
    if not is_raw:
        read_only = "off" if access.writable else "on"
        options += ["--blockdev", f"driver={access.format},node-name=disk,file=file,read-only={read_only}"]
    server = f"addr.type=unix,addr.path={socket}"
    if access.certificates is not None:
        options += ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={access.certificates}"]
        server += ",tls-creds=tls0"
    options += ["--nbd-server", server]
    options += ["--export", export]
    if access.guest_socket is not None:
        guest = f"type=vhost-user-blk,id=guest,node-name=disk,addr.type=unix,addr.path={access.guest_socket}"
        options += ["--export", f"{guest},writable={'on' if access.writable else 'off'}"]
    return options


def qsd(access: Access, *, aio: str = "") -> list[str]:
    return [*peer("qemu-storage-daemon"), *qsd_options(access, aio=aio)]


def blkferry(access: Access) -> list[str]:
    return [ours("blkferry-qsd"), *qsd_options(access)]


def blkferry_raw(access: Access) -> list[str]:
    """The same bytes from a raw image: what the format costs."""
    assert access.content is not None
    return blkferry(replace(access, image=access.content, format="raw"))


def monitored(access: Access, *, command: Callable[[Access], list[str]]) -> list[str]:
    """The same with a QMP monitor beside the socket."""
    path = str(monitor_of(access)).replace(",", ",,")
    return [*command(access), "--chardev", f"socket,id=qmp,path={path},server=on,wait=off", "--monitor", "qmp"]


def monitor_of(access: Access) -> Path:
    return access.socket.with_name("qmp")


def blkferry_without_ring(access: Access) -> list[str]:
    return [sys.executable, str(HERE / "refuse_io_uring.py"), *blkferry(access)]


def blkferry_serve(access: Access) -> list[str]:
    return [ours("blkferry"), "serve", "--socket", str(access.socket), "--name", EXPORT, str(access.image)]


def fuse_options(access: Access, *, passthrough: bool = False) -> list[str]:
    """The image as a file, the same for both but for what only one of them has."""
    on = "on" if access.writable else "off"
    blockdev = f"driver=file,node-name=disk,filename={access.image},read-only={'off' if access.writable else 'on'}"
    export = f"type=fuse,id=export,node-name=disk,mountpoint={access.mountpoint},writable={on}"
    if passthrough:
        export += f",passthrough=on,growable={on}"
    return ["--blockdev", blockdev, "--export", export]


def qsd_fuse(access: Access) -> list[str]:
    return [*peer("qemu-storage-daemon"), *fuse_options(access)]


def blkferry_fuse(access: Access) -> list[str]:
    return [ours("blkferry-qsd"), *fuse_options(access)]


def blkferry_passthrough(access: Access) -> list[str]:
    return [ours("blkferry-qsd"), *fuse_options(access, passthrough=True)]


def nobody(access: Access) -> list[str]:
    """A process that does nothing: the image is used as it is."""
    del access
    return ["sleep", "1000"]


def nbdkit(access: Access) -> list[str]:
    # -f only keeps it in the foreground; the number of threads (16) and the cache mode are its defaults.
    command = [*peer("nbdkit"), "-f", "-U", str(access.socket)]
    if not access.writable:
        command.append("-r")
    if access.certificates is not None:
        command += ["--tls=require", "--tls-verify-peer", f"--tls-certificates={access.certificates}"]
    command += ["file", str(access.image)]
    if access.direct:
        command.append("cache=none")
    return command


BLKFERRY = Server("blkferry", "blkferry", blkferry)
BLKFERRY_THREADS = Server("blkferry, io_uring refused", "blkferry", blkferry_without_ring)
BLKFERRY_RAW = Server(
    "blkferry, raw image", "blkferry", blkferry_raw, note="the same bytes without the format", is_judge=False
)
BLKFERRY_BITMAPS = Server("blkferry, 4 bitmaps", "blkferry", functools.partial(monitored, command=blkferry), bitmaps=4)
BLKFERRY_SERVE = Server("blkferry serve", "blkferry", blkferry_serve)
QSD = Server("QSD", "QSD", qsd)
QSD_IO_URING = replace(QSD, label="QSD aio=io_uring", command=functools.partial(qsd, aio="io_uring"))
QSD_NATIVE = replace(QSD, label="QSD aio=native", command=functools.partial(qsd, aio="native"))
QSD_BITMAPS = Server("QSD, 4 bitmaps", "QSD", functools.partial(monitored, command=qsd), is_judge=False, bitmaps=4)
BLKFERRY_FUSE = replace(BLKFERRY, command=blkferry_fuse)
BLKFERRY_PASSTHROUGH = Server("blkferry, passthrough", "blkferry", blkferry_passthrough)
QSD_FUSE = replace(QSD, command=qsd_fuse)
BARE = Server("the bare file", "bare", nobody, mounts=False)
NBDKIT = Server("nbdkit", "nbdkit", nbdkit)
NBDKIT_NOCACHE = replace(
    NBDKIT,
    label="nbdkit cache=none",
    is_judge=False,
    note="nbdkit's file plugin has no O_DIRECT: cache=none drops pages from the page cache after use, a different job",
)


@contextmanager
def running(argv: list[str], scratch: Path, *, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, with what it says kept in `scratch`/log, and end it whatever happens.

    It gets a session of its own, so a Ctrl-C at the terminal reaches this program alone, which then ends it in order.
    """
    # An installed package has its byte code beside it, so a start-up must not be one that compiles.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdin=stdin, stdout=log, stderr=log, env=environment, start_new_session=True
            )
    except OSError as failure:
        raise BenchError(f"{argv[0]} does not start: {failure.strerror}") from None
    try:
        yield process
    except BaseException:
        with suppress(BenchError):  # the first failure is the one to tell
            stop(process)
        raise
    stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and make it end when it does not."""
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{process.args!r} did not end within {STOP_SECONDS:.0f} s of SIGTERM") from None
    finally:  # a second Ctrl-C ends up here too
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def serving(server: Server, access: Access) -> Iterator[int]:
    """Run a server; yields its process id when it answers reads, rightly. Raises BenchError with what it said."""
    scratch = access.socket.parent
    access.socket.unlink(missing_ok=True)
    with running(server.command(access), scratch) as process:
        with wait_ready(server, process, access.socket, access.certificates) as probe:
            try:
                if access.content is not None:
                    probe.check(access.content)
            except OSError as failure:
                raise BenchError(f"{server.label}: {failure}; {said(scratch)}") from None
        if server.bitmaps:
            add_bitmaps(monitor_of(access), server.bitmaps)
        try:
            yield process.pid
        except BenchError:
            check_alive(server, process, scratch)  # why it ended says more than the client's complaint
            raise
        check_alive(server, process, scratch)


def add_bitmaps(monitor: Path, count: int) -> None:
    """Have so many dirty bitmaps of default granularity record what is written to the disk."""
    commands: list[tuple[str, dict[str, str]]] = [("qmp_capabilities", {})]
    commands += [("block-dirty-bitmap-add", {"node": "disk", "name": f"bitmap{number}"}) for number in range(count)]
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
        connection.settimeout(STOP_SECONDS)
        connection.connect(str(monitor))
        stream.readline()  # the greeting
        for command, arguments in commands:
            stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            stream.flush()
            if "return" not in (answer := stream.readline()):
                raise BenchError(f"{command}: {answer}")


def check_alive(server: Server, process: subprocess.Popen[bytes], scratch: Path) -> None:
    if (code := process.poll()) is not None:
        raise BenchError(f"{server.label} ended with {code} while it was measured: {said(scratch)}")


def wait_ready(
    server: Server,
    process: subprocess.Popen[bytes],
    socket: Path,
    certificates: Path | None = None,
    *,
    pause: float = 0.02,
) -> Probe:
    """The client that got the server's first answer to a read."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return Probe.read_one(socket, certificates)
        except OSError as failure:
            if (code := process.poll()) is not None:
                raise BenchError(f"{server.label} ended with {code}: {said(socket.parent)}") from None
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{server.label} answered no read within {START_SECONDS:.0f} s ({failure}): {said(socket.parent)}"
                ) from None
        time.sleep(pause)


def said(scratch: Path) -> str:
    """The end of what a server wrote."""
    text = (scratch / "log").read_text(errors="replace").strip()
    return text[-1500:] or "it said nothing"


def version(*command: str) -> str:
    """The first line that a program says about its version."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    lines = (answer.stdout or answer.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"
