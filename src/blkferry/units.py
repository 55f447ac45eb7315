"""Sizes for people: "64M" to bytes and back. Binary units only, as QEMU has them."""

from __future__ import annotations

import re

GIB = 1 << 30

SECTOR = 512
"""Node lengths and many formats count in sectors of this size, whatever the disk's own sector is."""

_SUFFIXES = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?([bBkKmMgGtTpPeE]?)(?:i?[bB])?")


def parse_size(text: str) -> int:
    """Bytes in "4096", "4k", "1.5G" or "64MiB"; raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size; write it like 4096, 64M or 1.5G")
    whole, fraction, suffix = match.groups()
    shift = _SUFFIXES[suffix.upper()]
    size = int(whole) << shift
    if fraction:
        size += (int(fraction) << shift) // 10 ** len(fraction)
    return size


def format_size(size: int) -> str:
    """The shortest exact-enough form of a size in bytes: 1073741824 is "1 GiB", 1536 is "1.5 KiB"."""
    for suffix, shift in (("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {suffix}"
    return f"{size} bytes"


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is not above `value`."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return value + -value % alignment
