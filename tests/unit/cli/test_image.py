"""`blkferry image` without QEMU: help, sizes in words, options, and the round trip of an image."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import re
import textwrap

import pytest
from click.testing import CliRunner

from blkferry.cli.app import app
from blkferry.cli.image.create import format_by_name
from blkferry.cli.image.text import short_size
from blkferry.daemon.imaging import creating
from blkferry.errors import Error
from blkferry.schema.keyval import Help

COMMANDS = ["create", "info", "convert", "resize", "check", "compare", "snapshot", "map", "measure", "rebase", "commit"]


def invoke(*argv):
    return CliRunner().invoke(app, ["image", *argv], prog_name="blkferry")


def answer(*argv):
    said = invoke(*argv, "--json")
    assert said.exit_code == 0, said.stderr
    return json.loads(said.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    said = invoke(command, "--help")
    assert said.exit_code == 0
    assert "--json" in said.output
    assert "\b" not in said.output
    assert command in invoke("--help").output


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([], 2),
        (["infp", "x"], 1),
        (["info"], 1),
        (["info", "--what", "x"], 1),
        (["compare", "x"], 2),
        (["check", "-r", "x", "y"], 1),
        (["snapshot", "-c", "a", "-d", "b", "x"], 1),
    ],
)
def test_wrong_use(argv, code):
    said = invoke(*argv)
    assert said.exit_code == code
    assert said.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (197120, "192 KiB"), (3 << 39, "1.5 TiB")],
)
def test_sizes_are_written_as_qemu_does(size, text):
    assert short_size(size) == text


def test_formats_by_name():
    names = {"a.qcow2": "qcow2", "A.QCOW2": "qcow2", "a.img": "raw", "qcow2": "raw", "/dev/sda": "raw"}
    assert {name: format_by_name(name) for name in names} == names


def test_options():
    parsed = creating.parse_options(["cluster_size=4k,compat=v3", "encrypt.format=luks"], "qcow2")
    assert parsed == {"cluster_size": "4k", "compat": "v3", "encrypt.format": "luks"}
    asked = creating.parse_options(["help"], "raw")
    assert isinstance(asked, Help)
    assert "preallocation=" in asked.text
    with pytest.raises(Error, match="Invalid parameter 'compat' for format 'raw'"):
        creating.parse_options(["compat=v3"], "raw")
    with pytest.raises(Error, match="Unknown file format 'qcow3'"):
        creating.parse_options([], "qcow3")


def test_an_image_s_life(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(b"x" * 300_000 + bytes(1_796_608) + b"y" * 544)
    assert answer("convert", "-c", "disk.img", "base.qcow2")["written"] < 600_000
    assert answer("compare", "disk.img", "base.qcow2") == {"identical": True, "sizes-differ": False}
    assert answer("create", "-b", "base.qcow2", "-F", "qcow2", "vm.qcow2")["virtual-size"] == 2_097_152
    assert answer("snapshot", "-c", "clean", "vm.qcow2")["name"] == "clean"
    assert answer("resize", "vm.qcow2", "+1M")["virtual-size"] == 3 << 20
    assert [each["depth"] for each in answer("info", "--backing-chain", "vm.qcow2") if "depth" in each] == []
    assert answer("map", "vm.qcow2")[0] == {
        "start": 0,
        "length": 65536 * 5,
        "depth": 1,
        "present": True,
        "zero": False,
        "data": True,
        "compressed": True,
    }
    assert answer("rebase", "-b", "", "vm.qcow2")["copied"] == 65536 * 6
    os.unlink("base.qcow2")
    assert answer("check", "vm.qcow2")["check-errors"] == 0
    assert answer("convert", "-l", "clean", "vm.qcow2", "old.img")["virtual-size"] == 2_097_152
    assert answer("measure", "-O", "raw", "vm.qcow2") == {"required": 3 << 20, "fully-allocated": 3 << 20}


def test_the_example_of_the_manual_runs(tmp_path, monkeypatch, capsys):
    manual = (pathlib.Path(__file__).parents[3] / "docs" / "image.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", manual, re.DOTALL)
    imports, _, body = example.partition("\n\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(b"x" * (1 << 20))
    names = {}
    exec(f"{imports}\nasync def example():\n{textwrap.indent(body, '    ')}", names)
    asyncio.run(names["example"]())
    assert capsys.readouterr().out.endswith("1048576 of 1048576\n")
    assert invoke("compare", "disk.img", "copy.qcow2").exit_code == 0


def test_the_manual_knows_every_command():
    manual = (pathlib.Path(__file__).parents[3] / "docs" / "image.md").read_text()
    assert all(f"\n| `{command} " in manual for command in [*COMMANDS, "bitmap"])
