"""Random histories of a file that is exported by FUSE, as fsx has them, against a bytearray.

Reads, writes, O_DIRECT, mappings, truncation, holes, zeroes, seeking, flushing: whatever a program does, it sees what
it would see of a file in memory. At the end the image has it too.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import program
from fuse_model import SECTOR, SIZE, Both, operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmp_process import QmpProcess

import peers

pytestmark = peers.requires("qemu-img")


@pytest.fixture(scope="module")
def daemon() -> Iterator[QmpProcess]:
    with QmpProcess() as process:
        yield process


@pytest.fixture(scope="module")
def empty() -> Iterator[dict[str, Path]]:
    """An empty image of each format."""
    with tempfile.TemporaryDirectory() as directory:
        raw, qcow2 = Path(directory, "raw"), Path(directory, "qcow2")
        with raw.open("wb") as file:
            file.truncate(SIZE)
        argv = [program("blkferry"), "image", "create", "-f", "qcow2", str(qcow2), str(SIZE)]
        subprocess.run(argv, check=True, capture_output=True)
        yield {"raw": raw, "qcow2": qcow2}


@contextlib.contextmanager
def exported(daemon, empty, kind, *, growable):
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        shutil.copy(empty["raw" if kind == "direct" else kind], image)
        file = {"driver": "file", "filename": str(image), "discard": "unmap", "cache": {"direct": kind == "direct"}}
        if kind == "qcow2":
            daemon.execute("blockdev-add", driver="qcow2", node_name="n", file=file, discard="unmap")
        else:
            daemon.execute("blockdev-add", driver="raw", node_name="n", file=file, discard="unmap")
        try:
            yield daemon.mount("n", Path(directory, "disk"), growable=growable), image
        finally:
            daemon.clear()


@pytest.mark.parametrize("growable", [False, True])
@pytest.mark.parametrize("kind", ["raw", "direct", "qcow2"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_file_is_what_was_done_to_it(daemon, empty, kind, growable, data):
    unit = SECTOR if growable else 1
    history = data.draw(st.lists(operations(unit), min_size=1, max_size=30))
    with exported(daemon, empty, kind, growable=growable) as (path, image):
        both = Both(path, growable=growable)
        try:
            both.play(history)
        finally:
            both.close()
        expected = bytes(both.model)
        daemon.execute("block-export-del", id="e")
        daemon.clear()
        assert content_of(image, kind) == expected


def content_of(image: Path, kind: str) -> bytes:
    if kind != "qcow2":
        return image.read_bytes()
    flat = image.with_suffix(".flat")
    peers.run("qemu-img", "convert", "-O", "raw", str(image), str(flat))
    peers.run("qemu-img", "check", str(image))
    return flat.read_bytes()
