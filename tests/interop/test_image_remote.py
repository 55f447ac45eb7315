"""Image commands on NBD URIs, side by side with qemu-img; and images that name a server as their backing file."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from image_command import MIB, ours, ours_json, scattered, theirs, theirs_json

import peers
from blkferry.errors import Error, ErrorKind
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-img", "qemu-nbd", "nbdkit")

SERVERS = ("ours", "qemu-nbd", "nbdkit")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def program(path: Path, name: str, *argv: str):
    process = subprocess.Popen([*peers.peer(name), *argv])
    try:
        while not path.exists():
            assert process.poll() is None, f"{name} has ended"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def serving(kind: str, image: Path, *, writable: bool = False):
    """The URI of an image that is served."""
    path = image.with_suffix(".sock")
    with contextlib.ExitStack() as stack:
        if kind == "ours":
            daemon = stack.enter_context(DaemonThread())
            node = {"driver": "file", "node-name": "n", "filename": str(image), "read-only": not writable}
            daemon.execute("blockdev-add", **node)
            daemon.serve()
            path = Path(daemon.export("n", "disk", writable=writable))
        elif kind == "qemu-nbd":
            argv = ["--persistent", "--shared=8", "-x", "disk", "-f", "raw", *([] if writable else ["-r"])]
            stack.enter_context(program(path, kind, *argv, "-k", str(path), str(image)))
        else:
            argv = [*([] if writable else ["-r"]), "-f", "-U", str(path), "file", str(image)]
            stack.enter_context(program(path, kind, *argv))
        yield f"nbd+unix:///disk?socket={path}"


@pytest.fixture
def raw():
    path = Path("disk.raw").resolve()
    scattered(path)
    return path


def without_dirty_flags(facts: dict) -> dict:
    """Where there is no such flag QEMU says nothing, and we say that it is not set."""
    children = [{**each, "info": without_dirty_flags(each["info"])} for each in facts.get("children", [])]
    return {key: value for key, value in facts.items() if key != "dirty-flag"} | {"children": children}


@pytest.mark.parametrize("server", SERVERS)
def test_looking(raw, server):
    with serving(server, raw) as uri:
        assert ours("info", uri).stdout == theirs("info", uri).stdout
        assert without_dirty_flags(ours_json("info", uri)) == without_dirty_flags(theirs_json("info", uri))
        assert ours("map", uri).stdout == theirs("map", uri).stdout
        assert ours_json("map", uri) == theirs_json("map", uri)
        assert ours("measure", "-O", "qcow2", uri).stdout == theirs("measure", "-O", "qcow2", uri).stdout
        for argv in (("check", uri), ("compare", uri, raw), ("compare", raw, uri), ("compare", uri, uri)):
            told = theirs(*argv, expect=None)
            said = ours(*argv, expect=told.returncode)
            assert said.stdout == told.stdout
        assert "This image format does not support checks" in ours("check", uri, expect=63).stderr


@pytest.mark.parametrize("server", SERVERS)
def test_differences_are_found(raw, server):
    shutil.copy(raw, "other.raw")
    with open("other.raw", "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"other")
    with serving(server, raw) as uri:
        for pair in ((uri, "other.raw"), ("other.raw", uri)):
            assert ours("compare", *pair, expect=1).stdout == theirs("compare", *pair, expect=1).stdout


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("how", [("-n",), ("-n", "-O", "raw"), ("-O", "raw")], ids=" ".join)
def test_convert_from_and_to(raw, server, how):
    target = Path("target.raw").resolve()
    target.write_bytes(b"x" * raw.stat().st_size)  # what is there must not shine through where the source is zero
    with serving(server, raw) as source, serving(server, target, writable=True) as uri:
        ours("convert", source, "copy.qcow2")
        ours("convert", *how, source, uri)
        assert ours("compare", "-f", "raw", source, uri).stdout == "Images are identical.\n"
    assert target.read_bytes() == raw.read_bytes()
    theirs("compare", "copy.qcow2", raw)


def test_a_container_within_an_export(raw):
    theirs("convert", "-O", "qcow2", raw, "disk.qcow2")
    with serving("qemu-nbd", Path("disk.qcow2").resolve()) as uri:
        assert ours_json("info", "-f", "qcow2", uri)["virtual-size"] == raw.stat().st_size
        assert ours_json("info", uri)["format"] == "raw"
        assert ours("compare", "-f", "qcow2", "-F", "raw", uri, raw).stdout == "Images are identical.\n"
        assert ours("check", "-f", "qcow2", uri).stdout == theirs("check", "-f", "qcow2", uri).stdout


def test_what_cannot_be_done(raw):
    with serving("nbdkit", raw, writable=True) as uri:
        for argv, text in {
            ("info", "nbd+unix:///x"): "it needs the parameter 'socket'",
            ("info", f"{uri}-gone"): "Failed to connect to '.*-gone': No such file or directory",
            ("info", "-f", "qcow2", uri): "Image is not in qcow2 format",
            ("create", "-f", "raw", uri, "1G"): "has 8388608 bytes, but the image needs 1073741824",
        }.items():
            assert theirs(*argv, expect=None).returncode == 1
            said = ours(*argv, expect=1).stderr
            assert re.search(text, said), said
        assert "Another server's export cannot grow" in ours("create", "-f", "qcow2", uri, "1M", expect=1).stderr
        assert theirs("info", uri).stdout == ours("info", uri).stdout


def test_image_opts(raw):
    with serving("nbdkit", raw) as uri:
        server = f"server.type=unix,server.path={uri.partition('=')[2]},export=disk"
        below = ",".join(f"file.{each}" for each in ("driver=nbd", *server.split(",")))
        for options in (f"driver=nbd,{server}", f"driver=raw,{below}"):
            assert ours("info", "--image-opts", options).stdout == theirs("info", "--image-opts", options).stdout


# Images that name a server -----------------------------------------------------------------------------------------


def allowed(message: str) -> str:
    """The name that the hint proposes."""
    return "json:" + message.partition("json:")[2].strip()


def test_an_overlay_of_an_export(raw):
    with serving("qemu-nbd", raw) as uri:
        ours("create", "-b", uri, "-F", "raw", "top.qcow2")
        theirs("create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", "their.qcow2")
        assert "Backing file specified without" in ours("create", "-b", uri, "no.qcow2", expect=1).stderr
        for key in ("virtual-size", "backing-filename", "backing-filename-format", "full-backing-filename"):
            assert ours_json("info", "top.qcow2").get(key) == theirs_json("info", "their.qcow2").get(key)
        said = ours("convert", "top.qcow2", "copy.raw", expect=1).stderr
        assert f"The image 'top.qcow2' names a server: '{uri}'" in said
        ours("convert", allowed(said), "copy.raw")
        assert Path("copy.raw").read_bytes() == raw.read_bytes()
        for argv in (("map", "top.qcow2"), ("info", "--backing-chain", "top.qcow2"), ("commit", "top.qcow2")):
            assert "names a server" in ours(*argv, expect=1).stderr
        assert theirs("compare", "top.qcow2", raw).stdout == "Images are identical.\n"


def test_rebase_to_an_export(raw):
    theirs("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", "top.qcow2")
    with serving("nbdkit", raw) as uri:
        ours("rebase", "-b", uri, "-F", "raw", "top.qcow2")
        assert ours_json("info", "top.qcow2")["backing-filename"] == uri
        assert theirs("compare", "top.qcow2", raw).stdout == "Images are identical.\n"
        ours("rebase", "-u", "-b", raw, "-F", "raw", "top.qcow2")
    assert theirs("compare", "top.qcow2", raw).stdout == "Images are identical.\n"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("backing_format", ["raw", "nbd", None])
def test_no_image_makes_a_daemon_connect(tmp_path, deep, backing_format):
    asked = tmp_path / "asked"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as trap:
        trap.bind(str(asked))
        trap.listen()
        trap.setblocking(False)
        remote: dict = {"driver": "nbd", "server": {"type": "unix", "path": str(asked)}}
        inside = "json:" + json.dumps({"driver": "raw", "file": remote} if deep else remote)
        for name in (f"nbd+unix:///?socket={asked}", inside):
            ours("create", "-u", "-b", name, *(["-F", backing_format] if backing_format else []), "top.qcow2", "1M")
            with DaemonThread() as daemon, pytest.raises(Error, match="names a server") as caught:
                file = {"driver": "file", "filename": "top.qcow2"}
                daemon.execute("blockdev-add", **{"driver": "qcow2", "node-name": "n", "file": file})
            assert caught.value.kind is ErrorKind.DENIED
        with pytest.raises(BlockingIOError):
            trap.accept()
