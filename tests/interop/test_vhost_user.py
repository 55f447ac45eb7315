"""Vhost-user-blk exports as the disks of programs that nobody here wrote: QEMU's tools by libblkio, without a guest."""

import json
import shlex

import pytest
from cli_process import running

from blkferry.testing.daemon import DaemonThread
from peers import requires, run

SIZE = 64 << 20
pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture(params=["raw", "qcow2"])
def disk(request, tmp_path, sockets):
    """An image, its format, and the options that open its export."""
    image = tmp_path / f"disk.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, image, str(SIZE))
    with DaemonThread() as daemon:
        file = {"driver": "file", "filename": str(image), "discard": "unmap"}
        daemon.execute("blockdev-add", driver=request.param, node_name="disk", file=file, discard="unmap")
        address = {"type": "unix", "path": str(sockets / "disk")}
        daemon.execute("block-export-add", type="vhost-user-blk", id="e", node_name="disk", addr=address, writable=True)
        yield image, request.param, f"driver=virtio-blk-vhost-user,path={address['path']},cache.direct=on"


@requires("qemu-system-x86_64")
def test_the_line_for_qemu_can_be_pasted(image, sockets):
    path = sockets / "it's, a disk"
    with running("blkferry", "serve", "-w", "--vhost-user", path, image().path) as server:
        assert server.line().endswith(": 1 MiB, writable, at\n")
        assert server.line() == f"  {path}\n"
        program, *arguments = shlex.split(server.line().removeprefix("  qemu:"))
        more = ["-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-monitor", "stdio"]
        said = run(program, *arguments, *more, stdin="info qtree\nquit\n").stdout
        assert "dev: vhost-user-blk-pci" in said
        assert server.end()[0] == 0
    assert not path.exists()


def commands(*lines):
    return [part for line in lines for part in ("-c", line)]


def test_what_qemu_io_does(disk):
    image, image_format, options = disk
    run(
        "qemu-io",
        "--image-opts",
        options,
        *commands(
            *("write -P 1 0 8M", "write -z 1M 64k", "write -z -u 2M 1M", "discard 4M 1M", "flush"),
            *("write -P 2 8388096 1536", "aio_write -P 3 16M 1M", "aio_write -P 4 17M 1M", "aio_flush"),
            *("read -P 1 0 1M", "read -P 0 1M 64k", "read -P 0 2M 1M", "read -P 2 8388096 1536"),
            *("writev -P 5 20M 4k 512 64k", "readv -P 5 20M 512 64k 4k"),
        ),
    )
    run("qemu-img", "compare", "-U", "--image-opts", options, f"driver={image_format},file.filename={image}")
    patterns = ("read -P 1 3M 1M", "read -P 0 4M 1M", "read -P 1 5M 3145216", "read -P 3 16M 1M", "read -P 4 17M 1M")
    run("qemu-io", "-r", "-U", "-f", image_format, *commands(*patterns, "read -P 5 20M 70144"), image)
    holes = json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", image_format, image).stdout)
    assert not any(entry["data"] for entry in holes if 4 << 20 <= entry["start"] < 5 << 20)


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.parametrize("what", [[], ["-w"], ["-w", "--flush-interval=64"]], ids=["read", "write", "flush"])
def test_many_requests(disk, depth, what):
    _, _, options = disk
    run("qemu-img", "bench", "-c", "2048", "-d", str(depth), "-s", "16k", *what, "--image-opts", options)


def test_an_image_is_copied_to_it(disk, tmp_path):
    image, image_format, options = disk
    source = tmp_path / "source"
    # QEMU's driver asks for more zeroes at once than a device allows, where there are more (of its own device, too).
    source.write_bytes((bytes(range(256)) * 4096 + bytes(15 << 20)) * 4)
    run("qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", source, options)
    run("qemu-img", "compare", "-U", "-f", "raw", "-F", image_format, source, image)
