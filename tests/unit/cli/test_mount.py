"""The command lines of `blkferry mount` and `umount`: what is refused before anything is opened."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from blkferry.cli import mount
from blkferry.cli.app import app
from blkferry.cli.umount import _in_use


def usage_error(*argv) -> str:
    done = CliRunner().invoke(app, argv, prog_name="blkferry")
    assert done.exit_code == 2
    return done.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a", "b", "c"), "3 arguments are not pairs of IMAGE and FILE; several images need a FILE each."),
        (("--growable", "a"), "--growable needs --writable."),
        (
            ("--passthrough", "-w", "a"),
            "--passthrough with --writable needs --growable: the kernel writes behind the end, too.",
        ),
    ],
)
def test_what_cannot_be_meant(argv, message):
    assert usage_error("mount", *argv) == f"Error: {message}"


def test_umount_needs_a_file():
    assert usage_error("umount") == "Error: Missing argument 'FILE...'."


@pytest.mark.parametrize(
    ("image", "file", "target"),
    [
        ("/x/disk.qcow2", None, "disk.raw"),
        ("disk.img", None, "disk.raw"),
        ("memory:1G", None, "memory.raw"),
        ("nbd://host/export", None, "export.raw"),
        ("disk.qcow2", "directory", "directory/disk.raw"),
        ("disk.qcow2", "directory/", "directory/disk.raw"),
        ("disk.qcow2", "file", "file"),
    ],
)
def test_which_file_an_image_becomes(image, file, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("directory")
    assert mount._target(image, file) == target


def test_who_uses_a_file_is_told_with_the_remedy():
    assert _in_use("f", ["cat (pid 7)", "/dev/loop3"]).hint == (
        "It is open in cat (pid 7), /dev/loop3. Detach it (losetup --detach /dev/loop3), or say --force to cut it off."
    )
    assert _in_use("f", []).hint == "Close it, or say --force to cut it off."
