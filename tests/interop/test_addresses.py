"""Clients that nobody here wrote, over every kind of address that a kernel without guests has."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from cli_process import PATIENCE, Running, finish, program, running, wait_for

from peers import LIBNBD, libnbd_script, requires, run

QSD = "blkferry-qsd"
DISK = ("--blockdev", "memory,node-name=m,size=1M", "--export", "nbd,id=e,node-name=m")

pytestmark = requires("nbdinfo", LIBNBD)

ACTIVATE = """
import os, sys
count, names, *command = sys.argv[1:]
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(command[0], command)
"""


@contextlib.contextmanager
def activated(sockets, names, name, *argv):
    """Start a program as systemd would: with sockets from descriptor 3 on."""
    command = [sys.executable, "-c", ACTIVATE, str(len(sockets)), names, program(name), *map(str, argv)]

    def place():
        high = [os.dup2(sock.fileno(), 100 + number) for number, sock in enumerate(sockets)]
        for number, fd in enumerate(high):
            os.dup2(fd, 3 + number)

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=place,  # noqa: PLW1509 - no other thread is about
        close_fds=True,
        pass_fds=range(3, 3 + len(sockets)),
    )
    with process:
        try:
            yield Running(process)
        finally:
            process.kill()


def listener(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def size(uri):
    return int(run("nbdinfo", "--size", uri).stdout)


def served(address):
    return "--nbd-server", ",".join(f"addr.{key}={value}" for key, value in address.items())


# -- addresses


def test_a_port_of_a_range(sockets):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address = {"type": "inet", "host": "localhost", "port": port, "to": min(port + 20, 65535), "ipv4": "on"}
        with running(QSD, *served(address | {"keep-alive": "on"}), *DISK, "--pidfile", "pid", cwd=sockets) as server:
            wait_for((sockets / "pid").exists)
            found = [other for other in range(port + 1, port + 21) if answers(other)]
            assert found
            assert size(f"nbd://127.0.0.1:{found[0]}/m") == 1 << 20
            assert server.end()[0] == 0


def answers(port):
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", port)):
            return False
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            return sock.recv(8) == b"NBDMAGIC"
        return False


@pytest.mark.parametrize("tight", ["on", "off"])
def test_an_abstract_name(sockets, tight):
    name = f"blkferry-test-{os.getpid()}"
    address = {"type": "unix", "path": name, "abstract": "on", "tight": tight}
    script = f"""
    import socket, sys, nbd
    name = b"\\0" + sys.argv[1].encode()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(name if {tight == "on"} else name.ljust(108, b"\\0"))
    h = nbd.NBD()
    h.set_export_name("m")
    h.connect_socket(sock.detach())
    print(h.get_size())
    """
    with running(QSD, *served(address), *DISK, "--pidfile", "pid", cwd=sockets):
        wait_for((sockets / "pid").exists)
        assert libnbd_script(script, name).stdout == "1048576\n"


def test_an_inherited_number(sockets):
    with (
        listener(sockets / "nbd") as sock,
        activated([sock], "", QSD, *served({"type": "fd", "str": 3}), *DISK, "--pidfile", sockets / "pid"),
    ):
        wait_for((sockets / "pid").exists)
        assert size(f"nbd+unix:///m?socket={sockets}/nbd") == 1 << 20


BAD = [
    ("type=inet,addr.host=127.0.0.1,addr.port=0,addr.ipv4=off,addr.ipv6=off", "Cannot disable IPv4 and IPv6"),
    ("type=vsock,addr.cid=x,addr.port=1", "Failed to parse cid 'x'"),
    ("type=vsock,addr.cid=2,addr.port=99999999999", "Failed to parse port '99999999999'"),
    ("type=fd,addr.str=abc", "Unable to parse FD number abc"),
    ("type=fd,addr.str=57", "File descriptor '57' is not a socket"),
    ("type=unix,addr.path=/nonexistent/s", "Failed to bind socket to /nonexistent/s: No such file or directory"),
    (f"type=unix,addr.path=/{'x' * 108}", f"UNIX socket path '/{'x' * 108}' is too long"),
    ("type=foo", "Parameter 'type' does not accept value 'foo'"),
    ("type=unix", "Parameter 'addr.path' is missing"),
]


@requires("qemu-storage-daemon")
@pytest.mark.parametrize(("address", "message"), BAD)
def test_bad_addresses_are_refused_in_qemus_words(address, message):
    theirs = run("qemu-storage-daemon", "--nbd-server", f"addr.{address}", expect=1)
    assert message in theirs.stderr
    ours = finish(QSD, "--nbd-server", f"addr.{address}")
    assert ours.returncode == 1
    assert message in ours.stderr


@requires("qemu-storage-daemon")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("path=/nonexistent/s", "Failed to connect to '/nonexistent/s': No such file or directory"),
        ("path=/nonexistent/s,wait=on", "'wait' option is incompatible with socket in client connect mode"),
        ("path=/nonexistent/s,server=on", "Failed to bind socket to /nonexistent/s: No such file or directory"),
        ("fd=57", "File descriptor '57' is not a socket"),
        ("host=127.0.0.1,port=nosuch", "address resolution failed for 127.0.0.1:nosuch: Servname not supported"),
    ],
)
def test_bad_chardevs_are_refused_in_qemus_words(options, message):
    argv = ("--chardev", f"socket,id=c,{options}")
    assert message in run("qemu-storage-daemon", *argv, expect=1).stderr
    ours = finish(QSD, *argv)
    assert ours.returncode == 1
    assert message in ours.stderr


# -- activation


def test_serve_listens_on_what_it_is_passed(sockets):
    """Two sockets of one unit, and nothing said about them."""
    with listener(sockets / "one") as one, listener(sockets / "two") as two:
        with activated([one, two], "disk.socket:disk.socket", "blkferry", "serve", "-q", "memory:1M") as server:
            uris = [f"nbd+unix:///memory?socket={sockets}/{name}" for name in ("one", "two")]
            assert [server.line().strip() for _ in uris] == uris
            assert [size(uri) for uri in uris] == [1 << 20] * 2
            code, _, complaints = server.end()
            assert (code, complaints) == (0, "")
        assert sorted(os.listdir(sockets)) == ["one", "two"]  # systemd goes on listening there


def test_serve_asks_which(sockets):
    with listener(sockets / "one") as one, listener(sockets / "two") as two:
        with activated([one, two], "a:b", "blkferry", "serve", "memory:1M") as server:
            said = server.process.communicate(timeout=PATIENCE)[1]
            assert said == "blkferry: There are sockets of 2 names to listen on\nChoose with --fd: a, b.\n"
        with activated([one, two], "a:b", "blkferry", "serve", "-q", "--fd", "b", "memory:1M") as server:
            assert server.line() == f"nbd+unix:///memory?socket={sockets}/two\n"
            assert server.end()[0] == 0


def test_an_address_that_is_given_goes_first(sockets):
    with (
        listener(sockets / "passed") as passed,
        activated([passed], "a", "blkferry", "serve", "-q", "-s", sockets / "own", "memory:1M") as server,
    ):
        assert server.line() == f"nbd+unix:///memory?socket={sockets}/own\n"


def test_names_are_for_the_nbd_server_and_for_monitors(sockets):
    with listener(sockets / "nbd") as nbd, listener(sockets / "qmp") as qmp:
        argv = (
            *served({"type": "fd", "str": "disks"}),
            *DISK,
            *("--chardev", "socket,id=c,fd=control,server=on", "--monitor", "c", "--pidfile", sockets / "pid"),
        )
        with activated([nbd, qmp], "disks:control", QSD, *argv) as server:
            wait_for((sockets / "pid").exists)
            assert size(f"nbd+unix:///m?socket={sockets}/nbd") == 1 << 20
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(sockets / "qmp"))
                assert client.makefile().readline().startswith('{"QMP"')
            assert server.end()[0] == 0


def test_a_name_that_was_not_passed(sockets):
    with (
        listener(sockets / "nbd") as nbd,
        activated([nbd], "disks", QSD, *served({"type": "fd", "str": "disk"})) as server,
    ):
        said = server.process.communicate(timeout=PATIENCE)[1]
        assert "Unable to parse FD number disk" in said
        assert "known names are disks" in said
