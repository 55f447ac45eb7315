"""The program that changes the vDPA bus, and what is said when it does not."""

from __future__ import annotations

import time

import pytest

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import bus, control


@pytest.fixture
def vdpa(tmp_path, monkeypatch):
    """Have `vdpa` be a shell script."""

    def script(text):
        program = tmp_path / "vdpa"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return script


def test_what_is_run(vdpa, tmp_path):
    vdpa(f'test $# = 3 && echo "$@" >>{tmp_path}/said')
    bus.detach("a b")
    assert (tmp_path / "said").read_text() == "dev del a b\n"
    assert bus.attach_command("a b") == "vdpa dev add name 'a b' mgmtdev vduse"


def test_what_it_complains_of_is_the_error(vdpa):
    vdpa("echo 'Error: vdpa: device not found.' >&2; echo 'kernel answers: No such device' >&2; exit 1")
    with pytest.raises(Error, match="Cannot take 'disk0' off the vDPA bus: kernel answers: No such device") as caught:
        bus.detach("disk0")
    assert "`vdpa dev del disk0` is what failed" in caught.value.hint


def test_it_is_not_waited_for_for_ever(vdpa, monkeypatch):
    monkeypatch.setattr(bus, "ATTACH_SECONDS", 0.2)
    vdpa("sleep 60 & wait")
    started = time.monotonic()
    with pytest.raises(Error, match="it takes too long") as caught:
        bus.detach("disk0")
    assert caught.value.kind is ErrorKind.BUSY
    assert time.monotonic() - started < 30


def test_there_is_none(monkeypatch):
    monkeypatch.setattr(bus, "tool", lambda: None)
    with pytest.raises(Error, match="Cannot put 'disk0' on the vDPA bus: there is no program 'vdpa'") as caught:
        bus.attach("disk0")
    assert "vdpa dev add name disk0 mgmtdev vduse" in caught.value.hint


@pytest.mark.parametrize("name", ["", ".", "..", "control", "a/b", "a\0b", "x" * 256, "ü" * 128])
def test_names_that_cannot_be(name):
    with pytest.raises(Error, match="cannot be the name of a VDUSE device"):
        control.check_name(name)


@pytest.mark.parametrize("name", ["disk0", "a b", "x" * 255])
def test_names_that_can_be(name):
    control.check_name(name)
