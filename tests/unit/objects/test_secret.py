"""Secrets: where their data comes from, who finds them, and that nobody else sees them."""

import base64
import logging
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from blkferry import Daemon
from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.secret import QCryptoSecretFormat, SecretProperties
from blkferry.schema.model import branch_members

MASTER = bytes(range(65, 97))
IV = bytes(range(16))
IV64 = base64.b64encode(IV).decode()


@pytest.fixture
async def daemon():
    async with Daemon() as daemon:
        yield daemon


async def add(daemon, name="s", **options):
    await daemon.execute("object-add", {"qom-type": "secret", "id": name, **options})


async def refused(daemon, **options):
    with pytest.raises(Error) as caught:
        await add(daemon, **options)
    assert set(daemon.objects) <= {"master", "io", "short"}
    return str(caught.value)


def encrypted(data):
    padding = 16 - len(data) % 16
    context = Cipher(algorithms.AES(MASTER), modes.CBC(IV)).encryptor()
    return context.update(data + bytes([padding]) * padding)


def test_members_are_those_of_qemu():
    members = {member.name: member.optional for member in branch_members(SecretProperties)}
    assert members == dict.fromkeys(("data", "file", "format", "keyid", "iv"), True)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"data": "pass word"}, b"pass word"),
        ({"data": "zoë"}, "zoë".encode()),
        ({"data": ""}, b""),
        ({"data": "/wA=", "format": "base64"}, b"\xff\0"),
        ({"data": "cGF\nzcw==\n", "format": "base64"}, b"pass"),
        ({"data": "cGFzcw==x", "format": "base64"}, b"pass"),  # as GLib
    ],
)
async def test_data_is_taken_as_it_is_or_from_base64(daemon, options, value):
    await add(daemon, **options)
    assert daemon.graph.secret("s") == value


async def test_a_file_is_read_once_to_its_last_byte(daemon, tmp_path):
    path = tmp_path / "pw"
    path.write_bytes(b"\xffpw\n")
    await add(daemon, file=str(path))
    path.unlink()
    assert daemon.graph.secret("s") == b"\xffpw\n"


@pytest.mark.parametrize("data", [b"", b"x", b"exactly sixteen!", b"long " * 20])
async def test_data_may_be_encrypted_with_another_secret(daemon, data):
    await add(daemon, "master", data=base64.b64encode(MASTER).decode(), format="base64")
    ciphertext = base64.b64encode(encrypted(data)).decode()
    await add(daemon, data=ciphertext, format="base64", keyid="master", iv=IV64)
    assert daemon.graph.secret("s") == data


async def test_an_encrypted_file_may_be_raw(daemon, tmp_path):
    (tmp_path / "pw").write_bytes(encrypted(b"pw"))
    await add(daemon, "master", data=MASTER.decode())
    await add(daemon, file=str(tmp_path / "pw"), keyid="master", iv=IV64)
    assert daemon.graph.secret("s") == b"pw"


async def test_what_is_wrong_is_said_as_qemu_says_it(daemon, tmp_path):
    await add(daemon, "master", data=MASTER.decode())
    await add(daemon, "short", data="abc")
    await daemon.execute("object-add", {"qom-type": "iothread", "id": "io"})
    enc = {"keyid": "master", "iv": IV64}
    assert await refused(daemon) == "Either 'file' or 'data' must be provided"
    assert await refused(daemon, data="a", file="b") == "'file' and 'data' are mutually exclusive"
    assert await refused(daemon, file="/nonexistent") == "Unable to read /nonexistent: No such file or directory"
    assert await refused(daemon, file=str(tmp_path)) == f"Unable to read {tmp_path}: Is a directory"
    assert await refused(daemon, file="/dev/zero") == "Unable to read /dev/zero: it is larger than 1 MiB"
    assert await refused(daemon, data="!", format="base64") == "Base64 data contains invalid characters"
    assert await refused(daemon, data="a", format="hex") == "Parameter 'format' does not accept value 'hex'"
    assert await refused(daemon, data="a", keyid="no") == "No secret with id 'no'"
    assert await refused(daemon, data="a", keyid="io") == "Object with id 'io' is not a secret"
    assert await refused(daemon, data="a", keyid="short") == "Key should be 32 bytes in length"
    assert await refused(daemon, data="a", keyid="master") == "IV is required to decrypt secret"
    assert await refused(daemon, data="a", keyid="master", iv="AAAA") == "IV should be 16 bytes in length not 3"
    assert await refused(daemon, data="abcd", **enc) == "Length 4 must be a multiple of block size 16"
    wrong = base64.b64encode(bytes(16)).decode()
    text = "Incorrect number of padding bytes found on decrypted data"
    assert await refused(daemon, data=wrong, format="base64", **enc) == text


async def test_a_name_that_is_no_secret_is_refused_with_those_there_are(daemon):
    with pytest.raises(Error) as caught:
        daemon.graph.secret("s")
    assert (caught.value.kind, caught.value.hint) == (ErrorKind.NOT_FOUND, "Create it with object-add.")
    await add(daemon, "a", data="hidden")
    await add(daemon, "b", data="hidden")
    with pytest.raises(Error, match=r"^No secret with id 's'$") as caught:
        daemon.graph.secret("s")
    assert caught.value.hint == "Known secrets: a, b."
    with pytest.raises(Error, match=r'^iothread "a" not found$'):
        daemon.objects.iothread("a")


async def test_a_graph_alone_has_no_secrets(daemon):
    with pytest.raises(Error, match="No secret with id 's'"):
        Graph(daemon.services).secret("s")


async def test_nothing_but_the_value_has_it(daemon, caplog):
    caplog.set_level(logging.DEBUG)
    options = SecretProperties(id="s", data="hunter2", format=QCryptoSecretFormat.RAW)
    await daemon.objects.add(options)
    thing = daemon.objects["s"]
    assert daemon.graph.secret("s") == b"hunter2"
    for said in (repr(options), str(options), repr(thing), str(thing), caplog.text):
        assert "hunter2" not in said
    assert {name for name, value in vars(thing).items() if "hunter2" in str(value)} == {"value"}


async def test_a_secret_goes_whenever_one_likes(daemon):
    await add(daemon, data="x")
    await daemon.execute("object-del", {"id": "s"})
    with pytest.raises(Error):
        daemon.graph.secret("s")
    await add(daemon, data="y")
    assert daemon.graph.secret("s") == b"y"


def test_the_command_line_takes_them():
    program = "import sys; from blkferry.cli.qsd import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--object", "secret,id=s,data=x", "--object"]
    done = subprocess.run([*command, "secret,id=s,data=y"], capture_output=True, text=True, check=False, timeout=30)
    assert "There already is an object with id 's'" in done.stderr  # so the first one is there
    done = subprocess.run([*command, "secret,help"], capture_output=True, text=True, check=False, timeout=30)
    assert "keyid=<" in done.stdout
