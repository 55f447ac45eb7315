"""Pre-shared keys and anonymous TLS: whom they let in, and that keys stay where they are."""

import gc
import ssl

import pytest

from blkferry import Daemon
from blkferry.errors import Error
from blkferry.objects.tls.psk import parse_keys

KEY = "00112233445566778899aabbccddeeff"


@pytest.fixture
async def daemon():
    async with Daemon() as daemon:
        yield daemon


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "keys.psk").write_text(f"qemu:{KEY}\nzoë:aabbccdd\n\n#6a6f65:{KEY}\n")
    return tmp_path


async def add(daemon, kind, endpoint, directory=None, name=None, **options):
    name = name or endpoint
    if directory is not None:
        options["dir"] = str(directory)
    await daemon.execute("object-add", {"qom-type": f"tls-creds-{kind}", "id": name, "endpoint": endpoint, **options})
    return daemon.objects[name].context()


async def refused(daemon, *args, **options):
    with pytest.raises(Error) as caught:
        await add(daemon, *args, **options)
    return f"{caught.value}{caught.value.hint}{caught.value.facts}"


def connect(server, client):
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[1].write(b"pong")
    assert ends[0].read() == b"pong"
    return ends


VERSIONS = [("NORMAL", "TLSv1.3"), ("NORMAL:-VERS-TLS1.3", "TLSv1.2")]


@pytest.mark.parametrize(("priority", "version"), VERSIONS)
async def test_whoever_has_the_key_gets_in(daemon, directory, priority, version):
    server = await add(daemon, "psk", "server", directory, priority=priority)
    for user in ("qemu", "zoë", "joe"):
        client = await add(daemon, "psk", "client", directory, user.replace("ë", "e"), username=user)
        ends = connect(server, client)
        assert {end.version() for end in ends} == {version}
        assert daemon.objects["server"].identity(ends[1]) == user
    default = await add(daemon, "psk", "client", directory)
    connect(server, default)
    creds = daemon.objects["server"]
    assert (creds.is_x509, creds.verify_peer) == (False, False)


@pytest.mark.parametrize(("priority", "version"), VERSIONS)
@pytest.mark.parametrize("line", ["qemu:00112233445566778899aabbccddeefe", f"eve:{KEY}"])
async def test_others_do_not(daemon, directory, tmp_path_factory, line, priority, version):
    server = await add(daemon, "psk", "server", directory, priority=priority)
    theirs = tmp_path_factory.mktemp("theirs")
    (theirs / "keys.psk").write_text(line)
    client = await add(daemon, "psk", "client", theirs, username=line.partition(":")[0])
    with pytest.raises(ssl.SSLError):
        connect(server, client)
    with pytest.raises(ssl.SSLError):
        connect(server, ssl.create_default_context())


async def test_the_callbacks_live_as_long_as_the_context(daemon, directory):
    server, client = await add(daemon, "psk", "server", directory), await add(daemon, "psk", "client", directory)
    await daemon.execute("object-del", {"id": "server"})
    await daemon.execute("object-del", {"id": "client"})
    gc.collect()
    for _ in range(3):
        connect(server, client)


async def test_keys_are_in_no_error_repr_or_log(daemon, directory, caplog):
    await add(daemon, "psk", "server", directory)
    creds = daemon.objects["server"]
    assert KEY not in repr(vars(creds)) + repr(creds) + caplog.text
    (directory / "keys.psk").write_text(f"qemu:{KEY}x\n")
    told = await refused(daemon, "psk", "client", directory)
    assert "line 1" in told
    assert KEY not in told


@pytest.mark.parametrize(
    "line",
    ["qemu", "qemu:", ":aabbccdd", "qemu:aabb", "qemu:xyz", "#zz:aabbccdd", "#ff:aabbccdd", "u" * 128 + ":aabbccdd"],
)
def test_a_wrong_line_is_named(line):
    with pytest.raises(Error, match="line 2"):
        parse_keys(f"ok:aabbccdd\n{line}\n".encode(), "keys.psk")


def test_a_key_has_at_most_256_bytes():
    assert parse_keys(b"u:" + b"ab" * 256, "keys.psk") == {"u": b"\xab" * 256}
    with pytest.raises(Error, match="4 to 256 bytes"):
        parse_keys(b"u:" + b"ab" * 257, "keys.psk")


async def test_what_qemu_refuses_is_refused_in_its_words(daemon, directory, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    path = directory / "keys.psk"
    assert "Missing 'dir' property value" in await refused(daemon, "psk", "client")
    gone = f"Unable to access credentials {empty / 'keys.psk'}: No such file or directory"
    assert gone in await refused(daemon, "psk", "server", empty)
    assert f"Username eve not found in PSK file {path}" in await refused(
        daemon, "psk", "client", directory, username="eve"
    )
    told = await refused(daemon, "psk", "server", directory, username="qemu")
    assert "username should not be set when endpoint=server" in told


async def test_anonymous_ends_find_each_other_and_nobody_else(daemon):
    server, client = await add(daemon, "anon", "server"), await add(daemon, "anon", "client")
    ends = connect(server, client)
    assert ends[0].version() == "TLSv1.2"
    assert ends[0].cipher()[0].startswith("ADH-AES256")
    assert daemon.objects["server"].identity(ends[1]) == ""
    with pytest.raises(ssl.SSLError):
        connect(server, ssl.create_default_context())


async def test_anonymous_tls_is_never_1_3(daemon):
    assert "needs TLS 1.2" in await refused(daemon, "anon", "server", priority="NORMAL:-VERS-TLS1.2")


async def test_anonymous_servers_take_parameters(daemon, tmp_path):
    (tmp_path / "dh-params.pem").write_text("junk")
    assert "Unable to load DH parameters" in await refused(daemon, "anon", "server", tmp_path)
    await add(daemon, "anon", "client", tmp_path)  # which needs none


async def test_a_server_without_keys_says_that_it_is_of_no_use(daemon, tmp_path, caplog):
    (tmp_path / "keys.psk").write_text("\n")
    await add(daemon, "psk", "server", tmp_path)
    assert f"PSK file {tmp_path}/keys.psk has no keys: nobody will get in" in caplog.messages
