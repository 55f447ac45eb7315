"""Tables of 64-bit words between the disk and memory, and the error for words that cannot be."""

from __future__ import annotations

import errno
import sys
from array import array


class CorruptError(OSError):
    """A structure of the image is wrong: EIO for whoever asked, and `offset` and the message for everybody else."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(errno.EIO, message)
        self.offset = offset


def big_endian(values: array[int]) -> bytes:
    """The on-disk form of 64-bit entries."""
    if sys.byteorder == "big":
        return values.tobytes()
    swapped = array("Q", values)
    swapped.byteswap()
    return swapped.tobytes()


def from_big_endian(data: bytes | bytearray | memoryview) -> array[int]:
    """64-bit entries from their on-disk form."""
    values = array("Q")
    values.frombytes(data)
    if sys.byteorder == "little":
        values.byteswap()
    return values
