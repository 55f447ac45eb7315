"""qcow2 images that `blkferry serve` offers, and image commands that are interrupted, as the processes they are."""

from __future__ import annotations

import os
import signal

import pytest
from cli_process import finish, running, wait_for
from image_command import MIB, clean, content, ours, qemu_io, scattered, theirs

import peers

pytestmark = peers.requires("qemu-img", "qemu-io")


@pytest.fixture(autouse=True)
def _here(sockets, monkeypatch):
    monkeypatch.chdir(sockets)


def client(name: str, *commands: str) -> None:
    qemu_io(f"nbd+unix:///{name}?socket={os.getcwd()}/nbd", *commands, image_format="raw")


def test_a_chain_is_served():
    scattered("base")
    ours("create", "-f", "qcow2", "-b", "base", "-F", "raw", "vm")
    expected = bytearray(content("vm"))
    with running("blkferry", "serve", "-q", "-w", "-s", "nbd", "vm") as server:
        server.line()
        client("vm", "write -P 9 1M 64k", "write -z 2M 64k")
        assert "--force-share" in finish("blkferry", "image", "info", "vm").stderr
        assert server.end()[0] == 0
    expected[MIB : MIB + 65536] = b"\x09" * 65536
    expected[2 * MIB : 2 * MIB + 65536] = bytes(65536)
    assert content("vm") == expected
    clean("vm")


def test_an_encrypted_image_is_served_with_the_only_secret():
    (key := os.open("key", os.O_CREAT | os.O_WRONLY)) and os.write(key, b"password")
    os.close(key)
    secret = "secret,id=it,file=key"
    ours("create", "--object", secret, "-o", "encrypt.iter-time=10,encrypt.format=luks", "vm.qcow2", "4M")
    said = finish("blkferry", "serve", "-s", "nbd", "vm.qcow2")
    assert said.returncode == 1
    assert "--object secret,id=key" in said.stderr
    with running("blkferry", "serve", "-q", "-w", "--object", secret, "-s", "nbd", "vm.qcow2") as server:
        server.line()
        client("vm.qcow2", "write -P 9 1M 64k")
        assert server.end()[0] == 0
    ours("convert", "--object", secret, "vm.qcow2", "plain")
    assert content("plain")[MIB : MIB + 65536] == b"\x09" * 65536


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_copy_leaves_nothing(number):
    scattered("raw", size=64 * MIB, pieces=400)
    with running("blkferry", "image", "convert", "-r", "1M", "raw", "a.qcow2") as copy:
        wait_for(lambda: os.path.exists("a.qcow2") and os.path.getsize("a.qcow2") > MIB)
        code, said, complaints = copy.end(number)
    assert (code, said, complaints) == (128 + number, "", "")
    assert os.listdir() == ["raw"]
    theirs("create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "top")
