"""The nbd driver over TLS: who it believes, what it reads, and what it says to those it does not believe."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time

import pytest

import peers
import pki
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-nbd", "nbdkit")

SIZE = 4 << 20
CONTENT = random.Random(4).randbytes(SIZE)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Directories for servers (one of another name) and clients (of another authority), and keys."""
    root = tmp_path_factory.mktemp("pki")
    ours, others = pki.authority(), pki.authority("other")
    purpose = (pki.purposes("server"), True)
    client = (pki.purposes("client"), True)
    pki.write(
        root / "server",
        ours,
        server=pki.issue("localhost", ours, pki.NO_CA, pki.LOCALHOST, purpose),
        client=pki.issue("client1", ours, pki.NO_CA, client),
    )
    pki.write(root / "stranger", others, client=pki.issue("stranger", others, pki.NO_CA, client))
    pki.write(root / "trusting", ours, client=None)
    for name, key in (("keys", b"alice:" + b"5a" * 32), ("otherkeys", b"alice:" + b"a5" * 32)):
        (root / name).mkdir()
        (root / name / "keys.psk").write_bytes(key + b"\n")
    return root


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@contextlib.contextmanager
def running(socket, program, *argv):
    with subprocess.Popen([*peers.peer(program), *argv]) as process:
        try:
            while not socket.exists():
                assert process.poll() is None, f"{program} has ended"
                time.sleep(0.02)
            yield {"type": "unix", "path": str(socket)}
        finally:
            process.terminate()


@contextlib.contextmanager
def serving(kind, socket, image, creds, directory):
    """A server with TLS; gives its address."""
    if kind == "qemu-nbd":
        options = f"{creds},id=t,endpoint=server,dir={directory}"
        argv = ["--object", options, "--tls-creds=t", "--persistent", "--shared=8", "-f", "raw", "-k", str(socket)]
        with running(socket, "qemu-nbd", *argv, str(image)) as address:
            yield address
    elif kind == "nbdkit":
        files = f"--tls-psk={directory}/keys.psk" if "psk" in creds else f"--tls-certificates={directory}"
        with running(socket, "nbdkit", "-f", "-U", str(socket), "--tls=require", files, "file", str(image)) as address:
            yield address
    else:
        with DaemonThread() as daemon:
            daemon.execute("blockdev-add", driver="file", node_name="n", filename=str(image))
            daemon.execute("object-add", qom_type=creds, id="t", endpoint="server", dir=str(directory))
            inet = {"type": "inet", "data": {"host": "localhost", "port": "0"}}
            daemon.execute("nbd-server-start", addr=inet, tls_creds="t")
            daemon.execute("block-export-add", type="nbd", id="e", node_name="n", name="", writable=True)
            yield daemon.execute("query-nbd-servers")[0]["addresses"][0] | {"host": "localhost"}


def add(daemon, server, creds="tls-creds-x509", directory=None, *, more=None, **options):
    if directory is not None:
        daemon.execute(
            "object-add", **{"qom-type": creds, "id": "c", "endpoint": "client", "dir": str(directory), **(more or {})}
        )
        options["tls-creds"] = "c"
    daemon.execute("blockdev-add", **{"driver": "nbd", "node-name": "n", "server": server, "export": "", **options})


SERVERS = pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "blkferry"])


@SERVERS
@pytest.mark.parametrize("creds", ["tls-creds-x509", "tls-creds-psk"])
def test_reads_and_writes(kind, creds, certificates, image, tmp_path):
    """Requests of all sizes, many at a time, and writes larger than the socket takes."""
    psk = "psk" in creds
    here = certificates / ("keys" if psk else "server")
    model = bytearray(CONTENT)
    chance = random.Random(5)
    with serving(kind, tmp_path / "s", image, creds, here) as server, DaemonThread() as daemon:
        add(daemon, server, creds, here, more={"username": "alice"} if psk else None)
        daemon.export("n", writable=True)
        with daemon.client() as client:
            places = [(chance.randrange(SIZE - 70_000), chance.choice([1, 4096, 70_000])) for _ in range(500)]
            asked = {client.submit(0, at, length): (at, length) for at, length in places}
            for cookie, (at, length) in asked.items():
                assert client.wait(cookie).data == model[at : at + length]
            for length in (1, 4096, 300_000, 3 << 20):
                at = chance.randrange(SIZE - length)
                data = chance.randbytes(length)
                client.write(at, data)
                model[at : at + length] = data
            client.flush()
            assert client.read(0, SIZE) == model
    assert image.read_bytes() == model


@SERVERS
def test_a_server_of_another_authority(kind, certificates, image, tmp_path):
    with (
        serving(kind, tmp_path / "s", image, "tls-creds-x509", certificates / "server") as server,
        DaemonThread() as daemon,
        pytest.raises(Error, match="The server's certificate was refused: "),
    ):
        add(daemon, server, directory=certificates / "stranger")


@SERVERS
def test_names(kind, certificates, image, tmp_path):
    with serving(kind, tmp_path / "s", image, "tls-creds-x509", certificates / "server") as server:
        wrong = "Certificate does not match the hostname elsewhere"
        with DaemonThread() as daemon, pytest.raises(Error, match=wrong):
            add(daemon, server, directory=certificates / "server", **{"tls-hostname": "elsewhere"})
        if server["type"] == "inet":
            with DaemonThread() as daemon:
                with pytest.raises(Error, match=r"Certificate does not match the hostname 127\.0\.0\.1"):
                    add(daemon, server | {"host": "127.0.0.1"}, directory=certificates / "server")
                add(daemon, server | {"host": "127.0.0.1"}, **{"tls-creds": "c", "tls-hostname": "localhost"})
        else:
            with DaemonThread() as daemon:
                add(daemon, server, directory=certificates / "server", **{"tls-hostname": "localhost"})


@SERVERS
def test_a_client_that_shows_no_certificate(kind, certificates, image, tmp_path):
    """With TLS 1.3 it learns so after its own part of the handshake."""
    with (
        serving(kind, tmp_path / "s", image, "tls-creds-x509", certificates / "server") as server,
        DaemonThread() as daemon,
    ):
        if kind == "nbdkit":  # asks nobody for certificates, unless told so
            add(daemon, server, directory=certificates / "trusting")
        else:
            with pytest.raises(Error, match="Failed to read initial magic or option reply") as refused:
                add(daemon, server, directory=certificates / "trusting")
            if kind == "blkferry":  # qemu-nbd sends no alert
                assert "client-cert.pem" in refused.value.hint


def test_a_server_that_wants_other_credentials(certificates, image, tmp_path):
    with (
        serving("blkferry", tmp_path / "s", image, "tls-creds-psk", certificates / "keys") as server,
        DaemonThread() as daemon,
        pytest.raises(Error, match="TLS handshake failed") as refused,
    ):
        add(daemon, server, directory=certificates / "trusting", **{"tls-hostname": "localhost"})
    assert "credentials of another kind" in refused.value.hint


@SERVERS
def test_other_keys(kind, certificates, image, tmp_path):
    with (
        serving(kind, tmp_path / "s", image, "tls-creds-psk", certificates / "keys") as server,
        DaemonThread() as daemon,
        pytest.raises(Error, match="TLS handshake failed"),
    ):
        add(daemon, server, "tls-creds-psk", certificates / "otherkeys", more={"username": "alice"})


@SERVERS
def test_a_server_that_wants_tls(kind, certificates, image, tmp_path):
    with (
        serving(kind, tmp_path / "s", image, "tls-creds-x509", certificates / "server") as server,
        DaemonThread() as daemon,
    ):
        with pytest.raises(Error, match="TLS negotiation required before option") as refused:
            add(daemon, server)
        assert refused.value.hint == "Did you forget a valid tls-creds?"


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
def test_a_server_without_tls(kind, certificates, image, tmp_path):
    """Nothing is asked of it in the clear."""
    argv = {"qemu-nbd": ["-f", "raw", "-k", str(tmp_path / "s"), str(image)]}
    argv["nbdkit"] = ["-f", "-U", str(tmp_path / "s"), "file", str(image)]
    with (
        running(tmp_path / "s", kind, *argv[kind]) as server,
        DaemonThread() as daemon,
        pytest.raises(Error, match="Server rejected request to start TLS: "),
    ):
        add(daemon, server, directory=certificates / "server")


def test_options_that_do_not_fit(certificates):
    server = {"type": "unix", "path": "/nowhere"}
    with DaemonThread() as daemon:
        with pytest.raises(Error, match="No TLS credentials with id 'c'"):
            add(daemon, server, **{"tls-creds": "c"})
        with pytest.raises(Error, match="Parameter 'tls-hostname' requires 'tls-creds'"):
            add(daemon, server, **{"tls-hostname": "localhost"})
        with pytest.raises(Error, match="Expected TLS credentials for a client endpoint"):
            add(daemon, server, directory=certificates / "server", more={"endpoint": "server"})


def test_credentials_that_are_removed_stay_in_use_until_there_are_others(certificates, image, tmp_path):
    here = certificates / "server"
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(DaemonThread())
        with serving("qemu-nbd", tmp_path / "s", image, "tls-creds-x509", here) as server:
            add(daemon, server, directory=here)
            daemon.export("n", writable=False)
            client = stack.enter_context(daemon.client())
            assert client.read(0, 4096) == CONTENT[:4096]
            daemon.execute("object-del", id="c")
        (tmp_path / "s").unlink(missing_ok=True)
        with serving("qemu-nbd", tmp_path / "s", image, "tls-creds-x509", here):
            assert client.read(4096, 4096) == CONTENT[4096:8192]
            elsewhere = str(certificates / "stranger")
            daemon.execute("object-add", qom_type="tls-creds-x509", id="c", endpoint="client", dir=elsewhere)
        (tmp_path / "s").unlink(missing_ok=True)
        with serving("qemu-nbd", tmp_path / "s", image, "tls-creds-x509", here), pytest.raises(OSError, match="5"):
            client.read(8192, 4096)
