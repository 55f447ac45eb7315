"""`blkferry image` and `qemu-img` side by side, in one directory."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from click.testing import CliRunner, Result

import peers
from blkferry.cli.app import app

KIB, MIB = 1 << 10, 1 << 20


def ours(*argv: object, expect: int | None = 0) -> Result:
    """Run `blkferry image`; an exit code other than `expect` (None: any) fails the test."""
    said = CliRunner().invoke(app, ["image", *map(str, argv)], prog_name="blkferry")
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        raise said.exception
    if expect is not None:
        assert said.exit_code == expect, f"{argv}: {said.stdout}{said.stderr}"
    return said


def ours_json(*argv: object) -> object:
    return json.loads(ours(*argv, "--json").stdout)


def theirs(*argv: object, expect: int | None = 0):
    return peers.run("qemu-img", *map(str, argv), expect=expect)


def theirs_json(command: str, *argv: object) -> object:
    return json.loads(theirs(command, "--output=json", *argv).stdout)


def qemu_io(image: object, *commands: str, image_format: str = "qcow2") -> None:
    argv = [part for command in commands for part in ("-c", command)]
    done = peers.run("qemu-io", "-f", image_format, *argv, str(image))
    assert "failed" not in done.stdout, done.stdout


def scattered(path: Path | str, size: int = 8 * MIB, pieces: int = 24, seed: int = 1) -> None:
    """A sparse raw file with data of several kinds and alignments in it."""
    chance = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
        for number in range(pieces):
            length = min(chance.choice([512, 4096, 70_000, 200_000]), size // 4)
            at = chance.randrange(size - length) // 512 * 512
            data = chance.randbytes(length) if number % 2 else (f"piece {number} ".encode() * length)[:length]
            file.seek(at)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else the file system has not decided yet how much space it takes


def content(path: Path | str) -> bytes:
    """The whole disk, read by QEMU."""
    theirs("convert", "-O", "raw", path, "content.raw")
    data = Path("content.raw").read_bytes()
    os.unlink("content.raw")
    return data


def clean(path: Path | str) -> None:
    """Fail unless QEMU finds nothing wrong with an image."""
    done = theirs("check", path, expect=None)
    assert done.returncode == 0, done.stdout + done.stderr
