"""`blkferry-qsd` as a process, next to the daemon whose command line it has."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest
from cli_process import alive, finish, program, running, wait_for

from blkferry.cli import qsd as cli
from blkferry.testing.nbd import Client
from peers import peer, requires, run

QSD = "blkferry-qsd"
REAL = "qemu-storage-daemon"


def serve_disk(path):
    """The options that serve an image on the socket `nbd` of the working directory."""
    return (
        "--blockdev", f"file,node-name=disk,filename={path},read-only=on",
        "--nbd-server", "addr.type=unix,addr.path=nbd",
        "--export", "nbd,id=e,node-name=disk",
    )  # fmt: skip


def started(server, pidfile):
    """Wait for the sign that all of it is up."""
    wait_for(lambda: (pidfile.exists() and pidfile.read_text()) or server.process.poll() is not None)
    assert server.process.poll() is None, server.process.stderr.read()


# Serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serves_until_a_signal_and_leaves_nothing(image, sockets, number):
    disk = image()
    with running(QSD, *serve_disk(disk.path), "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        assert (sockets / "pid").read_text() == f"{server.pid}\n"
        assert stat.S_IMODE((sockets / "pid").stat().st_mode) == 0o600
        with Client.connect(str(sockets / "nbd"), "disk") as client:
            assert client.read(0, 4096) == disk.expect(0, 4096)
        assert server.end(number) == (0, "", "")
    assert os.listdir(sockets) == []


def test_json_and_key_value_say_the_same(image, sockets):
    disk = image()
    options = (
        "--object", '{"qom-type": "iothread", "id": "io"}',
        "--blockdev", json.dumps({
            "driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": str(disk.path)}, "offset": 512
        }),
        "--nbd-server", '{"addr": {"type": "unix", "path": "nbd"}, "max-connections": 1}',
        "--export", '{"type": "nbd", "id": "e", "node-name": "disk", "name": "a,b", "iothread": "io"}',
    )  # fmt: skip
    with running(QSD, *options, "--pidfile=pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        with Client.connect(str(sockets / "nbd"), "a,b") as client:
            assert client.read(0, 512) == disk.expect(512, 512)
        assert server.end() == (0, "", "")
    options = ("--nbd-server", "addr.type=unix,addr.path=nbd", "--blockdev", "memory,node-name=m,size=64k")
    with running(QSD, *options, "--export=nbd,id=e,node-name=m,name=a,,b", "--pid", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        with Client.connect(str(sockets / "nbd"), "a,b") as client:
            assert client.size == 64 << 10
        assert server.end() == (0, "", "")


def monitor(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def ask(file, command):
    file.write(json.dumps({"execute": command}))
    file.flush()
    while "event" in (answer := json.loads(file.readline())):
        pass
    return answer["return"]


def test_quit_ends_it_as_a_signal_does(image, sockets):
    options = ("--chardev", "socket,id=c,path=qmp,server=on,wait=off", "--monitor", "c", *serve_disk(image().path))
    with running(QSD, *options, "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        with monitor(sockets / "qmp") as sock, sock.makefile("rw") as qmp:
            assert "QMP" in json.loads(qmp.readline())
            assert ask(qmp, "qmp_capabilities") == {}
            assert [node["node-name"] for node in ask(qmp, "query-named-block-nodes")] == ["disk"]
            assert ask(qmp, "quit") == {}
        assert server.process.wait(10) == 0
        assert server.process.stderr.read() == ""
    assert os.listdir(sockets) == []


def test_a_monitor_on_standard_input(sockets):
    with subprocess.Popen(
        [program(QSD), "--chardev", "stdio,id=c", "--monitor", "chardev=c,pretty=off"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=sockets,
    ) as server:  # fmt: skip
        said, _ = server.communicate('{"execute": "qmp_capabilities"} {"execute": "quit"}', timeout=20)
    assert server.returncode == 0
    assert [next(iter(json.loads(line))) for line in said.splitlines()] == ["QMP", "return", "return"]


def test_without_options_it_just_runs(sockets):
    with running(QSD, "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        assert server.end() == (0, "", "")


HANGING_START = """
import asyncio, time
from blkferry.daemon.run import run
from blkferry.schema.sockets import SocketAddressUnix

async def fill(daemon):
    await daemon.start_nbd_server(SocketAddressUnix(path="nbd"))
    await asyncio.to_thread(time.sleep, 600)  # as a look-up does whose name server is silent

run(fill, pidfile="pid")
raise SystemExit("it went on")
"""


def test_a_signal_during_the_start_ends_it_at_once(sockets):
    with subprocess.Popen([sys.executable, "-c", HANGING_START], cwd=sockets) as server:
        try:
            wait_for((sockets / "nbd").exists)
            server.terminate()
            assert server.wait(10) == 0
        finally:
            server.kill()
    assert os.listdir(sockets) == []


# The PID file and the background ---------------------------------------------------------------------------------


def test_a_second_instance_is_refused(sockets):
    with running(QSD, "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        second = finish(QSD, "--nbd-server", "addr.type=unix,addr.path=nbd", "--pidfile", "pid", cwd=sockets)
        assert second.returncode == 1
        assert second.stderr.splitlines()[0] == (
            f"{QSD}: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"
        )
        assert (sockets / "pid").read_text() == f"{server.pid}\n"
        assert os.listdir(sockets) == ["pid"]
        assert server.end()[0] == 0
    assert os.listdir(sockets) == []


def test_a_pidfile_left_over_by_a_crash_is_taken_over(sockets):
    (sockets / "pid").write_text("999999999\n")
    with running(QSD, "--pidfile", "pid", cwd=sockets) as server:
        wait_for(lambda: (sockets / "pid").read_text() == f"{server.pid}\n")
        assert server.end()[0] == 0
    assert os.listdir(sockets) == []


def test_a_pidfile_of_somebody_else_is_left(sockets):
    with running(QSD, "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        (sockets / "pid").rename(sockets / "old")
        (sockets / "pid").write_text("1\n")
        assert server.end()[0] == 0
    assert (sockets / "pid").read_text() == "1\n"


def test_daemonize_returns_when_all_is_up(image, sockets):
    disk = image()
    disk.path.rename(sockets / "disk")
    said = finish(QSD, *serve_disk("disk"), "--pidfile", "pid", "--daemonize", cwd=sockets)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    pid = int((sockets / "pid").read_text())
    try:
        with Client.connect(str(sockets / "nbd"), "disk") as client:
            assert client.read(0, 512) == disk.expect(0, 512)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {os.devnull}
        assert os.getsid(pid) not in (pid, os.getsid(0))
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not (sockets / "pid").exists())
    assert os.listdir(sockets) == ["disk"]
    wait_for(lambda: not alive(pid) or process_state(pid) == "Z")


def process_state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_daemonize_tells_what_is_wrong(sockets):
    said = finish(QSD, "--daemonize", "--pidfile", "pid", *serve_disk("nowhere"), cwd=sockets)
    assert said.returncode == 1
    assert "Could not open 'nowhere': No such file or directory" in said.stderr
    assert os.listdir(sockets) == []


# Errors and help -------------------------------------------------------------------------------------------------

WRONG = [
    ["foo"],
    ["--foo"],
    ["-x"],
    ["--blockdev"],
    ["--he=3"],
    ["--blockdev", "bad"],
    ["--blockdev", "null-co,node-name=a", "--export=nbd,id=a,node-name=a"],
    ["--blockdev", "null-co,node-name=1x"],
    ["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
    ["--blockdev", "null-co,node-name=a,foo=1"],
    ["--blockdev", "null-co,node-name=a,read-only"],
    ["--blockdev", "null-co,node-name=a,read-only=maybe"],
    ["--blockdev", "file,node-name=a,filename=nowhere"],
    ["--blockdev", '{"driver": "null-co", "node-name": 1}'],
    ["--monitor", "nope"],
    ["--chardev", "null,id=x", "--monitor", "x,mode=readline"],
    ["--object", "nope,id=a"],
    ["--object", "iothread,id=1"],
    ["--nbd-server", "addr.type=unix"],
    ["--nbd-server", "addr.type=unix,addr.path=a", "--nbd-server", "addr.type=unix,addr.path=b"],
    ["--pidfile", "nowhere/pid"],
    ["-T", "foo", "--bogus"],
    ["--export", "nbd,id=e,node-name=disk"],
]


@requires(REAL)
@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_errors_are_those_of_the_real_daemon(argv, sockets):
    ours = finish(QSD, *argv, cwd=sockets)
    assert os.listdir(sockets) == []
    theirs = subprocess.run([*peer(REAL), *argv], capture_output=True, text=True, cwd=sockets, timeout=20, check=False)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "")
    assert ours.stderr.splitlines()[0].removeprefix(QSD) == theirs.stderr.splitlines()[0].removeprefix(REAL)


def test_the_first_error_ends_the_start_and_cleans_up(image, sockets):
    options = (*serve_disk(image().path), "--chardev", "socket,id=c,path=qmp,server=on", "--monitor", "c")
    said = finish(QSD, *options, "--export", "nbd,id=e,node-name=disk", "--blockdev", "bad", cwd=sockets)
    assert said.returncode == 1
    assert said.stderr.startswith(f"{QSD}: --export nbd,id=e,node-name=disk: Block export id 'e' is already in use\n")
    assert "bad" not in said.stderr
    assert os.listdir(sockets) == []


def test_a_name_must_be_defined_before_it_is_used(image, sockets):
    blockdev, server, export = (serve_disk(image().path)[i : i + 2] for i in (0, 2, 4))
    said = finish(QSD, *server, *export, *blockdev, cwd=sockets)
    assert said.returncode == 1
    assert said.stderr.startswith(f"{QSD}: --export nbd,id=e,node-name=disk: ")


def test_trace_is_ignored_aloud(sockets):
    with running(QSD, "-T", "nbd_*", "--pidfile", "pid", cwd=sockets) as server:
        started(server, sockets / "pid")
        code, _, complaints = server.end()
    assert (code, complaints) == (0, f"{QSD}: warning: --trace is ignored, since blkferry has no trace events\n")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "--nbd-server"),
        (["-h"], "--nbd-server"),
        (["-V"], "blkferry-qsd version"),
        (["--blockdev", "help"], "driver=file"),
        (["--blockdev", "?"], "driver=file"),
        (["--blockdev", "file,help"], "filename="),
        (["--blockdev", "driver=memory,help"], "size="),
        (["--export", "help"], "type=nbd"),
        (["--export", "nbd,help"], "name="),
        (["--object", "help"], "qom-type=iothread"),
        (["--object", "iothread,help"], "poll-max-ns="),
        (["--nbd-server", "help"], "addr.path="),
        (["--chardev", "help"], "backend=socket"),
        (["--chardev", "socket,help"], "server="),
        (["--monitor", "help"], "pretty="),
        (["--trace", "help"], "no trace events"),
        (["--daemonize", "--blockdev", "help"], "driver=file"),
    ],
)
def test_help_for_every_option(argv, text, sockets):
    said = finish(QSD, *argv, "--pidfile", "pid", cwd=sockets)
    assert (said.returncode, said.stderr) == (0, "")
    assert text in said.stdout
    assert os.listdir(sockets) == []


def test_help_comes_after_the_errors_before_it(sockets):
    said = finish(QSD, "--blockdev", "bad", "--object", "help", cwd=sockets)
    assert (said.returncode, said.stdout) == (1, "")
    assert finish(QSD, "--blockdev", "bad", "--help", cwd=sockets).stdout == cli.USAGE


# Clients ---------------------------------------------------------------------------------------------------------


@requires(REAL, "nbdinfo", "qemu-img")
def test_both_serve_the_same_bytes_from_the_same_options(image, sockets, tmp_path):
    disk = image()
    copies = []
    for command in ([program(QSD)], peer(REAL)):
        with subprocess.Popen([*command, *serve_disk(disk.path), "--pidfile", "pid"], cwd=sockets) as server:
            wait_for(lambda: (sockets / "pid").exists() and (sockets / "pid").read_text())
            uri = f"nbd+unix:///disk?socket={sockets}/nbd"
            (export,) = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"]
            run("qemu-img", "convert", "-O", "raw", uri, tmp_path / "copy")
            copies.append((export["export-size"], export["is_read_only"], (tmp_path / "copy").read_bytes()))
            server.terminate()
            assert server.wait(20) == 0
            (sockets / "nbd").unlink(missing_ok=True)  # the real daemon leaves it when its path is relative
    assert copies[0] == copies[1] == (disk.size, True, disk.path.read_bytes())
