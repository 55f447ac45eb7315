"""Descriptors that the client of a monitor passes: by QEMU's own client, and by one that misbehaves."""

import array
import asyncio
import contextlib
import json
import os
import socket

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blkferry import Daemon
from blkferry.daemon.channel import MAX_FDS
from blkferry.daemon.chardev import SocketChardev
from blkferry.daemon.monitor import Monitor
from blkferry.schema.sockets import SocketAddressUnix
from blkferry.sockets import descriptors
from blkferry.sockets.descriptors import MAX_NAMED, Descriptors
from blkferry.testing.nbd import Client


@contextlib.asynccontextmanager
async def listening(path):
    async with Daemon() as daemon:
        monitor = Monitor(SocketChardev("qmp", SocketAddressUnix(path=path)), daemon)
        await monitor.start()
        daemon.monitors.append(monitor)
        yield daemon


@contextlib.asynccontextmanager
async def controlled(path):
    client = QMPClient("test")
    await client.connect(path)
    try:
        yield client
    finally:
        await client.disconnect()


@pytest.fixture
def path(sockets):
    return str(sockets / "qmp")


async def refused(client, command, **arguments):
    with pytest.raises(ExecuteError) as caught:
        await client.execute(command, arguments)
    return str(caught.value)


def listener(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


async def ended(end):
    """Wait until nobody has the other end of a socket pair."""
    end.setblocking(False)
    async with asyncio.timeout(10):
        assert await asyncio.get_running_loop().sock_recv(end, 1) == b""


async def pass_one(client, name):
    """Pass one end of a socket pair and return the other."""
    ours, theirs = socket.socketpair()
    with theirs:
        client.send_fd_scm(theirs.fileno())
    await client.execute("getfd", {"fdname": name})
    return ours


async def test_an_nbd_server_on_a_passed_socket(path, sockets):
    async with listening(path), controlled(path) as client:
        with listener(sockets / "nbd") as sock:
            client.send_fd_scm(sock.fileno())
        await client.execute("getfd", {"fdname": "listener"})
        await client.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "listener"}}})
        await client.execute("blockdev-add", {"driver": "memory", "node-name": "m", "size": 1 << 20})
        await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "m"})
        nbd = await asyncio.to_thread(Client.connect, str(sockets / "nbd"), "m")
        await asyncio.to_thread(nbd.close)
        await client.execute("nbd-server-stop")
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(sockets / "nbd"))
        assert "named 'listener' has not been found" in await refused(
            client, "nbd-server-start", addr={"type": "fd", "data": {"str": "listener"}}
        )


async def test_a_monitor_on_a_passed_socket(path, sockets):
    async with listening(path) as daemon, controlled(path) as client:
        with listener(sockets / "other") as sock:
            client.send_fd_scm(sock.fileno())
        await client.execute("getfd", {"fdname": "m"})
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "m"}}, "server": True}}
        await client.execute("chardev-add", {"id": "c", "backend": backend})
        await daemon.chardevs["c"].start()
        assert {"label": "c", "filename": f"disconnected:unix:{sockets}/other,server=on", "frontend-open": False} in (
            await client.execute("query-chardev")
        )


async def test_what_qemu_refuses(path):
    async with listening(path), controlled(path) as client:
        assert await refused(client, "getfd", fdname="x") == "No file descriptor supplied via SCM_RIGHTS"
        assert await refused(client, "closefd", fdname="x") == "File descriptor named 'x' not found"
        expectation = "Parameter 'fdname' expects a name not starting with a digit"
        for name in ("", "3", "3x"):
            assert await refused(client, "getfd", fdname=name) == expectation


async def test_a_client_may_not_take_the_daemons_own_descriptors(path):
    async with listening(path) as daemon, controlled(path) as client:
        own = daemon.monitors[0]._chardev._listener.sockets[0].fileno()
        address = {"type": "fd", "data": {"str": str(own)}}
        assert await refused(client, "nbd-server-start", addr=address) == (
            f"File descriptor named '{own}' has not been found"
        )


async def test_a_name_is_given_anew_and_closed(path):
    async with listening(path), controlled(path) as client:
        first = await pass_one(client, "x")
        second = await pass_one(client, "x")
        with first, second:
            await ended(first)
            await client.execute("closefd", {"fdname": "x"})
            await ended(second)
        assert await refused(client, "closefd", fdname="x") == "File descriptor named 'x' not found"


async def test_names_are_bounded(path):
    async with listening(path), controlled(path) as client:
        ends = [await pass_one(client, f"x{number}") for number in range(MAX_NAMED)]
        ours, theirs = socket.socketpair()
        with theirs:
            client.send_fd_scm(theirs.fileno())
        assert await refused(client, "getfd", fdname="more") == f"There are {MAX_NAMED} file descriptors already"
        await client.execute("closefd", {"fdname": "x0"})
        await client.execute("getfd", {"fdname": "more"})
        for end in (*ends, ours):
            end.close()


async def test_what_cannot_listen_is_closed(path, sockets):
    async with listening(path), controlled(path) as client:
        address = {"type": "fd", "data": {"str": "x"}}
        with await pass_one(client, "x") as end:
            assert await refused(client, "nbd-server-start", addr=address) == (
                "Failed to listen on file descriptor 'x': Invalid argument"
            )
            await ended(end)
        with open(os.devnull) as file:
            client.send_fd_scm(file.fileno())
        await client.execute("getfd", {"fdname": "x"})
        assert await refused(client, "nbd-server-start", addr=address) == "File descriptor 'x' is not a socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            client.send_fd_scm(datagrams.fileno())
        await client.execute("getfd", {"fdname": "x"})
        assert await refused(client, "nbd-server-start", addr=address) == "File descriptor 'x' is not a stream socket"


async def test_a_client_that_goes_takes_its_descriptors_with_it(path):
    async with listening(path):
        async with controlled(path) as client:
            named = await pass_one(client, "x")
            unnamed, theirs = socket.socketpair()
            with theirs:
                client.send_fd_scm(theirs.fileno())
            await client.execute("query-version")
        with named, unnamed:
            await ended(named)
            await ended(unnamed)
        async with controlled(path) as client:
            assert await refused(client, "closefd", fdname="x") == "File descriptor named 'x' not found"


def flood(path, rounds):
    """Send descriptors with everything, more than fit, and never name one."""
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as sock, theirs:
        sock.connect(path)
        for _ in range(rounds):
            fds = array.array("i", [theirs.fileno()] * (2 * MAX_FDS))
            sock.sendmsg([b'{"execute": "query-version"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    return ours


async def test_a_flood_of_descriptors_is_bounded_and_leaves_none(path):
    async with listening(path):
        before = open_descriptors()
        with await asyncio.to_thread(flood, path, 100) as end:
            most = 0
            async with asyncio.timeout(10):
                while len(now := open_descriptors()) > len(before) + 1:
                    most = max(most, len(now))
                    await asyncio.sleep(0)
            assert most < len(before) + 3 * MAX_FDS
            await ended(end)
        async with controlled(path) as client:  # it is well
            await client.execute("query-version")


async def test_descriptors_stay_with_their_messages(path):
    """Two commands with one each, sent before either is answered."""
    async with listening(path):
        pairs = [socket.socketpair() for _ in range(2)]
        reader, writer = await asyncio.open_unix_connection(path)
        sock = writer.transport.get_extra_info("socket")
        writer.write(b'{"execute": "qmp_capabilities"}')
        for name, (_, theirs) in zip("ab", pairs, strict=True):
            with theirs:
                message = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
                socket.send_fds(sock._sock, [message], [theirs.fileno()])
        for _ in range(4):
            assert b"error" not in await reader.readline()
        writer.write(b'{"execute": "closefd", "arguments": {"fdname": "a"}}')
        await reader.readline()
        await ended(pairs[0][0])
        pairs[1][0].setblocking(False)
        with pytest.raises(BlockingIOError):
            pairs[1][0].recv(1)
        writer.close()
        for ours, _ in pairs:
            ours.close()


async def test_monitors_see_what_the_daemon_was_started_with(path, sockets):
    started_with = Descriptors()
    started_with.add("systemd", listener(sockets / "nbd").detach())
    descriptors.use(started_with)
    async with listening(path), controlled(path) as client:
        assert "has not been found" in await refused(
            client, "nbd-server-start", addr={"type": "fd", "data": {"str": "nosuch"}}
        )
        await client.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "systemd"}}})
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(sockets / "nbd"))
        assert started_with.names == []


async def test_without_a_monitor_there_is_nothing_to_name():
    async with Daemon() as daemon:
        with pytest.raises(Exception, match="No file descriptor supplied"):
            await daemon.execute("getfd", {"fdname": "x"})
        with pytest.raises(Exception, match="'x' not found"):
            await daemon.execute("closefd", {"fdname": "x"})
