"""TLS as others speak it: libnbd and qemu-img with certificates, with keys and with nothing, right and wrong."""

import contextlib
import hashlib
import os
import socket
import subprocess
import time

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

import peers
import pki
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client
from blkferry.wire.nbd.constants import Opt, RepError

pytestmark = peers.requires("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "nbdkit")

MIB = 1 << 20
SIZE = 16 * MIB
CONTENT = hashlib.shake_128(b"disk").digest(SIZE)


def lab(name):
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Lab"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Directories with certificates of one authority and of another, and two with keys."""
    root = tmp_path_factory.mktemp("pki")
    ours, others = pki.authority(), pki.authority("other")

    def client(name, ca, **life):
        return pki.issue(name, ca, pki.NO_CA, (pki.purposes("client"), True), **life)

    server = pki.issue("localhost", ours, pki.NO_CA, pki.LOCALHOST, (pki.purposes("server"), True))
    pki.write(root / "server", ours, server=server)
    pki.write(root / "renamed", ours, server=pki.issue("another", ours, pki.NO_CA, (pki.purposes("server"), True)))
    pki.write(root / "client", ours, client=client(lab("client1"), ours))
    pki.write(root / "mallory", ours, client=client(lab("mallory"), ours))
    pki.write(root / "expired", ours, client=client("late", ours, start=pki.NOW - 9 * pki.DAY, end=pki.NOW - pki.DAY))
    pki.write(root / "stranger", ours, client=client("stranger", others))
    pki.write(root / "elsewhere", others, client=client("elsewhere", others))
    pki.write(root / "nobody", ours)
    for name, key in (("keys", b"alice:" + b"5a" * 32), ("otherkeys", b"alice:" + b"a5" * 32)):
        (root / name).mkdir()
        (root / name / "keys.psk").write_bytes(key + b"\n")
    return root


@pytest.fixture
def daemon(tmp_path):
    (tmp_path / "disk").write_bytes(CONTENT)
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="n", filename=str(tmp_path / "disk"))
        yield daemon


def serve(daemon, kind, directory, *, authz=None, **options):
    """Start a server with TLS on a free port; return the port."""
    daemon.execute("object-add", qom_type=f"tls-creds-{kind}", id="t", endpoint="server", dir=str(directory), **options)
    return listen(daemon, **({"tls_authz": authz} if authz else {}))


def listen(daemon, **options):
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    daemon.execute("nbd-server-start", addr=address, tls_creds="t", **options)
    daemon.execute("block-export-add", type="nbd", id="e", node_name="n", name="x", writable=True)
    return daemon.execute("query-nbd-servers")[0]["addresses"][0]["port"]


def uri(port, client, host="localhost"):
    return f"nbds://{host}:{port}/x?tls-certificates={client}"


def nbdinfo(port, client, expect=0, **options):
    return peers.run("nbdinfo", "--size", uri(port, client, **options), expect=expect)


def qemu(port, creds, **options):
    """qemu-img's way to name the export."""
    image = {"driver": "nbd", "host": "localhost", "port": port, "export": "x", "tls-creds": "c"} | options
    return ["--object", f"{creds},id=c,endpoint=client", "--image-opts", ",".join(f"{k}={v}" for k, v in image.items())]


def logged(caplog, text):
    return any(text in record.getMessage() for record in caplog.records)


# -- certificates --------------------------------------------------------------------------------------------


def test_libnbd_copies_both_ways(daemon, certificates, tmp_path):
    port = serve(daemon, "x509", certificates / "server")
    peers.run("nbdcopy", uri(port, certificates / "client"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    (tmp_path / "new").write_bytes(CONTENT[::-1])
    peers.run("nbdcopy", "--flush", tmp_path / "new", uri(port, certificates / "client"))
    assert (tmp_path / "disk").read_bytes() == CONTENT[::-1]


def test_qemu_copies_both_ways(daemon, certificates, tmp_path):
    port = serve(daemon, "x509", certificates / "server")
    creds = f"tls-creds-x509,dir={certificates / 'client'}"
    peers.run("qemu-img", "convert", *qemu(port, creds), "-O", "raw", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    commands = ("-c", "write -P 7 4096 1M", "-c", "read -P 7 4096 1M", "-c", "write -z 2M 1M", "-c", "flush")
    peers.run("qemu-io", *qemu(port, creds), *commands)
    expected = CONTENT[:4096] + b"\7" * MIB + CONTENT[MIB + 4096 : 2 * MIB] + bytes(MIB) + CONTENT[3 * MIB :]
    assert (tmp_path / "disk").read_bytes() == expected


def test_reads_at_random_in_all_sizes(daemon, certificates):
    """Many requests in flight, from both sides of every boundary there is: records, turns, sendfile, the socket."""
    port = serve(daemon, "x509", certificates / "server")
    script = """
        import hashlib, nbd, random, sys
        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        handle.connect_uri(sys.argv[1])
        content = hashlib.shake_128(b"disk").digest(handle.get_size())
        rng = random.Random(3)
        waiting = {}
        for number in range(3000):
            length = rng.choice([1, 512, 4096, 16384, 40000, 70000, 300000])
            offset = rng.randrange(len(content) - length)
            buffer = nbd.Buffer(length)
            waiting[handle.aio_pread(buffer, offset)] = (buffer, offset, length)
            while len(waiting) >= 32 or (number == 2999 and waiting):
                handle.poll(-1)
                for cookie in [each for each in waiting if handle.aio_command_completed(each)]:
                    buffer, offset, length = waiting.pop(cookie)
                    assert buffer.to_bytearray() == content[offset:offset + length], (offset, length)
    """
    peers.libnbd_script(script, uri(port, certificates / "client"), timeout=60)


def test_a_client_without_a_valid_certificate_is_not_let_in(daemon, certificates, caplog):
    caplog.set_level("INFO")
    port = serve(daemon, "x509", certificates / "server")
    for name, reason in (
        ("nobody", "peer did not return a certificate"),
        ("stranger", "the client's certificate was refused: unable to get local issuer certificate"),
        ("expired", "the client's certificate was refused: certificate has expired"),
    ):
        caplog.clear()
        nbdinfo(port, certificates / name, expect=1)
        assert logged(caplog, f"disconnecting during the handshake: TLS: {reason}"), (name, caplog.text)
    nbdinfo(port, certificates / "client")


def test_a_client_finds_out_who_the_server_is(daemon, certificates):
    port = serve(daemon, "x509", certificates / "renamed")
    nbdinfo(port, certificates / "client", expect=1)
    daemon.execute("nbd-server-stop")
    daemon.execute("object-del", id="t")
    port = serve(daemon, "x509", certificates / "server")
    nbdinfo(port, certificates / "elsewhere", expect=1)
    nbdinfo(port, certificates / "client")


def test_without_certificates_of_clients_anybody_may_come_encrypted(daemon, certificates):
    port = serve(daemon, "x509", certificates / "server", verify_peer=False)
    nbdinfo(port, certificates / "nobody")


# -- authorization -------------------------------------------------------------------------------------------


def test_only_whom_the_list_names(daemon, certificates, caplog):
    rules = [{"match": "O=Lab,CN=client*", "policy": "allow", "format": "glob"}]
    daemon.execute("object-add", qom_type="authz-list", id="az", policy="deny", rules=rules)
    port = serve(daemon, "x509", certificates / "server", authz="az")
    nbdinfo(port, certificates / "client")
    script = """
        import nbd, sys
        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        handle.connect_uri(sys.argv[1])
    """
    said = peers.libnbd_script(script, uri(port, certificates / "mallory"), expect=1).stderr
    assert "'O=Lab,CN=mallory' is not allowed to use this server" in said
    assert logged(caplog, "denied by az: 'O=Lab,CN=mallory'")
    done = peers.run("qemu-img", "info", *qemu(port, f"tls-creds-x509,dir={certificates / 'mallory'}"), expect=1)
    assert "not allowed" in done.stderr


def test_an_authz_object_is_looked_up_when_it_is_needed(daemon, certificates, caplog):
    port = serve(daemon, "x509", certificates / "server", authz="az")
    nbdinfo(port, certificates / "client", expect=1)
    assert logged(caplog, "Cannot find authorization object 'az'")
    daemon.execute("object-add", qom_type="authz-simple", id="az", identity="O=Lab,CN=client1")
    nbdinfo(port, certificates / "client")
    nbdinfo(port, certificates / "mallory", expect=1)
    daemon.execute("object-del", id="az")
    nbdinfo(port, certificates / "client", expect=1)


def test_the_names_are_those_that_qemu_compares(daemon, certificates, tmp_path):
    """QSD lets in whom we let in, by the same rule."""
    port = serve(daemon, "x509", certificates / "server")
    with held(uri(port, certificates / "client")):
        (who,) = daemon.execute("query-block-exports")[0]["clients"]
    name = who["identity"].replace(",", ",,")
    options = (
        f"--object tls-creds-x509,id=t,endpoint=server,dir={certificates / 'server'} "
        f"--object authz-simple,id=az,identity={name} --blockdev null-co,node-name=n,size=1048576,read-zeroes=on "
        f"--nbd-server addr.type=unix,addr.path={tmp_path}/s,tls-creds=t,tls-authz=az "
        f"--export nbd,id=e,node-name=n,name=x"
    )
    with running("qemu-storage-daemon", *options.split(), until=tmp_path / "s"):
        for client, expect in (("client", 0), ("mallory", 1)):
            where = f"nbds+unix:///x?socket={tmp_path}/s&tls-certificates={certificates / client}"
            peers.run("nbdinfo", "--size", where, expect=expect)


class running:  # noqa: N801 - used like a function
    def __init__(self, program, *argv, until):
        self.process = subprocess.Popen([*peers.peer(program), *argv], stderr=subprocess.PIPE)
        self.until = until

    def __enter__(self):
        deadline = time.monotonic() + 10
        while not self.until.exists():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.communicate()


class held:  # noqa: N801 - used like a function
    """A libnbd client that stays connected."""

    def __init__(self, where):
        script = (
            "import nbd, sys; h = nbd.NBD(); h.set_uri_allow_local_file(True); h.connect_uri(sys.argv[1]); "
            "h.pread(4096, 0); print('up', flush=True); sys.stdin.read(); h.pread(4096, 0); print('still')"
        )
        self.process = subprocess.Popen(
            [*peers.libnbd_python(), "-c", script, where], stdin=-1, stdout=-1, stderr=-1, text=True
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "up\n", self.process.stderr.read()
        return self

    def __exit__(self, *exc_info):
        said, errors = self.process.communicate()
        assert said == "still\n", errors


# -- keys, and nothing ---------------------------------------------------------------------------------------


def test_shared_keys(daemon, certificates):
    port = serve(daemon, "psk", certificates / "keys")
    good = f"nbds://alice@localhost:{port}/x?tls-psk-file={certificates / 'keys' / 'keys.psk'}"
    peers.run("nbdinfo", "--size", good)
    peers.run("nbdinfo", "--size", good.replace("/keys/", "/otherkeys/"), expect=1)
    peers.run("nbdinfo", "--size", good.replace("alice@", "bob@"), expect=1)
    peers.run("qemu-img", "info", *qemu(port, f"tls-creds-psk,dir={certificates / 'keys'},username=alice"))
    peers.run(
        "qemu-img", "info", *qemu(port, f"tls-creds-psk,dir={certificates / 'otherkeys'},username=alice"), expect=1
    )


@pytest.mark.parametrize("priority", ["NORMAL", "NORMAL:-VERS-TLS1.3"])
def test_the_identity_of_a_client_is_the_user_of_its_key(daemon, certificates, tmp_path, caplog, priority):
    caplog.set_level("INFO")
    keys, users = tmp_path / "keys.psk", ["alice", "bob", "carol"]
    keys.write_text("".join(f"{user}:{number:064x}\n" for number, user in enumerate(users)))
    port = serve(daemon, "psk", tmp_path, priority=priority)
    with contextlib.ExitStack() as stack:
        clients = [held(f"nbds://{user}@localhost:{port}/x?tls-psk-file={keys}") for user in users]  # all at once
        for client in clients:
            stack.enter_context(client)
        seen = daemon.execute("query-block-exports")[0]["clients"]
        assert sorted(client["identity"] for client in seen) == users
    for user in users:
        assert logged(caplog, f"export 'x': connected as '{user}'")


def test_anonymous(daemon, certificates, tmp_path):
    (tmp_path / "empty").mkdir()
    port = serve(daemon, "anon", tmp_path / "empty")
    peers.run("qemu-img", "info", *qemu(port, "tls-creds-anon"))
    nbdinfo(port, certificates / "client", expect=1)


@pytest.mark.parametrize("kind", ["psk", "anon"])
def test_authorization_needs_names(daemon, certificates, kind):
    with pytest.raises(Error, match="tls-authz needs clients with certificates"):
        serve(daemon, kind, certificates / "keys", authz="az")


# -- no TLS where there should be some, and the other way around ---------------------------------------------


def test_nothing_is_to_be_had_without_tls(daemon, certificates, caplog):
    caplog.set_level("INFO")
    port = serve(daemon, "x509", certificates / "server")
    said = peers.run("nbdinfo", f"nbd://localhost:{port}/x", expect=1).stderr
    assert "TLS" in said
    assert "TLS" in peers.run("qemu-img", "info", f"nbd://localhost:{port}/x", expect=1).stderr
    with Client.open(("127.0.0.1", int(port))) as client:
        client.greet()
        (reply,) = client.option(Opt.LIST)
        assert reply.kind == RepError.TLS_REQD
    peers.run("nbdinfo", uri(port, certificates / "client").replace("/x?", "/y?"), expect=1)
    for told in ("Option 0x3 not permitted before TLS", "export 'y' not present"):
        assert logged(caplog, f"it was refused: {told}"), caplog.text


def test_a_server_without_tls_says_so(daemon, certificates):
    daemon.export("n", "x")
    creds = ["--object", f"tls-creds-x509,id=c,endpoint=client,dir={certificates / 'client'}"]
    image = f"driver=nbd,path={daemon.socket},export=x,tls-creds=c,tls-hostname=localhost"
    said = peers.run("qemu-img", "info", *creds, "--image-opts", image, expect=1).stderr
    assert "TLS not configured" in said


# -- life ----------------------------------------------------------------------------------------------------


def test_credentials_are_replaced_while_we_serve(daemon, certificates):
    port = serve(daemon, "x509", certificates / "server")
    with held(uri(port, certificates / "client")):
        daemon.execute("object-del", id="t")
        nbdinfo(port, certificates / "client")  # those that were there stay in use until there are others
        daemon.execute(
            "object-add",
            qom_type="tls-creds-x509",
            id="t",
            endpoint="server",
            dir=str(certificates / "renamed"),
            sanity_check=False,
        )
        nbdinfo(port, certificates / "client", expect=1)  # it does not call itself localhost any more


@pytest.mark.parametrize("weaker", [{"verify_peer": False}, {"qom_type": "tls-creds-psk"}])
def test_credentials_that_let_in_more_people_replace_nothing(daemon, certificates, weaker, caplog):
    port = serve(daemon, "x509", certificates / "server")
    daemon.execute("object-del", id="t")
    directory = certificates / ("keys" if "qom_type" in weaker else "server")
    options = {"qom_type": "tls-creds-x509", "id": "t", "endpoint": "server", "dir": str(directory)}
    daemon.execute("object-add", **options | weaker)
    nbdinfo(port, certificates / "nobody", expect=1)
    nbdinfo(port, certificates / "client")
    assert logged(caplog, "object 't' does not fit its NBD server")


def test_a_connection_moves_between_loops_under_traffic(daemon, certificates, tmp_path):
    port = serve(daemon, "x509", certificates / "server")
    for name in ("io0", "io1"):
        daemon.execute("object-add", qom_type="iothread", id=name)
    command = [*peers.peer("nbdcopy"), "--connections=1", uri(port, certificates / "client"), str(tmp_path / "copy")]
    moves = 0
    for _ in range(3):
        copying = subprocess.Popen(command)
        while copying.poll() is None:
            options = {"type": "nbd", "id": "moving", "name": "moving", "node_name": "n", "iothread": f"io{moves % 2}"}
            daemon.execute("block-export-add", **options)
            daemon.execute("block-export-del", id="moving")
            moves += 1
        assert copying.returncode == 0
        assert (tmp_path / "copy").read_bytes() == CONTENT
    assert moves > 3


def test_a_handshake_that_does_not_go_on_stops_nobody(daemon, certificates):
    port = serve(daemon, "x509", certificates / "server")
    hanging = []
    for part in (b"", b"\x16", b"\x16\x03\x01\x40\x00" + bytes(100)):
        client = Client.open(("127.0.0.1", int(port)))
        client.greet()
        client.option(Opt.STARTTLS)
        client.sock.setblocking(True)
        client.sock.sendall(part)
        hanging.append(client)
    nbdinfo(port, certificates / "client")
    for client in hanging:
        client.close()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.0\r\n\r\n", bytes(2000), b"\x16\x03\x01\xff\xff" + bytes(66_000), os.urandom(300)]
)
def test_garbage_instead_of_tls(daemon, certificates, garbage):
    port = serve(daemon, "x509", certificates / "server")
    with Client.open(("127.0.0.1", int(port))) as client:
        client.greet()
        client.option(Opt.STARTTLS)
        client.sock.setblocking(True)
        client.sock.settimeout(15)
        try:
            client.sock.sendall(garbage)
            client.sock.shutdown(socket.SHUT_WR)
            while client.sock.recv(4096):
                pass
        except ConnectionError:
            pass
    nbdinfo(port, certificates / "client")
