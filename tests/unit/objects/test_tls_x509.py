"""Certificates: what is refused when they are loaded, in QEMU's words, and what the contexts then allow."""

import ssl

import pytest

import pki
from blkferry import Daemon
from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls.certificate import Certificate
from blkferry.objects.tls.creds import MAX_FILE


@pytest.fixture
async def daemon():
    async with Daemon() as daemon:
        yield daemon


@pytest.fixture
def ca():
    return pki.authority()


async def add(daemon, directory, endpoint="server", name="t", **options):
    options |= {"dir": str(directory), "endpoint": endpoint}
    await daemon.execute("object-add", {"qom-type": "tls-creds-x509", "id": name, **options})
    return daemon.objects[name]


async def refused(daemon, directory, endpoint="server", **options):
    with pytest.raises(Error) as caught:
        await add(daemon, directory, endpoint, **options)
    assert "t" not in daemon.objects
    return str(caught.value).replace(f"{directory}/", "")


def connect(server, client, hostname="localhost"):
    """Shake hands in memory; the two ends. Raises what the first end that gives up raises."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up, server_hostname=hostname), server.wrap_bio(up, down, server_side=True)
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[0].write(b"ping")
    assert ends[1].read() == b"ping"
    return ends


async def test_both_ends_know_each_other(daemon, tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    server, client = await add(daemon, directory), await add(daemon, directory, "client", "c")
    assert (server.endpoint, server.is_x509, server.verify_peer) == ("server", True, True)
    ends = connect(server.context(), client.context())
    assert client.identity(ends[0]) == "CN=localhost"
    assert server.identity(ends[1]) == "CN=client1"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(server.context(), client.context(), "elsewhere")
    for hostname in (None, "elsewhere"):
        connect(server.context(), client.context(named=False), hostname)
    assert server.context(named=False) is server.context()


async def test_a_client_without_a_name_to_expect_checks_the_rest(daemon, tmp_path, ca):
    server = await add(daemon, pki.write(tmp_path / "pki", ca, server=pki.issue("localhost", ca)))
    client = await add(daemon, pki.write(tmp_path / "c", pki.authority("elsewhere")), "client", "c")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        connect(server.context(), client.context(named=False), None)


async def test_a_client_without_a_certificate_needs_verify_peer_off(daemon, tmp_path, ca):
    server_pair = pki.issue("localhost", ca, pki.LOCALHOST)
    directory = pki.write(tmp_path / "pki", ca, server=server_pair)
    client = (await add(daemon, directory, "client", "c")).context()
    strict, lax = await add(daemon, directory), await add(daemon, directory, name="lax", **{"verify-peer": False})
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        connect(strict.context(), client)
    assert not lax.verify_peer
    assert lax.identity(connect(lax.context(), client)[1]) == ""


async def test_strangers_and_the_revoked_are_refused(daemon, tmp_path, ca):
    server = pki.issue("localhost", ca, pki.LOCALHOST)
    good, lost = pki.issue("good", ca), pki.issue("lost", ca)
    context = (
        await add(daemon, pki.write(tmp_path / "s", ca, server=server, ca_crl=pki.revocations(ca, lost)))
    ).context()
    clients = {}
    for name, pair in (("good", good), ("lost", lost)):
        clients[name] = (await add(daemon, pki.write(tmp_path / name, ca, client=pair), "client", name)).context()
    stranger = pki.issue("stranger", pki.authority("elsewhere"))
    directory = pki.write(tmp_path / "stranger", ca, client=stranger)
    clients["stranger"] = (await add(daemon, directory, "client", "st", **{"sanity-check": False})).context()
    connect(context, clients["good"])
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        connect(context, clients["lost"])
    with pytest.raises(ssl.SSLCertVerificationError, match="issuer certificate"):
        connect(context, clients["stranger"])


async def test_an_intermediate_authority_may_be_the_trusted_one(daemon, tmp_path, ca):
    middle = pki.issue("middle", ca, pki.CA_CONSTRAINTS)
    directory = pki.write(tmp_path / "pki", middle, server=pki.issue("localhost", middle, pki.LOCALHOST))
    await add(daemon, directory)


@pytest.mark.parametrize(
    ("extensions", "message"),
    [
        ([], None),
        ([pki.NO_CA, (pki.usage("digital_signature"), True)], None),
        ([pki.CA_CONSTRAINTS], "The certificate {0}-cert.pem basic constraints show a CA, but we need one for a {0}"),
        ([(pki.usage("key_encipherment"), True)], "Certificate {0}-cert.pem usage does not permit digital signature"),
        ([(pki.usage("key_encipherment"), False)], None),
        ([(pki.purposes("code"), True)], "Certificate {0}-cert.pem purpose does not allow use with a TLS {0}"),
        ([(pki.purposes("code"), False)], None),
        ([(pki.purposes("code", "any"), True)], None),
        ([(pki.purposes("server", "client"), True)], None),
    ],
)
@pytest.mark.parametrize("endpoint", ["server", "client"])
async def test_what_a_certificate_is_for_is_checked(daemon, tmp_path, ca, extensions, message, endpoint):
    directory = pki.write(tmp_path / "pki", ca, **{endpoint: pki.issue("x", ca, *extensions)})
    if message is None:
        await add(daemon, directory, endpoint)
    else:
        assert await refused(daemon, directory, endpoint) == message.format(endpoint)
        await add(daemon, directory, endpoint, **{"sanity-check": False})


@pytest.mark.parametrize(
    ("extensions", "message"),
    [
        ([], "The certificate ca-cert.pem is missing basic constraints for a CA"),
        ([pki.NO_CA], "The certificate ca-cert.pem basic constraints do not show a CA"),
        (
            [pki.CA_CONSTRAINTS, (pki.usage("digital_signature"), True)],
            "Certificate ca-cert.pem usage does not permit certificate signing",
        ),
    ],
)
@pytest.mark.parametrize("endpoint", ["server", "client"])
async def test_the_authority_must_be_one(daemon, tmp_path, extensions, message, endpoint):
    ca = pki.issue("ca", None, *extensions)
    pairs = {"server": pki.issue("x", ca)} if endpoint == "server" else {}
    assert await refused(daemon, pki.write(tmp_path / "pki", ca, **pairs), endpoint) == message


@pytest.mark.parametrize("role", ["server", "CA"])
async def test_certificates_out_of_their_time_are_refused(daemon, tmp_path, role):
    for start, end, message in (
        (pki.NOW - 2 * pki.DAY, pki.NOW - pki.DAY, f"The {role} certificate {role.lower()}-cert.pem has expired"),
        (pki.NOW + pki.DAY, pki.NOW + 2 * pki.DAY, f"The {role} certificate {role.lower()}-cert.pem is not yet active"),
    ):
        times = {"start": start, "end": end}
        ca = pki.issue("ca", None, pki.CA_CONSTRAINTS, **(times if role == "CA" else {}))
        server = pki.issue("localhost", ca, **(times if role == "server" else {}))
        assert await refused(daemon, pki.write(tmp_path / "pki", ca, server=server)) == message


@pytest.mark.parametrize("endpoint", ["server", "client"])
async def test_the_authority_must_have_signed_it(daemon, tmp_path, ca, endpoint):
    directory = pki.write(tmp_path / "pki", pki.authority("other"), **{endpoint: pki.issue("x", ca)})
    told = await refused(daemon, directory, endpoint)
    assert told == (
        f"Our own certificate {endpoint}-cert.pem failed validation against ca-cert.pem: "
        "The certificate hasn't got a known issuer"
    )
    # Of the same name, but with another key.
    impostor = pki.write(tmp_path / "impostor", pki.authority("ca"), **{endpoint: pki.issue("x", ca)})
    assert "failed validation" in await refused(daemon, impostor, endpoint)
    await add(daemon, directory, endpoint, **{"sanity-check": False})


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
async def test_missing_and_wrong_files_are_named(daemon, tmp_path, ca, name):
    directory = pki.write(tmp_path / "pki", ca, server=pki.issue("localhost", ca))
    path = directory / name
    path.write_bytes(b"junk")
    assert name in await refused(daemon, directory)
    assert name in await refused(daemon, directory, **{"sanity-check": False})
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    assert name in await refused(daemon, directory)
    path.write_bytes(bytes(MAX_FILE + 1))
    assert await refused(daemon, directory) == f"Unable to access credentials {name}: it is larger than 1 MiB"
    path.unlink()
    assert await refused(daemon, directory) == f"Unable to access credentials {name}: No such file or directory"


@pytest.mark.parametrize(
    ("name", "what"), [("ca_crl", "Cannot load CRL"), ("dh_params", "Unable to load DH parameters")]
)
async def test_optional_files_must_be_right_when_they_are_there(daemon, tmp_path, ca, name, what):
    directory = pki.write(tmp_path / "pki", ca, server=pki.issue("localhost", ca), **{name: b"junk"})
    assert (await refused(daemon, directory)).startswith(what)
    (directory / f"{name.replace('_', '-')}.pem").write_bytes(ca.pem)  # no CRL, and no parameters
    assert (await refused(daemon, directory)).startswith(what)


async def test_the_key_must_be_the_certificates(daemon, tmp_path, ca):
    directory = pki.write(tmp_path / "pki", ca, server=pki.issue("localhost", ca))
    (directory / "server-key.pem").write_bytes(pki.issue("other", ca).key_pem())
    told = await refused(daemon, directory)
    assert told.startswith("Cannot load certificate 'server-cert.pem' & key 'server-key.pem': ")
    assert told.endswith(": The certificate and the given key do not match.")


async def test_an_encrypted_key_needs_its_password_and_nobody_sees_it(daemon, tmp_path, ca, caplog):
    directory = pki.write(tmp_path / "pki", ca, server=pki.issue("localhost", ca), password=b"open sesame")
    failed = "Cannot load certificate 'server-cert.pem' & key 'server-key.pem': Decryption has failed."
    assert await refused(daemon, directory) == failed
    assert await refused(daemon, directory, passwordid="s") == "No secret with id 's'"
    for name, data in (("s", "open sesame"), ("wrong", "shut"), ("long", "x" * 2000)):
        await daemon.execute("object-add", {"qom-type": "secret", "id": name, "data": data})
    assert await refused(daemon, directory, passwordid="wrong") == failed
    assert await refused(daemon, directory, passwordid="long") == failed
    creds = await add(daemon, directory, passwordid="s")
    assert "sesame" not in repr(vars(creds)) + caplog.text


async def test_a_directory_is_needed(daemon):
    with pytest.raises(Error, match="Missing 'dir' property value"):
        await daemon.execute("object-add", {"qom-type": "tls-creds-x509", "id": "t"})


async def test_half_a_client_certificate_is_none_and_said_to_be(daemon, tmp_path, ca, caplog):
    directory = pki.write(tmp_path / "pki", ca, client=pki.issue("c", ca))
    (directory / "client-key.pem").unlink()
    await add(daemon, directory, "client")
    assert "client-cert.pem is not used" in caplog.text


@pytest.mark.parametrize(
    ("priority", "versions"),
    [
        ("NORMAL", ("TLSv1.3", "TLSv1.2")),
        ("@SYSTEM:-VERS-TLS1.0:!VERS-TLS1.1", ("TLSv1.3", "TLSv1.2")),
        ("NORMAL:-VERS-TLS1.3", ("TLSv1.2",)),
        ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.3", ("TLSv1.3",)),
    ],
)
async def test_a_priority_chooses_versions(daemon, tmp_path, priority, versions):
    directory, _ca = pki.complete(tmp_path / "pki")
    server = (await add(daemon, directory, priority=priority)).context()
    for version, name in ((ssl.TLSVersion.TLSv1_3, "TLSv1.3"), (ssl.TLSVersion.TLSv1_2, "TLSv1.2")):
        client = (await add(daemon, directory, "client", name.replace(".", ""))).context()
        client.minimum_version = client.maximum_version = version
        if name in versions:
            assert connect(server, client)[0].version() == name
        else:
            with pytest.raises(ssl.SSLError):
                connect(server, client)


@pytest.mark.parametrize("priority", ["SECURE256", "", "NORMAL:+VERS-TLS1.0", "NORMAL:-AES-128-GCM", "NORMAL:%COMPAT"])
async def test_a_priority_that_cannot_be_heeded_is_refused(daemon, tmp_path, priority):
    directory, _ca = pki.complete(tmp_path / "pki")
    assert "is not supported" in await refused(daemon, directory, priority=priority)


async def test_a_priority_must_leave_something(daemon, tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    assert "leaves no version" in await refused(daemon, directory, priority="NORMAL:-VERS-ALL")


def test_a_cut_or_changed_certificate_raises_nothing_but_value_error():
    whole = pki.issue("x", None, pki.CA_CONSTRAINTS, (pki.usage("crl_sign"), True), (pki.purposes("any"), True)).der
    spoiled = [whole[:length] for length in range(len(whole))]
    spoiled += [
        whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(len(whole)) for flip in (1, 0x80)
    ]
    understood = 0
    for data in spoiled:
        try:
            certificate = Certificate.parse(data)
            assert certificate.is_ca in {True, False, None}
            assert certificate.critical_usage is None or certificate.critical_usage >= 0
            assert certificate.critical_purposes is None or certificate.critical_purposes is not None
        except ValueError:
            continue
        understood += 1
    assert 0 < understood < len(spoiled)


@pytest.mark.parametrize("priority", ["NORMAL", "NORMAL:-VERS-TLS1.3"])
async def test_servers_keep_nothing_of_connections(daemon, tmp_path, priority):
    directory, _ca = pki.complete(tmp_path / "pki")
    server, client = await add(daemon, directory, priority=priority), await add(daemon, directory, "client", "c")
    kept = [connect(server.context(), client.context()) for _ in range(3)]  # one that breaks off is forgotten anyway
    assert server.context().session_stats()["accept_good"] == len(kept)
    assert server.context().session_stats()["number"] == 0


async def test_credentials_go_while_their_context_lives_on(daemon, tmp_path):
    directory, _ca = pki.complete(tmp_path / "pki")
    server, client = await add(daemon, directory), await add(daemon, directory, "client", "c")
    await daemon.execute("object-del", {"id": "t"})
    connect(server.context(), client.context())
    with pytest.raises(Error) as caught:
        await daemon.execute("object-del", {"id": "t"})
    assert caught.value.kind is ErrorKind.NOT_FOUND
