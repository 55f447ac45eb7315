"""NBD URIs with TLS: certificates and keys, over TCP and unix sockets, and what such a URI lacks."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import time

import pytest
from image_command import ours, ours_json

import peers
import pki
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-nbd", "nbdkit", "nbdinfo")

CONTENT = random.Random(6).randbytes(1 << 20)


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    (tmp_path / "keys.psk").write_bytes(b"alice:" + b"5a" * 32 + b"\n")
    pki.complete(tmp_path / "pki")
    return path


@contextlib.contextmanager
def serving(kind, image, what):
    """A server with TLS; gives the path of its socket."""
    here = image.parent
    socket = here / "s"
    if kind == "qemu-nbd":
        where = {"anon": "tls-creds-anon", "psk": f"tls-creds-psk,dir={here}"}.get(
            what, f"tls-creds-x509,dir={here}/pki"
        )
        argv = ["--object", f"{where},id=t,endpoint=server", "--tls-creds=t", "--persistent", "--shared=8"]
        argv += ["-f", "raw", "-x", "disk", "-k", str(socket), str(image)]
    else:
        files = f"--tls-psk={here}/keys.psk" if what == "psk" else f"--tls-certificates={here}/pki"
        argv = ["-f", "-U", str(socket), "--tls=require", files, "file", str(image)]
    with subprocess.Popen([*peers.peer(kind), *argv]) as process:
        try:
            while not socket.exists():
                assert process.poll() is None, f"{kind} has ended"
                time.sleep(0.02)
            yield socket
        finally:
            process.terminate()


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
@pytest.mark.parametrize(
    ("what", "uri"),
    [
        ("x509", "nbds+unix:///disk?socket={0}/s&tls-certificates={0}/pki&tls-hostname=localhost"),
        ("psk", "nbds+unix://alice@/disk?socket={0}/s&tls-psk-file={0}/keys.psk"),
    ],
    ids=["x509", "psk"],
)
def test_a_uri_opens_for_us_what_it_opens_for_libnbd(kind, what, uri, image):
    uri = uri.format(image.parent)
    with serving(kind, image, what):
        peers.run("nbdinfo", uri)
        assert ours_json("info", uri)["virtual-size"] == len(CONTENT)
        ours("convert", uri, "copy.raw")
        assert (image.parent / "copy.raw").read_bytes() == CONTENT
        assert ours("compare", uri, uri).stdout == "Images are identical.\n"
        with DaemonThread() as daemon:
            for _ in range(2):  # the second finds the credentials of the first

                async def read():
                    disk = await daemon.daemon.open(uri)
                    try:
                        return await disk.read(4096, 4096)
                    finally:
                        await disk.close()

                assert daemon.call(read) == CONTENT[4096:8192]


def test_over_tcp_the_host_is_the_name(image):
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="n", filename=str(image), read_only=True)
        daemon.execute("object-add", qom_type="tls-creds-x509", id="t", endpoint="server", dir=f"{image.parent}/pki")
        inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        daemon.execute("nbd-server-start", addr=inet, tls_creds="t")
        daemon.execute("block-export-add", type="nbd", id="e", node_name="n", name="disk")
        (address,) = daemon.execute("query-nbd-servers")[0]["addresses"]
        uri = f"nbds://localhost:{address['port']}/disk?tls-certificates=pki"
        ours("convert", uri, "copy.raw")
        assert (image.parent / "copy.raw").read_bytes() == CONTENT
        said = ours("info", f"{uri}&tls-hostname=elsewhere", expect=1).stderr
        assert "Certificate does not match the hostname elsewhere" in said
        assert "TLS" in ours("info", f"nbd://localhost:{address['port']}/disk", expect=1).stderr


def test_nobody_is_asked_who_they_are(image):
    with serving("qemu-nbd", image, "anon") as socket:
        uri = f"nbds+unix:///disk?socket={socket}"
        assert ours_json("info", f"{uri}&tls-type=anon")["virtual-size"] == len(CONTENT)
        assert "TLS" in ours("info", f"{uri}&tls-certificates=pki&tls-hostname=localhost", expect=1).stderr


def test_a_server_is_trusted_without_a_look(image):
    """By those who say so: its certificate is for another name."""
    with serving("qemu-nbd", image, "x509") as socket:
        uri = f"nbds+unix:///disk?socket={socket}&tls-hostname=elsewhere&tls-certificates=pki"
        assert "Certificate does not match" in ours("info", uri, expect=1).stderr
        assert ours_json("info", f"{uri}&tls-verify-peer=0")["virtual-size"] == len(CONTENT)


def test_an_image_that_names_one_is_refused_with_all_that_it_takes(image):
    with serving("nbdkit", image, "psk") as socket:
        uri = f"nbds+unix://alice@/disk?socket={socket}&tls-psk-file=keys.psk"
        ours("create", "-b", uri, "-F", "raw", "top.qcow2")
        said = ours("info", "--backing-chain", "top.qcow2", expect=1).stderr
        assert "names a server" in said
        name, _, credentials = said[said.index("json:") :].strip().partition(", with --object ")
        assert json.loads(name.removeprefix("json:"))["driver"] == "qcow2"
        ours("convert", "--object", credentials, name, "copy.raw")
    assert (image.parent / "copy.raw").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("", "TLS needs credentials"),
        ("?tls-psk-file=/x/psk", "the file of keys has to be called keys.psk"),
        ("?tls-certificates=/nowhere", "/nowhere"),
        ("?tls-type=psk", "TLS needs credentials"),
        ("?tls-priority=NORMAL", "there is no parameter 'tls-priority'"),
    ],
)
def test_what_is_missing(parameters, text):
    said = ours("info", f"nbds://localhost/disk{parameters}", expect=1).stderr
    assert text in said
    with DaemonThread() as daemon, pytest.raises(Error, match=re.escape(text)):
        daemon.call(lambda: daemon.daemon.open(f"nbds://localhost/disk{parameters}"))
