import asyncio
import os
import socket

import pytest

from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)
from blkferry.sockets import connect as module
from blkferry.sockets import names
from blkferry.sockets.connect import connect


def talk(client: socket.socket, server: socket.socket) -> None:
    """Prove that they are the two ends of one connection."""
    peer, _ = server.accept()
    with peer, client:
        assert not client.getblocking()
        peer.sendall(b"hello")
        client.setblocking(True)
        assert client.recv(5) == b"hello"


async def refusal(address: SocketAddress) -> Error:
    with pytest.raises(Error) as caught:
        (await connect(address)).close()
    return caught.value


def closed_port() -> str:
    """A port that refuses: it was free a moment ago, and nobody is given it before the whole range went by."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return str(sock.getsockname()[1])


# -- inet


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("mptcp", [True, False])
async def test_inet(keep_alive, mptcp):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        sock = await connect(SocketAddressInet(host="127.0.0.1", port=port, keep_alive=keep_alive, mptcp=mptcp))
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is keep_alive
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) in (
            (socket.IPPROTO_MPTCP,) if mptcp else (socket.IPPROTO_TCP,)
        )
        talk(sock, server)


async def test_all_addresses_of_a_host_are_tried(monkeypatch):
    closed = int(closed_port())
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_port = server.getsockname()[1]
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", closed)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", open_port)),
        ]
        monkeypatch.setattr(names, "look_up", lambda *_, **__: found)
        talk(await connect(SocketAddressInet(host="many", port="1")), server)
        monkeypatch.setattr(names, "look_up", lambda *_, **__: found[:1])
        assert (await refusal(SocketAddressInet(host="one", port="1"))).message.endswith("Connection refused")


async def test_inet_refusals():
    port = closed_port()
    error = await refusal(SocketAddressInet(host="127.0.0.1", port=port))
    assert error.message == f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    error = await refusal(SocketAddressInet(host="localhost", port="1", numeric=True))
    assert error.message.startswith("address resolution failed for localhost:1: ")
    for host, port in (("", "1"), ("h", "")):
        assert (await refusal(SocketAddressInet(host=host, port=port))).message == "host and/or port not specified"
    error = await refusal(SocketAddressInet(host="127.0.0.1", port="65536"))
    assert error.message == "Port '65536' is not between 0 and 65535"


async def test_a_cancelled_connect_leaves_no_socket(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connect(SocketAddressUnix(path=path))
        assert len(os.listdir("/proc/self/fd")) <= len(before)


# -- unix


async def test_unix(tmp_path):
    path = str(tmp_path / "s")
    assert (await refusal(SocketAddressUnix(path=path))).message == (
        f"Failed to connect to '{path}': No such file or directory"
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        talk(await connect(SocketAddressUnix(path=path)), server)
    assert (await refusal(SocketAddressUnix(path=path))).message.endswith("Connection refused")
    assert (await refusal(SocketAddressUnix(path=""))).message == "unix connect: no path specified"
    assert "is too long" in (await refusal(SocketAddressUnix(path="x" * 108))).message


async def test_a_full_backlog_is_waited_for(tmp_path, monkeypatch):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        waits = []
        sleep = asyncio.sleep

        async def meanwhile(seconds):
            waits.append(seconds)
            server.accept()[0].close()
            await sleep(0)

        monkeypatch.setattr(module.asyncio, "sleep", meanwhile)
        talk(await connect(SocketAddressUnix(path=path)), server)
        assert waits


@pytest.mark.parametrize("tight", [True, False])
async def test_abstract_names(tight):
    name = f"blkferry-test-{os.getpid()}"
    padded = b"\0" + name.encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(padded if tight else padded.ljust(108, b"\0"))
        server.listen()
        address = SocketAddressUnix(path=name, abstract=True, tight=tight)
        talk(await connect(address), server)
        await refusal(SocketAddressUnix(path=name, abstract=True, tight=not tight))


# -- vsock: this kernel may have none, the numbers are checked first


@pytest.mark.parametrize(
    ("cid", "port", "message"),
    [
        ("x", "1", "Failed to parse cid 'x'"),
        ("", "1", "Failed to parse cid ''"),
        ("-1", "1", "Failed to parse cid '-1'"),
        ("\u0661", "1", "Failed to parse cid '\u0661'"),
        ("1", "4294967296", "Failed to parse port '4294967296'"),
        ("1", "9" * 5000, f"Failed to parse port '{'9' * 20}'"),
    ],
)
async def test_vsock_numbers(cid, port, message):
    error = await refusal(SocketAddressVsock(cid=cid, port=port))
    assert (error.kind, error.message) == (ErrorKind.INVALID_ARGUMENT, message)


async def test_vsock_where_nobody_listens():
    error = await refusal(SocketAddressVsock(cid="4294967294", port="1"))
    assert error.message.startswith("Failed to connect to '4294967294:1': ")


# -- fd


async def test_fd():
    ours, theirs = socket.socketpair()
    with theirs:
        sock = await connect(SocketAddressFd(fd=str(ours.detach())))
        theirs.sendall(b"x")
        with sock:
            assert sock.recv(1) == b"x"


async def test_fds_that_will_not_do():
    with socket.socket() as sock:
        error = await refusal(SocketAddressFd(fd=str(sock.fileno())))
        assert error.message == (
            f"File descriptor '{sock.fileno()}' is not connected: Transport endpoint is not connected"
        )
        assert sock.getsockname()  # it is still ours
    assert (await refusal(SocketAddressFd(fd="abc"))).message == "Unable to parse FD number abc"
