"""TLS handshakes of our credentials with GnuTLS's own programs and with QEMU, from the same directories."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type

import peers
import pki
from blkferry import Daemon
from blkferry.objects.authz.list_file import parse
from blkferry.objects.tls.names import distinguished_name

pytestmark = peers.requires("certtool", "gnutls-cli", "gnutls-serv", "psktool", "qemu-img", "qemu-storage-daemon")

MANUAL = (pathlib.Path(__file__).parents[2] / "docs" / "tls.md").read_text()

STARTTLS, ABORT = 5, 2
SAID = "from client to server"
ANSWER = "from server to client"
VERSIONS = ["NORMAL", "NORMAL:-VERS-TLS1.3"]
PSK = ":-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK"


async def credentials(kind, endpoint, directory=None, **options):
    """A context as object-add makes it."""
    if directory is not None:
        options["dir"] = str(directory)
    async with Daemon() as daemon:
        added = {"qom-type": f"tls-creds-{kind}", "id": "tls", "endpoint": endpoint, **options}
        await daemon.execute("object-add", added)
        return daemon.objects["tls"].context()


# -- GnuTLS is the client ------------------------------------------------------------------------------------


def serve_once(context, listener, outcome):
    """Answer one client; `outcome` gets what it said and the version, or the error."""
    plain, _address = listener.accept()
    plain.settimeout(20)
    try:
        with context.wrap_socket(plain, server_side=True) as secured:
            said = secured.recv(100).decode().strip()
            secured.sendall(f"{ANSWER}\n".encode())
            outcome.extend((said, secured.version()))
            with contextlib.suppress(OSError):
                secured.recv(1)  # it says goodbye first
                secured.unwrap()
    except OSError as error:
        outcome.append(error)
    finally:
        plain.close()


def gnutls_cli(context, *args, expect=0):
    """Have gnutls-cli connect to us; what it printed and how the server saw it."""
    outcome = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve_once, args=(context, listener, outcome))
        server.start()
        port = listener.getsockname()[1]
        command = ["gnutls-cli", "-p", port, "--no-ocsp", *args, "127.0.0.1"]
        done = peers.run(command[0], *map(str, command[1:]), stdin=f"{SAID}\n", expect=expect)
        server.join(30)
    return done.stdout, outcome


def x509_args(directory, priority, hostname="localhost"):
    yield from ("--priority", priority, "--verify-hostname", hostname, "--sni-hostname", hostname)
    yield from ("--x509cafile", directory / "ca-cert.pem")
    yield from ("--x509certfile", directory / "client-cert.pem", "--x509keyfile", directory / "client-key.pem")


@pytest.mark.parametrize("priority", VERSIONS)
async def test_gnutls_client_with_a_certificate(tmp_path, priority):
    directory, _ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "server", directory)
    printed, outcome = gnutls_cli(context, *x509_args(directory, priority))
    assert ANSWER in printed
    assert outcome == [SAID, "TLSv1.2" if "-VERS" in priority else "TLSv1.3"]


async def test_gnutls_client_of_another_authority_is_refused(tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "server", directory)
    stranger = pki.issue("stranger", pki.authority("elsewhere"))
    pki.write(directory, client=stranger)
    printed, outcome = gnutls_cli(context, *x509_args(directory, "NORMAL"), expect=None)
    assert ANSWER not in printed
    assert isinstance(outcome[0], ssl.SSLCertVerificationError)


async def test_gnutls_client_without_a_certificate_is_refused(tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "server", directory)
    args = list(x509_args(directory, "NORMAL"))[:-4]
    printed, outcome = gnutls_cli(context, *args, expect=None)
    assert ANSWER not in printed
    assert outcome[0].reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    lax = await credentials("x509", "server", directory, **{"verify-peer": False})
    assert gnutls_cli(lax, *args)[1] == [SAID, "TLSv1.3"]


async def test_gnutls_client_sees_an_impostor(tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "server", directory)
    pki.write(directory, pki.authority("elsewhere"))
    printed, outcome = gnutls_cli(context, *x509_args(directory, "NORMAL"), expect=1)
    assert ANSWER not in printed
    assert outcome[0] != SAID


@pytest.fixture
def keys(tmp_path):
    """A directory with keys as psktool makes them, and the key of its user qemu."""
    directory = tmp_path / "psk"
    directory.mkdir()
    for user in ("other", "qemu"):
        peers.run("psktool", "-u", user, "-p", directory / "keys.psk")
    return directory, re.search("^qemu:(.*)$", (directory / "keys.psk").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("priority", [priority + PSK for priority in VERSIONS] + ["NORMAL:-VERS-TLS1.3:-KX-ALL:+PSK"])
async def test_gnutls_client_with_a_key(keys, priority):
    directory, key = keys
    context = await credentials("psk", "server", directory)
    args = ("--priority", priority, "--pskusername", "qemu", "--pskkey")
    printed, outcome = gnutls_cli(context, *args, key)
    assert ANSWER in printed
    assert outcome == [SAID, "TLSv1.2" if "-VERS" in priority else "TLSv1.3"]
    printed, outcome = gnutls_cli(context, *args, key[::-1], expect=1)
    assert ANSWER not in printed
    assert isinstance(outcome[0], ssl.SSLError)


@pytest.mark.parametrize("own_params", [False, True])
async def test_gnutls_client_without_credentials(tmp_path, own_params):
    if own_params:
        params = peers.run("certtool", "--get-dh-params", "--sec-param", "medium").stdout
        (tmp_path / "dh-params.pem").write_text(params[params.index("-----BEGIN") :])
    context = await credentials("anon", "server", tmp_path if own_params else None)
    printed, outcome = gnutls_cli(context, "--priority", "NORMAL:+ANON-DH", expect=None)
    assert ANSWER in printed
    assert outcome == [SAID, "TLSv1.2"]
    assert gnutls_cli(context, "--priority", "NORMAL", "--insecure", expect=1)[1][0] != SAID


# -- GnuTLS is the server ------------------------------------------------------------------------------------


@contextlib.contextmanager
def gnutls_serv(*args):
    """Run gnutls-serv, which echoes; its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*peers.peer("gnutls-serv"), "-p", port, "--echo", *args]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            for line in server.stdout:  # it says so for each address it listens on
                if b"0.0.0.0" in line and b"done" in line:
                    break
            drain = threading.Thread(target=server.stdout.read)
            drain.start()
            yield port
        finally:
            server.kill()
            drain.join()


def echo(context, port, hostname=None):
    """Connect to gnutls-serv and say something; the version."""
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        context.wrap_socket(plain, server_hostname=hostname) as secured,
    ):
        secured.sendall(f"{SAID}\n".encode())
        assert secured.recv(100).decode().strip() == SAID
        return secured.version()


@pytest.mark.parametrize("priority", VERSIONS)
async def test_gnutls_server_with_a_certificate(tmp_path, priority):
    directory, ca = pki.complete(tmp_path / "pki")
    files = [f"--x509{name}={directory / path}" for name, path in (
        ("cafile", "ca-cert.pem"), ("certfile", "server-cert.pem"), ("keyfile", "server-key.pem")
    )]  # fmt: skip
    context = await credentials("x509", "client", directory)
    stranger = pki.write(tmp_path / "stranger", ca, client=pki.issue("stranger", pki.authority("elsewhere")))
    theirs = await credentials("x509", "client", stranger, **{"sanity-check": False})
    elsewhere = await credentials("x509", "client", pki.write(tmp_path / "elsewhere", pki.authority("elsewhere")))
    with gnutls_serv(*files, "--priority", priority, "--require-client-cert", "--verify-client-cert") as port:
        assert echo(context, port, "localhost") == ("TLSv1.2" if "-VERS" in priority else "TLSv1.3")
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            echo(context, port, "elsewhere")
        with pytest.raises(ssl.SSLCertVerificationError, match="issuer"):
            echo(elsewhere, port, "localhost")
        with pytest.raises((OSError, AssertionError)):
            echo(theirs, port, "localhost")


@pytest.mark.parametrize("priority", [priority + PSK for priority in VERSIONS])
async def test_gnutls_server_with_keys(keys, tmp_path, priority):
    directory, key = keys
    context = await credentials("psk", "client", directory)
    other = await credentials("psk", "client", directory, username="other")
    (tmp_path / "keys.psk").write_text(f"qemu:{key[::-1]}\n")
    wrong = await credentials("psk", "client", tmp_path)
    with gnutls_serv("--pskpasswd", directory / "keys.psk", "--priority", priority) as port:
        for each in (context, other):
            assert echo(each, port) == ("TLSv1.2" if "-VERS" in priority else "TLSv1.3")
        with pytest.raises(ssl.SSLError):
            echo(wrong, port)


async def test_gnutls_server_without_credentials():
    context = await credentials("anon", "client")
    with gnutls_serv("--priority", "NORMAL:+ANON-DH") as port:
        assert echo(context, port) == "TLSv1.2"


# -- What the manual says ------------------------------------------------------------------------------------


async def test_the_commands_of_the_manual_make_what_works(tmp_path):
    section = MANUAL.partition("## Certificates")[2].partition("\n## ")[0]
    commands = re.findall(r"^    ((?:certtool|printf) (?:.*\\\n)*.*)$", section, re.MULTILINE)
    assert len(commands) == 9
    peers.run("sh", "-ec", "\n".join(["cd $0", *commands]), tmp_path)
    context = await credentials("x509", "server", tmp_path)
    args = [
        arg.replace("localhost", "disks.lab") if isinstance(arg, str) else arg for arg in x509_args(tmp_path, "NORMAL")
    ]
    assert gnutls_cli(context, *args)[1] == [SAID, "TLSv1.3"]
    assert (await credentials("x509", "client", tmp_path)).verify_mode is ssl.CERT_REQUIRED


def test_the_rules_of_the_manual_are_rules():
    (example,) = re.findall(r'^    (\{"policy".*?\]\})$', MANUAL, re.MULTILINE | re.DOTALL)
    rules = parse(example.encode(), "manual")
    assert [rule.match for rule in rules.rules] == ["CN=client1", "O=Lab,CN=*"]


# -- QEMU is the server --------------------------------------------------------------------------------------


@contextlib.contextmanager
def qemu(directory, *objects, authz=None):
    """An NBD server of QEMU with TLS; its socket, and what reads the log."""
    path, log = directory / "qemu.sock", directory / "qemu.log"
    server = f"addr.type=unix,addr.path={path},tls-creds=tls" + (f",tls-authz={authz}" if authz else "")
    command = peers.peer("qemu-storage-daemon")
    for each in objects:
        command += ["--object", each]
    with log.open("wb") as errors:
        running = subprocess.Popen([*command, "--nbd-server", server], stderr=errors)
        try:
            wait_for(lambda: path.exists() or running.poll() is not None)
            assert running.poll() is None, log.read_text()
            yield path, log
        finally:
            running.kill()
            running.wait()


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within ten seconds")


def receive(sock, length):
    """Exactly so many bytes; MSG_WAITALL does not wait on sockets with a timeout."""
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise ConnectionResetError("the peer went away")
        data += piece
    return data


def abort_over_tls(path, context, hostname=None):
    """Begin TLS with an NBD server, and say goodbye within it. Raises OSError when it does not let us."""
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(20)
        plain.connect(os.fspath(path))
        assert receive(plain, 18)[:8] == b"NBDMAGIC"
        plain.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", STARTTLS, 0))
        assert struct.unpack(">QIII", receive(plain, 20))[1:3] == (STARTTLS, 1)
        with context.wrap_socket(plain, server_hostname=hostname) as secured:
            secured.sendall(struct.pack(">8sII", b"IHAVEOPT", ABORT, 0))
            assert struct.unpack(">QIII", receive(secured, 20))[1:] == (ABORT, 1, 0)


async def test_qemu_with_certificates(tmp_path):
    directory, ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "client", directory)
    stranger = pki.write(tmp_path / "stranger", ca, client=pki.issue("stranger", pki.authority("elsewhere")))
    theirs = await credentials("x509", "client", stranger, **{"sanity-check": False})
    with qemu(tmp_path, f"tls-creds-x509,id=tls,endpoint=server,dir={directory}") as (path, _log):
        abort_over_tls(path, context, "localhost")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            abort_over_tls(path, theirs, "localhost")


async def test_qemu_with_keys(keys, tmp_path):
    directory, key = keys
    context = await credentials("psk", "client", directory)
    (tmp_path / "keys.psk").write_text(f"qemu:{key[::-1]}\n")
    wrong = await credentials("psk", "client", tmp_path)
    with qemu(tmp_path, f"tls-creds-psk,id=tls,endpoint=server,dir={directory}") as (path, _log):
        abort_over_tls(path, context)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            abort_over_tls(path, wrong)


async def test_qemu_without_credentials(tmp_path):
    context = await credentials("anon", "client")
    with qemu(tmp_path, "tls-creds-anon,id=tls,endpoint=server") as (path, _log):
        abort_over_tls(path, context)


def names():
    """Subjects that are hard to write, or that mean something else when they are written carelessly."""
    printable, utf8, ia5 = _ASN1Type.PrintableString, _ASN1Type.UTF8String, _ASN1Type.IA5String
    teletex, bmp, universal = _ASN1Type.T61String, _ASN1Type.BMPString, _ASN1Type.UniversalString

    def name(*parts):
        return x509.Name(
            [
                x509.RelativeDistinguishedName(
                    [
                        x509.NameAttribute(x509.ObjectIdentifier(oid), value, kind, _validate=False)
                        for oid, kind, value in part
                    ]
                )
                for part in parts
            ]
        )

    odd = ["plain", 'a,b+c"d\\e<f>g;h=i', "#hash", " a", "a ", " ", "  ", "a#b", "zoë ☃", "-", "x\ny", "*"]
    for text in odd:
        yield name([("2.5.4.10", utf8, "Lab")], [("2.5.4.3", utf8, text)])
    # Every type that GnuTLS has a name for, and some that it has not, as strings of each kind.
    types = [f"2.5.4.{arc}" for arc in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 20, 41, 42, 43, 44, 45)]
    types += ["2.5.4.46", "2.5.4.51", "2.5.4.65", "2.5.4.72", "2.5.4.97", "1.2.3.4", "2.999.1"]
    types += [f"1.3.6.1.5.5.7.9.{arc}" for arc in range(1, 6)] + ["1.3.6.1.5.5.7.8.5"]
    types += [f"1.3.6.1.4.1.311.60.2.1.{arc}" for arc in (1, 2, 3)] + ["1.2.840.113556.1.4.656"]
    types += [f"1.2.840.113549.1.9.{arc}" for arc in (1, 2, 7, 8, 20, 21)]
    types += ["0.9.2342.19200300.100.1.1", "0.9.2342.19200300.100.1.25", "1.2.643.3.131.1.1"]
    types += ["1.2.643.100.1", "1.2.643.100.3"]
    for kind in (printable, utf8, ia5, teletex, bmp, universal, _ASN1Type.NumericString):
        for chunk in range(0, len(types), 12):
            yield name(*([(oid, kind, "x1")] for oid in types[chunk : chunk + 12]))
    yield name([("2.5.4.3", bmp, "zoë")], [("2.5.4.3", universal, "x")], [("2.5.4.3", teletex, "zoë")])
    yield name(*([("2.5.4.3", teletex, text)] for text in ("a\nb", "a\x7fb", "\x01", "#1", " ")))
    yield name([("2.5.4.3", utf8, "a\0b")], [("2.5.4.3", bmp, "a\0b")], [("2.5.4.3", teletex, "a\0b")])
    yield name(
        [("2.5.4.11", utf8, "One")], [("2.5.4.11", utf8, "Two")], [("2.5.4.3", utf8, "a"), ("2.5.4.10", utf8, "b")]
    )


def said_something(log, before):
    return log.read_bytes()[before:].endswith(b"\n")


async def test_names_are_written_as_qemu_compares_them(tmp_path):
    directory, ca = pki.complete(tmp_path / "pki")
    creds = f"tls-creds-x509,id=tls,endpoint=server,dir={directory}"
    denial = re.compile(r"TLS x509 authz check for (.*) is denied\n", re.DOTALL)
    differing = []
    with qemu(tmp_path, creds, "authz-simple,id=authz,identity=nobody", authz="authz") as (path, log):
        for name in names():
            pair = pki.issue(name, ca)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(directory / "ca-cert.pem")
            pki.write(tmp_path / "client", client=pair)
            context.load_cert_chain(tmp_path / "client/client-cert.pem", tmp_path / "client/client-key.pem")
            before = log.stat().st_size
            with contextlib.suppress(OSError):
                abort_over_tls(path, context, "localhost")
            wait_for(functools.partial(said_something, log, before))
            told = log.read_bytes()[before:].decode()
            found = denial.search(told)
            if found is None or found[1] != distinguished_name(pair.der):
                differing.append((told, distinguished_name(pair.der)))
    assert not differing


# -- QEMU is the client --------------------------------------------------------------------------------------


def begin_tls(context, listener, outcome):
    """Begin TLS with one NBD client and take one option; `outcome` gets its magic, or the error."""
    plain, _address = listener.accept()
    plain.settimeout(20)
    try:
        plain.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
        asked = struct.unpack(">I8sII", receive(plain, 20))
        assert asked[2:] == (STARTTLS, 0)
        plain.sendall(struct.pack(">QIII", 0x3E889045565A9, STARTTLS, 1, 0))
        with context.wrap_socket(plain, server_side=True) as secured:
            outcome.append(receive(secured, 8))
    except OSError as error:
        outcome.append(error)
    finally:
        plain.close()


def qemu_img(context, creds):
    """Have qemu-img connect to us; how we saw it."""
    outcome = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=begin_tls, args=(context, listener, outcome))
        server.start()
        image = f"driver=nbd,host=127.0.0.1,port={listener.getsockname()[1]},tls-creds=tls"
        if "x509" in creds:
            image += ",tls-hostname=localhost"
        # It fails at last, for there is no export.
        peers.run("qemu-img", "info", "--object", f"{creds},id=tls,endpoint=client", "--image-opts", image, expect=1)
        server.join(30)
    return outcome[0]


async def test_qemu_client_with_a_certificate(tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    context = await credentials("x509", "server", directory)
    assert qemu_img(context, f"tls-creds-x509,dir={directory}") == b"IHAVEOPT"
    pki.write(directory, client=pki.issue("stranger", pki.authority("elsewhere")))
    refused = qemu_img(context, f"tls-creds-x509,dir={directory},sanity-check=off")
    assert isinstance(refused, ssl.SSLCertVerificationError)


async def test_qemu_client_with_a_key(keys, tmp_path):
    directory, key = keys
    context = await credentials("psk", "server", directory)
    assert qemu_img(context, f"tls-creds-psk,dir={directory}") == b"IHAVEOPT"
    assert qemu_img(context, f"tls-creds-psk,dir={directory},username=other") == b"IHAVEOPT"
    (tmp_path / "keys.psk").write_text(f"qemu:{key[::-1]}\n")
    assert isinstance(qemu_img(context, f"tls-creds-psk,dir={tmp_path}"), ssl.SSLError)


async def test_qemu_client_without_credentials():
    assert qemu_img(await credentials("anon", "server"), "tls-creds-anon") == b"IHAVEOPT"
