import contextlib
import errno
import os
import socket
import stat
import sys

import pytest

from blkferry.daemon.nbd_servers import uri_of
from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import (
    SocketAddress,
    SocketAddressFd,
    SocketAddressInet,
    SocketAddressUnix,
    SocketAddressVsock,
)
from blkferry.sockets import listener as module
from blkferry.sockets import names
from blkferry.sockets.listener import Listener, describe, listen


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback address")


def inet(port="0", host="127.0.0.1", **more) -> SocketAddressInet:
    return SocketAddressInet(host=host, port=port, **more)


async def refusal(address: SocketAddress) -> Error:
    with pytest.raises(Error) as caught:
        (await listen(address)).close()
    return caught.value


def ports(listener: Listener) -> set[int]:
    return {sock.getsockname()[1] for sock in listener.sockets}


@pytest.fixture
def taken():
    """A port of 127.0.0.1 that somebody listens on, followed by a port that is free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as sock, socket.socket() as next_one:
            port = sock.getsockname()[1]
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            next_one.close()
            yield port
            return


# -- unix


async def test_a_unix_socket_accepts_and_its_file_goes_with_it(tmp_path):
    path = tmp_path / "s"
    listener = await listen(SocketAddressUnix(path=str(path)))
    assert stat.S_ISSOCK(path.lstat().st_mode)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert listener.addresses == [SocketAddressUnix(path=str(path))]
    assert not listener.sockets[0].getblocking()
    listener.close()
    assert not path.exists()
    listener.close()


async def test_a_relative_path_is_removed_after_the_working_directory_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = await listen(SocketAddressUnix(path="s"))
    monkeypatch.chdir("/")
    assert listener.addresses == [SocketAddressUnix(path=str(tmp_path / "s"))]
    listener.close()
    assert not (tmp_path / "s").exists()


async def test_a_dead_socket_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = await listen(SocketAddressUnix(path=path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()


async def test_a_live_socket_stays(tmp_path):
    path = str(tmp_path / "s")
    first = await listen(SocketAddressUnix(path=path))
    error = await refusal(SocketAddressUnix(path=path))
    assert error.kind is ErrorKind.BUSY
    assert path in error.message
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    first.close()


async def test_a_socket_that_listens_a_moment_after_it_is_bound_is_not_dead(tmp_path, monkeypatch):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(path)

        async def meanwhile(_seconds):
            starting.listen()

        monkeypatch.setattr(module.asyncio, "sleep", meanwhile)
        assert (await refusal(SocketAddressUnix(path=path))).kind is ErrorKind.BUSY
        assert os.path.exists(path)


async def test_a_live_socket_with_a_full_backlog_stays(tmp_path):
    path = str(tmp_path / "s")
    first = await listen(SocketAddressUnix(path=path), backlog=0)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert (await refusal(SocketAddressUnix(path=path))).kind is ErrorKind.BUSY
    first.close()


@pytest.mark.parametrize("what", ["file", "directory", "symlink"])
async def test_what_is_not_a_socket_stays(tmp_path, what):
    path = tmp_path / "s"
    match what:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to(tmp_path / "elsewhere")
    before = path.lstat()
    error = await refusal(SocketAddressUnix(path=str(path)))
    assert error.kind is ErrorKind.EXISTS
    assert error.message == f"Failed to bind socket to {path}: it exists and is not a socket"
    assert path.lstat().st_ino == before.st_ino


async def test_a_file_that_took_our_place_is_not_removed(tmp_path):
    path = tmp_path / "s"
    listener = await listen(SocketAddressUnix(path=str(path)))
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"


async def test_unix_paths_that_cannot_be(tmp_path):
    long = str(tmp_path / ("x" * 108))
    error = await refusal(SocketAddressUnix(path=long))
    assert error.message == f"UNIX socket path '{long}' is too long"
    assert "107" in error.hint
    assert (await refusal(SocketAddressUnix(path="a\0b"))).kind is ErrorKind.INVALID_ARGUMENT
    assert (await refusal(SocketAddressUnix(path="\ud83d"))).kind is ErrorKind.INVALID_ARGUMENT
    error = await refusal(SocketAddressUnix(path=str(tmp_path / "no" / "s")))
    assert error.kind is ErrorKind.NOT_FOUND
    assert error.message.endswith("No such file or directory")


async def test_a_directory_of_somebody_else(sockets):
    sockets.chmod(0o755)
    directory = sockets / "d"
    directory.mkdir()
    directory.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        error = await refusal(SocketAddressUnix(path=str(directory / "s")))
    finally:
        if root:
            os.seteuid(0)
    assert error.kind is ErrorKind.DENIED
    assert error.message == f"Failed to bind socket to {directory}/s: Permission denied"


async def test_107_bytes_of_path_are_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = await listen(SocketAddressUnix(path="x" * 107))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("x" * 107)
    listener.close()
    assert os.listdir(tmp_path) == []


async def test_an_empty_path_is_a_path_nobody_else_has():
    listener = await listen(SocketAddressUnix(path=""))
    (address,) = listener.addresses
    assert isinstance(address, SocketAddressUnix)
    assert os.path.isabs(address.path)
    assert os.path.exists(address.path)
    listener.close()
    assert not os.path.exists(address.path)


async def test_abstract_names():
    name = f"blkferry-test-{os.getpid()}"
    tight = await listen(SocketAddressUnix(path=name, abstract=True))
    padded = await listen(SocketAddressUnix(path=name, abstract=True, tight=False))
    assert tight.sockets[0].getsockname() == b"\0" + name.encode()
    assert padded.sockets[0].getsockname() == (b"\0" + name.encode()).ljust(108, b"\0")
    assert tight.addresses == [SocketAddressUnix(path=name, abstract=True)]
    assert padded.addresses == [SocketAddressUnix(path=name, abstract=True, tight=False)]
    assert (await refusal(SocketAddressUnix(path=name, abstract=True))).kind is ErrorKind.BUSY
    assert "too long" in (await refusal(SocketAddressUnix(path="x" * 108, abstract=True))).message
    chosen = await listen(SocketAddressUnix(path="", abstract=True))
    assert chosen.sockets[0].getsockname().startswith(b"\0")
    for listener in (tight, padded, chosen):
        listener.close()


# -- inet


async def test_port_0_is_reported():
    listener = await listen(inet())
    (address,) = listener.addresses
    assert isinstance(address, SocketAddressInet)
    assert address.host == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", int(address.port))):
        pass
    assert describe(listener.sockets) == [address]
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.port)))


@pytest.mark.parametrize("mptcp", [True, False])
@pytest.mark.parametrize("keep_alive", [True, False])
async def test_accepted_sockets_keep_alive(keep_alive, mptcp):
    listener = await listen(inet(keep_alive=keep_alive, mptcp=mptcp))
    (sock,) = listener.sockets
    with socket.create_connection(sock.getsockname()):
        sock.setblocking(True)
        peer, _ = sock.accept()
        with peer:
            assert bool(peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is keep_alive
    listener.close()


@needs_ipv6
@pytest.mark.parametrize("port", ["0", ""])
async def test_all_families_share_an_ephemeral_port(port):
    listener = await listen(inet(port, host=""))
    assert {sock.family for sock in listener.sockets} == {socket.AF_INET, socket.AF_INET6}
    assert len(ports(listener)) == 1
    v6 = next(sock for sock in listener.sockets if sock.family == socket.AF_INET6)
    assert v6.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
    listener.close()


@needs_ipv6
async def test_an_ephemeral_port_taken_in_the_other_family_is_not_kept(monkeypatch):
    bind = module._bind
    refused = []

    def bind_unluckily(endpoint, port, protocol):
        if port and len(refused) < 3:
            refused.append(port)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return bind(endpoint, port, protocol)

    monkeypatch.setattr(module, "_bind", bind_unluckily)
    listener = await listen(inet(host=""))
    assert len(refused) == 3
    assert len(listener.sockets) == 2
    assert len(ports(listener)) == 1
    listener.close()


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "flags", "family", "v6only"),
    [
        ("", {"ipv4": True}, socket.AF_INET, None),
        ("", {"ipv6": False}, socket.AF_INET, None),
        ("", {"ipv6": True}, socket.AF_INET6, 1),
        ("", {"ipv4": False}, socket.AF_INET6, 1),
        ("", {"ipv4": True, "ipv6": True}, socket.AF_INET6, 0),
        ("::", {}, socket.AF_INET6, 0),
        ("::", {"ipv6": True}, socket.AF_INET6, 1),
    ],
)
async def test_families(host, flags, family, v6only):
    listener = await listen(inet(host=host, **flags))
    (sock,) = listener.sockets
    assert sock.family == family
    if v6only is not None:
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == v6only
    listener.close()


async def test_no_family_at_all():
    error = await refusal(inet(ipv4=False, ipv6=False))
    assert error.message == "Cannot disable IPv4 and IPv6 at same time"


async def test_a_family_this_host_lacks_is_left_out(monkeypatch):
    bind = module._bind

    def without_ipv6(endpoint, port, protocol):
        if endpoint.family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return bind(endpoint, port, protocol)

    monkeypatch.setattr(module, "_bind", without_ipv6)
    listener = await listen(inet(host=""))
    assert [sock.family for sock in listener.sockets] == [socket.AF_INET]
    listener.close()
    assert "not supported" in (await refusal(inet(host="", ipv6=True))).message


@pytest.mark.parametrize("port", ["70000", "65536", "-1", "9" * 5000])
async def test_ports_that_do_not_exist(port):
    error = await refusal(inet(port))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert error.message == f"Port '{port[:20]}' is not between 0 and 65535"


async def test_the_next_free_port_of_a_range(taken):
    listener = await listen(inet(str(taken), to=taken + 1))
    assert ports(listener) == {taken + 1}
    listener.close()


async def test_ports_that_are_taken(taken):
    error = await refusal(inet(str(taken)))
    assert error.kind is ErrorKind.BUSY
    assert error.message == "Failed to bind socket: Address already in use"
    error = await refusal(inet(str(taken), to=taken))
    assert error.message == "Failed to find an available port: Address already in use"
    error = await refusal(inet(str(taken), to=taken - 1))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert error.message == f"Port range {taken} to {taken - 1} is empty"


async def test_an_address_of_another_host():
    error = await refusal(inet(host="192.0.2.1"))
    assert error.message == "Failed to bind socket: Cannot assign requested address"


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("localhost", "0"),
        ("127.0.0.1", "http"),
        ("127.0.0.1", "-0x"),
        ("a\0b", "0"),
        ("x" * 64 + ".example", "0"),
    ],
)
async def test_numeric_resolves_nothing(host, port):
    error = await refusal(inet(port, host=host, numeric=True))
    assert error.kind is ErrorKind.NOT_FOUND
    assert error.message.startswith(f"address resolution failed for {host}:{port}: ")


# -- the rest


async def test_an_inherited_listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        listener = await listen(SocketAddressFd(fd=str(sock.detach())))
    assert ports(listener) == {port}
    with socket.create_connection(("127.0.0.1", port)):
        pass
    listener.close()


async def test_descriptors_that_do_not_listen():
    error = await refusal(SocketAddressFd(fd="abc"))
    assert error.message == "Unable to parse FD number abc"
    with open(os.devnull) as file:
        number = file.fileno()
        error = await refusal(SocketAddressFd(fd=str(number)))
        assert error.message == f"File descriptor '{number}' is not a socket"
        os.fstat(number)  # still open
    one, other = socket.socketpair()
    with one, other:
        assert (await refusal(SocketAddressFd(fd=str(one.fileno())))).kind is ErrorKind.INVALID_ARGUMENT
        other.send(b"x")
        assert one.recv(1) == b"x"
    assert (await refusal(SocketAddressFd(fd="999999"))).message == "File descriptor '999999' is not a socket"


# -- vsock: this kernel may have none


def has_vsock() -> bool:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError:
        return False
    return True


async def test_a_vsock_port():
    address = SocketAddressVsock(cid="4294967295", port="4294967295")
    if not has_vsock():
        assert (await refusal(address)).message.startswith("Failed to create socket: ")
        return
    listener = await listen(address)
    (bound,) = listener.addresses
    assert isinstance(bound, SocketAddressVsock)
    assert bound.cid == "4294967295"
    assert int(bound.port) == listener.sockets[0].getsockname()[1]
    assert not listener.sockets[0].getblocking()
    error = await refusal(bound)
    assert (error.kind, error.message) == (ErrorKind.BUSY, "Failed to bind socket: Address already in use")
    error = await refusal(SocketAddressVsock(cid="77", port="4294967295"))
    assert error.message == "Failed to bind socket: Cannot assign requested address"
    listener.close()


@pytest.mark.parametrize(("told", "cid"), [(5, "5"), (0xFFFFFFFF, "2")])
def test_a_vsock_wildcard_is_called_by_this_machines_cid(monkeypatch, told, cid):
    monkeypatch.setattr(names, "open", lambda *_, **__: contextlib.nullcontext(), raising=False)
    monkeypatch.setattr(names.fcntl, "ioctl", lambda *_: told.to_bytes(4, sys.byteorder))
    assert uri_of(SocketAddressVsock(cid="4294967295", port="10809"), "a b") == f"nbd+vsock://{cid}/a%20b"
    assert uri_of(SocketAddressVsock(cid="7", port="1"), "", tls=True) == "nbds+vsock://7:1/"


def test_without_vsock_the_host_is_meant(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(names, "open", refuse, raising=False)
    assert uri_of(SocketAddressVsock(cid="4294967295", port="1"), "x") == "nbd+vsock://2:1/x"


@pytest.mark.parametrize(("cid", "port", "what"), [("x", "1", "cid 'x'"), ("1", "", "port ''")])
async def test_vsock_numbers(cid, port, what):
    error = await refusal(SocketAddressVsock(cid=cid, port=port))
    assert (error.kind, error.message) == (ErrorKind.INVALID_ARGUMENT, f"Failed to parse {what}")
