"""fio against files exported by FUSE: many requests at a time, each of which is read back and verified.

qemu-storage-daemon 10.0 fails the direct ones: it receives over the data of writes that it has not finished.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_process import program
from qmp_process import QmpProcess

import peers

pytestmark = peers.requires("fio", "qemu-img")

SIZE = 16 << 20

WORKLOADS = {
    "libaio-direct": ("--ioengine=libaio", "--direct=1", "--iodepth=16", "--bsrange=4k-256k"),
    "io_uring-direct": ("--ioengine=io_uring", "--direct=1", "--iodepth=16", "--bsrange=4k-256k"),
    "psync": ("--ioengine=psync", "--direct=0", "--bsrange=512-64k", "--bs_unaligned"),
    "mmap": ("--ioengine=mmap", "--bs=4k", "--io_size=4m"),
}


@pytest.fixture(scope="module")
def process() -> Iterator[QmpProcess]:
    with QmpProcess() as process:
        yield process


@pytest.fixture
def daemon(process) -> Iterator[QmpProcess]:
    yield process
    process.clear()


def add_node(daemon: QmpProcess, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image_format = "qcow2" if kind == "qcow2" else "raw"
    argv = [program("blkferry"), "image", "create", "-f", image_format, str(image), str(SIZE)]
    subprocess.run(argv, check=True, capture_output=True)
    file = {"driver": "file", "filename": str(image), "cache": {"direct": kind == "direct"}}
    daemon.execute("blockdev-add", driver=image_format, node_name="n", file=file)


def fio(path: Path, *options: str) -> None:
    verify = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=0", "--verify_state_save=0")
    said = peers.run("fio", "--name=job", f"--filename={path}", f"--size={SIZE}", *verify, *options, timeout=100).stdout
    assert "err= 0" in said, said


@pytest.mark.parametrize("kind", ["raw", "direct", "qcow2"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_fio_writes_it_reads(daemon, tmp_path, kind, workload):
    add_node(daemon, tmp_path, kind)
    fio(daemon.mount("n", tmp_path / "disk"), "--rw=randwrite", *WORKLOADS[workload])


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_several_writers_of_their_own_parts(daemon, tmp_path, kind):
    add_node(daemon, tmp_path, kind)
    path = daemon.mount("n", tmp_path / "disk")
    part = SIZE // 4
    fio(
        path,
        "--rw=randwrite",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=16",
        "--bs=16k",
        *("--numjobs=4", f"--size={part}", f"--offset_increment={part}"),
    )


def test_cmp_while_another_export_writes(daemon, tmp_path, sockets):
    add_node(daemon, tmp_path, "raw")
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(b"".join(b"%15d\n" % number for number in range(SIZE // 16)))
    copy.write_bytes(image.read_bytes())
    path = daemon.mount("n", tmp_path / "disk", writable=False)
    address = {"type": "unix", "data": {"path": str(sockets / "nbd")}}
    daemon.execute("nbd-server-start", addr=address)
    daemon.execute("block-export-add", type="nbd", id="w", node_name="n", name="w", writable=True)
    uri = f"nbd+unix:///w?socket={sockets}/nbd"
    requests = ("-w", "--pattern=66", "-c", "16384", "-s", "4096", "-S", "4096")
    with subprocess.Popen([*peers.peer("qemu-img"), "bench", "-f", "raw", *requests, uri]) as writer:
        looks = 0
        while writer.poll() is None or not looks:
            # The image itself is changing, at the same moments for whoever looks at it: only the reader must not lag.
            with path.open("rb", buffering=0) as seen, image.open("rb", buffering=0) as there:
                for offset in range(0, SIZE, SIZE // 64):
                    before, shown, after = (os.pread(each.fileno(), 4096, offset) for each in (there, seen, there))
                    assert shown in (before, after)
            looks += 1
    assert writer.returncode == 0
    subprocess.run(["cmp", path, image], check=True)
    assert subprocess.run(["cmp", "-s", path, copy], check=False).returncode == 1
    daemon.execute("block-export-del", id="w", mode="hard")
    daemon.execute("nbd-server-stop")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_while_the_graph_changes(daemon, tmp_path, kind):
    add_node(daemon, tmp_path, kind)
    for name in ("one", "two"):
        daemon.execute("object-add", qom_type="iothread", id=name)
    path = daemon.mount("n", tmp_path / "disk")
    options = ("--rw=randwrite", *WORKLOADS["libaio-direct"], "--loops=4")
    with ThreadPoolExecutor() as pool:
        verified = pool.submit(fio, path, *options)
        changes = 0
        while not verified.done():
            daemon.execute("block-dirty-bitmap-add", node="n", name="b")
            daemon.mount("n", tmp_path / "other", "other", iothread=("one", "two")[changes % 2])
            daemon.execute("block-dirty-bitmap-clear", node="n", name="b")
            daemon.execute("block-export-del", id="other")
            daemon.execute("block-dirty-bitmap-remove", node="n", name="b")
            changes += 1
        verified.result()
    assert changes
    daemon.clear()
    for name in ("one", "two"):
        daemon.execute("object-del", id=name)
