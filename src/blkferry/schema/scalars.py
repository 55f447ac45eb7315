"""Integers and sizes as people write them in `key=value` options.

Pure text to number; it knows neither members nor errors of the protocol: None means "not such a number".
"""

from __future__ import annotations

import re

MAX_DIGITS = 64
"""Longest number looked at: 64 bits need 22 octal digits; int() on an unbounded string is quadratic."""

_INTEGER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")
_SIZE = re.compile(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|([0-9]*)(\.?)([0-9]*)([bkmgtpeBKMGTPE]?))")
_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_integer(text: str) -> int | None:
    """Decimal, 0x hexadecimal or 0-led octal, with a leading blank or sign."""
    found = _INTEGER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if found is None:
        return None
    sign, hexadecimal, octal, decimal = found.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return -value if sign == "-" else value


def parse_size(text: str) -> int | None:
    """Bytes: a decimal number, perhaps with a fraction, and a one-letter binary suffix; or plain hexadecimal.

    A fraction of a byte that remains is cut off (`0.3k` is 307), but one that is written is refused (`1.5`).
    """
    found = _SIZE.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if found is None:
        return None
    hexadecimal, whole, point, fraction, suffix = found.groups()
    if hexadecimal:
        return int(hexadecimal, 16)
    shift = _SHIFT[suffix.lower()]
    if not whole + fraction or (point and shift == 0):
        return None
    scaled: int = (int(whole + fraction) << shift) // 10 ** len(fraction)
    return scaled
