"""A file system on a loop device on a file exported by FUSE: fio verifies it, fstrim trims it, fsck finds nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from cli_process import program
from qmp_process import QmpProcess

import peers

pytestmark = peers.requires("losetup", "sfdisk", "mkfs.ext4", "fsck.ext4", "fio", "qemu-img")

SIZE = 64 << 20

SCRIPT = """
disk=$1 ; directory=$2
sfdisk --quiet --no-reread --no-tell-kernel $disk <<end
label: gpt
start=2048, size=61440, type=linux
start=65536, type=swap
end
loop=$(losetup --find --show --offset 1048576 --sizelimit 31457280 $LOOP_OPTIONS $disk)
trap 'umount $directory 2>/dev/null || :; losetup --detach $loop' EXIT
mkfs.ext4 -q -E lazy_itable_init=0 $loop
mount $loop $directory
fio --name=job --directory=$directory --size=4m --rw=randwrite --bsrange=1k-32k --verify=crc32c --verify_fatal=1 \
    --verify_state_save=0 --randrepeat=0 --ioengine=libaio --iodepth=8 --nrfiles=4 --end_fsync=1 >/dev/null
cp -r /usr/share/common-licenses $directory/
sync
rm $directory/job*
fstrim $directory
umount $directory
mount $loop $directory
diff -r /usr/share/common-licenses $directory/common-licenses
umount $directory
fsck.ext4 -f -n $loop
"""


@pytest.fixture
def daemon() -> Iterator[QmpProcess]:
    with QmpProcess() as process:
        yield process


@pytest.mark.parametrize("options", ["", "--direct-io=on"], ids=["cached", "direct"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_disk_with_a_file_system(daemon, tmp_path, image_format, options):
    image, directory = tmp_path / "image", tmp_path / "directory"
    directory.mkdir()
    argv = [program("blkferry"), "image", "create", "-f", image_format, str(image), str(SIZE)]
    subprocess.run(argv, check=True, capture_output=True)
    file = {"driver": "file", "filename": str(image), "discard": "unmap"}
    daemon.execute("blockdev-add", driver=image_format, node_name="n", file=file, discard="unmap")
    path = daemon.mount("n", tmp_path / "disk")
    script = f"LOOP_OPTIONS={options}\n{SCRIPT}"
    peers.run("sh", "-ec", script, "script", path, directory, timeout=100)
    listed = peers.run("sfdisk", "--dump", path).stdout
    assert "size=       61440" in listed
    daemon.execute("block-export-del", id="e")
    daemon.clear()
    if image_format == "qcow2":
        peers.run("qemu-img", "check", image)
