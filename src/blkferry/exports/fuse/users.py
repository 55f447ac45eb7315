"""Who has a file open, for those who are told that it is in use. Asks /proc and /sys only, never the file system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from blkferry.plane.patience import within

LOOK_SECONDS = 5.0
"""A machine may have very many processes, and then nobody is found in time."""


async def users(path: str) -> list[str]:
    """Processes as "name (pid 12)", and loop devices. Processes of others may be hidden from us, and none be found."""
    try:
        return await within(LOOK_SECONDS, _find, path)
    except TimeoutError:
        return []


def _find(path: str) -> list[str]:
    return [*_processes(path), *_loop_devices(path)]


def _processes(path: str) -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is none of our business
            descriptors = f"/proc/{pid}/fd"
            if any(_target(f"{descriptors}/{fd}") == path for fd in os.listdir(descriptors)):
                with open(f"/proc/{pid}/comm", errors="replace") as name:
                    yield f"{name.read().strip()} (pid {pid})"


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile; of our own process that is also what lists these
        return ""


def _loop_devices(path: str) -> Iterator[str]:
    for name in os.listdir("/sys/block") if os.path.isdir("/sys/block") else ():
        try:
            with open(f"/sys/block/{name}/loop/backing_file", errors="surrogateescape") as backing:
                if backing.read().removesuffix("\n") == path:
                    yield f"/dev/{name}"
        except OSError:
            continue
