"""Servers that show the image as a file, by FUSE: when such a file is there, and where.

A server from the peers root mounts in a mount namespace of its own; by way of /proc its files can be opened from here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import START_SECONDS, Access, BenchError, Server, check_alive, running, said

_CHECKED_LENGTH = 256 << 10
_CHECKED_EVERY = 200 << 20


@contextmanager
def showing(server: Server, access: Access) -> Iterator[tuple[int, Path]]:
    """Run a server; yields its process id, and the file it shows, when that has the image's bytes."""
    mountpoint = access.mountpoint
    mountpoint.unlink(missing_ok=True)
    mountpoint.touch()
    with running(server.command(access), mountpoint.parent) as process:
        path = Path(f"/proc/{process.pid}/root{mountpoint}") if server.mounts else access.image
        size = access.image.stat().st_size
        deadline = time.monotonic() + START_SECONDS
        while not _has_size(path, size):
            check_alive(server, process, mountpoint.parent)
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{server.label} showed nothing within {START_SECONDS:.0f} s: {said(mountpoint.parent)}"
                )
            time.sleep(0.02)
        _check(server, path, access.image)
        yield process.pid, path
        check_alive(server, process, mountpoint.parent)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _check(server: Server, path: Path, image: Path) -> None:
    with path.open("rb", buffering=0) as shown, image.open("rb", buffering=0) as there:
        for offset in range(0, os.fstat(there.fileno()).st_size, _CHECKED_EVERY):
            both = [os.pread(each.fileno(), _CHECKED_LENGTH, offset) for each in (shown, there)]
            if both[0] != both[1]:
                raise BenchError(f"{server.label} shows other bytes than the image has at offset {offset}")
