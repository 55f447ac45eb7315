"""What is mounted where, as /proc/self/mountinfo says (proc(5)). Looking there never asks a file system anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

FILE_SYSTEM = "fuse"
SUBTYPE = "blkferry"
TYPE = f"{FILE_SYSTEM}.{SUBTYPE}"
"""What the kernel calls mounts of ours."""

_ESCAPED = re.compile(r"\\([0-7]{3})")
_NOT_ON_ANYTHING = "-"


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount. `device` is the st_dev of what is in it; `source` is the image, for mounts of ours."""

    device: int
    path: str
    type: str
    source: str
    options: str

    @property
    def ours(self) -> bool:
        """Whether a blkferry has made it, this process or another one."""
        return self.type == TYPE


def mounts() -> list[Mounted]:
    """All mounts of this process's namespace, a later one on top of earlier ones with the same path."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return list(parse(lines.read()))


def parse(text: str) -> Iterator[Mounted]:
    """The mounts that a mountinfo file tells of."""
    for line in text.splitlines():
        _id, _parent, device, _root, path, *rest = line.split(" ")
        kind, source, options = rest[rest.index(_NOT_ON_ANYTHING) + 1 :]
        major, _, minor = device.partition(":")
        yield Mounted(os.makedev(int(major), int(minor)), _plain(path), kind, _plain(source), options)


def topmost(path: str) -> Mounted | None:
    """What is mounted on exactly this path; it must be a real path (no symlinks, no dots)."""
    return next((mounted for mounted in reversed(mounts()) if mounted.path == path), None)


def by_device(device: int) -> Mounted | None:
    """Where a file system is mounted, None when it is not any more."""
    return next((mounted for mounted in reversed(mounts()) if mounted.device == device), None)


def _plain(escaped: str) -> str:
    """The kernel writes spaces, tabs, newlines, backslashes and "#" in octal."""
    return _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), escaped)
