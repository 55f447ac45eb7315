"""Several NBD servers in one daemon, what can be asked of them, QEMU's older commands, clients that take up room."""

import contextlib
import resource
import socket

import pytest
from serving import eventually, in_flight

from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, TransmissionFlag

SIZE = 1 << 20


@pytest.fixture
def daemon():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="n", size=SIZE)
        yield daemon


def unix(path):
    return {"type": "unix", "data": {"path": str(path)}}


def export(daemon, name, export_id, **options):
    daemon.execute("block-export-add", type="nbd", id=export_id, node_name="n", name=name, writable=True, **options)


def test_servers_have_their_own_exports_and_limits(daemon, tmp_path):
    daemon.execute("nbd-server-start", addr=unix(tmp_path / "plain"))
    daemon.execute("nbd-server-start", addr=unix(tmp_path / "other"), id="other", max_connections=1)
    export(daemon, "x", "e0")
    export(daemon, "x", "e1", server="other")
    export(daemon, "y", "e2", server="other")
    with Client.connect(str(tmp_path / "plain"), "x") as client:
        assert client.flags & TransmissionFlag.CAN_MULTI_CONN
        with pytest.raises(Exception, match="not present"):
            Client.connect(str(tmp_path / "plain"), "y")
        client.write(0, b"here")
        with Client.connect(str(tmp_path / "other"), "y") as second:
            assert not second.flags & TransmissionFlag.CAN_MULTI_CONN
            assert second.read(0, 4) == b"here"
        daemon.execute("nbd-server-stop", id="other")
        assert [each["id"] for each in daemon.execute("query-block-exports")] == ["e0"]
        assert client.read(0, 4) == b"here"
    assert not (tmp_path / "other").exists()
    daemon.execute("nbd-server-stop")
    assert daemon.execute("query-nbd-servers") == []


def test_what_is_refused(daemon, tmp_path):
    with pytest.raises(Error, match=r"^NBD server not running$"):
        export(daemon, "x", "e0")
    with pytest.raises(Error, match=r"^NBD server 'a' not running$"):
        export(daemon, "x", "e0", server="a")
    with pytest.raises(Error, match=r"^NBD server not running$"):
        daemon.execute("nbd-server-stop")
    daemon.execute("nbd-server-start", addr=unix(tmp_path / "a"), id="a")
    with pytest.raises(Error, match=r"^NBD server 'a' already running$"):
        daemon.execute("nbd-server-start", addr=unix(tmp_path / "b"), id="a")
    with pytest.raises(Error, match=r"^NBD server not running$") as caught:
        export(daemon, "x", "e0")
    assert caught.value.hint == "Start it first, or name another server; there are: a."
    with pytest.raises(Error, match=r"expects an identifier"):
        daemon.execute("nbd-server-start", addr=unix(tmp_path / "b"), id="1 2")
    assert not (tmp_path / "b").exists()


def test_credentials_that_do_not_fit_leave_no_server(daemon, tmp_path):
    daemon.execute("object-add", qom_type="iothread", id="io")
    for options, text in (
        ({"tls_creds": "no"}, r"^No TLS credentials with id 'no'$"),
        ({"tls_creds": "io"}, r"^Object with id 'io' is not TLS credentials$"),
        ({"tls_authz": "io"}, r"^tls-authz needs tls-creds$"),
    ):
        with pytest.raises(Error, match=text):
            daemon.execute("nbd-server-start", addr=unix(tmp_path / "s"), **options)
        assert not (tmp_path / "s").exists()
    assert daemon.execute("query-nbd-servers") == []


def test_what_servers_and_clients_look_like_from_outside(daemon, tmp_path):
    daemon.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}, id="tcp")
    export(daemon, "x", "e0", server="tcp")
    (info,) = daemon.execute("query-nbd-servers")
    (address,) = info.pop("addresses")
    port = address["port"]
    assert info == {
        "id": "tcp",
        "uris": [f"nbd://127.0.0.1:{port}/"],
        "max-connections": 0,
        "connections": 0,
        "exports": ["x"],
    }
    with Client.connect(("127.0.0.1", int(port)), "x") as client:
        for _ in range(3):
            client.write(0, b"w" * 1000)
        assert client.read(0, 3) == b"www"
        client.flush()
        (listed,) = daemon.execute("query-block-exports")
        (who,) = listed["clients"]
        host, port = client.sock.getsockname()
        assert who["peer"] == f"{host}:{port}"
        assert who["requests"] == 5
        assert 3 * 1032 + 2 * 32 <= who["received"] <= 3 * 1032 + 2 * 32 + 100
        assert 3 <= who["sent"] <= 300
        assert "identity" not in who
        assert daemon.execute("query-nbd-servers")[0]["connections"] == 1
    eventually(lambda: daemon.execute("query-block-exports")[0]["clients"] == [])


def test_every_request_is_counted_once(daemon):
    """However requests are split into turns: small ones by the hundred, large payloads, refused ones."""
    daemon.export("n")
    with daemon.client() as client:
        cookies = []
        for number in range(300):
            cookies.append(client.submit(Cmd.READ, number * 512, 512))
            if number % 10 == 0:
                cookies.append(client.submit(Cmd.WRITE, number * 512, 70_000, payload=b"\7" * 70_000))
                cookies.append(client.submit(Cmd.WRITE, SIZE, 4096, payload=b"\7" * 4096))
        assert sum(bool(client.wait(cookie).error) for cookie in cookies) == 30
        (who,) = daemon.execute("query-block-exports")[0]["clients"]
        assert who["requests"] == len(cookies) == 360


def test_older_commands(daemon, tmp_path):
    daemon.execute("nbd-server-start", addr=unix(tmp_path / "s"))
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    daemon.execute("blockdev-add", driver="file", node_name="ro", filename=str(path), read_only=True)
    daemon.execute("nbd-server-add", device="n", writable=True, description="a disk")
    daemon.execute("nbd-server-add", device="ro", name="r", writable=True)  # as QEMU has it: quietly read-only
    with Client.connect(str(tmp_path / "s"), "n") as client:
        assert not client.flags & TransmissionFlag.READ_ONLY
        assert client.description == "a disk"
        with pytest.raises(Error, match=r"^export 'n' still in use$"):
            daemon.execute("nbd-server-remove", name="n")
    with Client.connect(str(tmp_path / "s"), "r") as client:
        assert client.flags & TransmissionFlag.READ_ONLY
        daemon.execute("nbd-server-remove", name="r", mode="hard")
        with contextlib.suppress(ConnectionEnded, ConnectionError):
            client.read(0, 1)
            pytest.fail("a removed export is still served")
    with pytest.raises(Error, match=r"^Invalid block export id$"):
        daemon.execute("nbd-server-add", device="n", name="not an id")
    with pytest.raises(Error, match=r"^Export 'nobody' is not found$"):
        daemon.execute("nbd-server-remove", name="nobody")
    with pytest.raises(Error, match=r"^Cannot find device='nothing' nor node-name='nothing'$"):
        daemon.execute("nbd-server-add", device="nothing")
    eventually(lambda: [each["id"] for each in daemon.execute("query-block-exports")] == ["n"])
    daemon.execute("nbd-server-remove", name="n")


# -- clients that take up room -------------------------------------------------------------------------------


def half_open(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)  # waits while the backlog is full
    sock.settimeout(20)
    return sock


def test_those_who_only_take_up_room_make_it_for_others(daemon):
    """All connections are taken by clients that never choose an export; one that does gets in all the same."""
    daemon.serve(max_connections=3)
    daemon.export("n")
    idle = [half_open(daemon.socket) for _ in range(10)]
    with daemon.client() as client:
        assert client.read(0, 4) == bytes(4)
        second, third = daemon.client(), daemon.client()
        # Those who are served keep their connection, however many wait.
        waiting = half_open(daemon.socket)
        waiting.settimeout(1.5)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        assert client.read(0, 4) == bytes(4)
        second.close()
        waiting.settimeout(20)
        assert waiting.recv(8) == b"NBDMAGIC"
        third.close()
        waiting.close()
    for sock in idle:
        sock.close()
    eventually(lambda: in_flight(daemon.daemon) == {})


def test_a_thousand_connections_are_served(daemon):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert most >= 3000
    daemon.export("n")
    clients = []
    try:
        for number in range(1000):
            client = daemon.client()
            client.write(number * 512, number.to_bytes(4, "big"))
            clients.append(client)
        for number, client in enumerate(reversed(clients)):
            assert client.read(number * 512, 4) == number.to_bytes(4, "big")
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    eventually(lambda: in_flight(daemon.daemon) == {})


def test_ten_thousand_half_open_attempts_keep_nobody_out(daemon):
    """Every one of them stays as long as it may; clients that choose an export come and go meanwhile."""
    daemon.export("n")
    kept = daemon.client()
    attempts = []
    for number in range(10_000):
        attempts.append(half_open(daemon.socket))
        if number % 500 == 0:
            with daemon.client() as client:
                client.write(0, b"late")
            assert kept.read(0, 4) == b"late"
        if len(attempts) > 400:
            attempts.pop(0).close()
    for sock in attempts:
        sock.close()
    kept.close()
    eventually(lambda: in_flight(daemon.daemon) == {})
