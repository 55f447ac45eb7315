"""The images that are served, and the state of the page cache that a workload starts from.

They are made once and kept in a cache directory outside the checkout, which must be on a disk file system: the page
cache of a tmpfs cannot be dropped, and its O_DIRECT is none.
"""

from __future__ import annotations

import os
import subprocess
from enum import Enum
from pathlib import Path

from servers import BenchError, peer

MIB = 1 << 20
SIZE = 1 << 30
STRIPE = 64 << 10
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


class Image(Enum):
    RANDOM = "random.img"  # random bytes everywhere
    STRIPED = "striped.img"  # 64 KiB of random bytes and 64 KiB of hole, in turns
    HOLE = "hole.img"  # one hole
    QCOW2 = "random.qcow2"  # the bytes of random.img, made by qemu-img
    QCOW2_FRESH = "fresh.qcow2"  # nothing allocated; made anew for every run

    @property
    def format(self) -> str:
        return "qcow2" if self.value.endswith(".qcow2") else "raw"


class Cache(Enum):
    """What the page cache holds of the image when a measurement starts; nothing of it is dirty."""

    WARM = "everything"
    COLD = "nothing"


def default_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "blkferry" / "bench"


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory."""
    number = directory.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == device:
            return source.split()[0]
    return "unknown"


def prepare(directory: Path, image: Image) -> Path:
    """Make an image unless it exists; it gets its name when it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    if (kind := file_system(directory)) in IN_MEMORY:
        raise BenchError(f"{directory} is on {kind}: name a directory on a disk with --images")
    path = directory / image.value
    if image is Image.QCOW2_FRESH:
        qemu_img("create", "-q", "-f", "qcow2", str(path), str(SIZE))
        return path
    if image is Image.QCOW2:
        raw = prepare(directory, Image.RANDOM)
        if not path.exists() or path.stat().st_mtime < raw.stat().st_mtime:  # rows that write do that to the raw one
            making = path.with_suffix(".making")
            qemu_img("convert", "-f", "raw", "-O", "qcow2", str(raw), str(making))
            making.rename(path)
        return path
    if path.exists() and path.stat().st_size == SIZE:
        return path
    making = path.with_suffix(".making")
    try:
        with making.open("wb") as file:
            if image is Image.RANDOM:
                for _ in range(SIZE // MIB):
                    file.write(os.urandom(MIB))
            elif image is Image.STRIPED:
                for offset in range(0, SIZE, 2 * STRIPE):
                    file.seek(offset)
                    file.write(os.urandom(STRIPE))
            file.truncate(SIZE)
            file.flush()
            os.fsync(file.fileno())
        making.rename(path)
    finally:
        making.unlink(missing_ok=True)
    return path


def content(path: Path) -> Path:
    """The raw image with the bytes that a client sees of this one."""
    return path.with_name(Image.RANDOM.value) if path.name == Image.QCOW2.value else path


def qemu_img(*arguments: str) -> None:
    done = subprocess.run([*peer("qemu-img"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"qemu-img {arguments[0]}: {done.stderr.strip()}")


def remove(directory: Path) -> None:
    for image in Image:
        (directory / image.value).unlink(missing_ok=True)


def settle(path: Path, state: Cache) -> None:
    """Write back what is dirty, then bring the page cache into the wanted state."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if state is Cache.COLD:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return
        buffer = bytearray(MIB)
        offset = 0
        while got := os.preadv(fd, [buffer], offset):
            offset += got
    finally:
        os.close(fd)
