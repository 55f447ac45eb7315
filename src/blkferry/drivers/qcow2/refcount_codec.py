"""Refcount blocks between their bytes and sequences of numbers, for every width that the format knows.

Entries are big endian; where several share a byte, the first is in its least significant bits (qcow2.rst, "Refcount
block entry"). Everything here is one or two calls into C per block, whatever the width: the tables that unpack and pack
narrow entries are made once per width.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import MutableSequence

MAX_ORDER = 6

_TYPECODE_OF_ORDER = {4: "H", 5: "I", 6: "Q"}
_SWAPPED = sys.byteorder == "little"


class Codec:
    """Entries of 2**`order` bits; `maximum` is the largest refcount that fits.

    `load` gives a bytearray with one entry per byte, or an array for entries wider than that.
    """

    __slots__ = ("bits", "maximum", "order")

    def __init__(self, order: int) -> None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"refcount order {order} is not 0 to {MAX_ORDER}")
        self.order = order
        self.bits = 1 << order
        self.maximum = (1 << self.bits) - 1

    def entries(self, cluster_size: int) -> int:
        """How many entries a refcount block of `cluster_size` bytes has."""
        return cluster_size * 8 >> self.order

    def new(self, count: int) -> MutableSequence[int]:
        """`count` zeroes, of the type that `load` gives."""
        typecode = _TYPECODE_OF_ORDER.get(self.order)
        return bytearray(count) if typecode is None else array(typecode, bytes(count * self.bits // 8))

    def of(self, counts: list[int]) -> MutableSequence[int]:
        """These entries, of the type that `load` gives."""
        typecode = _TYPECODE_OF_ORDER.get(self.order)
        return bytearray(counts) if typecode is None else array(typecode, counts)

    def load(self, data: bytes | bytearray | memoryview) -> MutableSequence[int]:
        """The entries in `data`."""
        typecode = _TYPECODE_OF_ORDER.get(self.order)
        if typecode is not None:
            wide = array(typecode)
            wide.frombytes(data)
            if _SWAPPED:
                wide.byteswap()
            return wide
        if self.order == 3:
            return bytearray(data)
        entries = bytearray(len(data) * 8 >> self.order)
        step = 8 >> self.order
        raw = bytes(data)
        for position, table in enumerate(_unpackers(self.order)):
            entries[position::step] = raw.translate(table)
        return entries

    def dump(self, entries: MutableSequence[int]) -> bytes:
        """The bytes of `entries`, which `load` or `new` made; a whole number of bytes of them."""
        if isinstance(entries, array):
            wide = array(entries.typecode, entries)
            if _SWAPPED:
                wide.byteswap()
            return wide.tobytes()
        assert isinstance(entries, bytearray)
        if self.order == 3:
            return bytes(entries)
        step = 8 >> self.order
        packed = 0
        for position, table in enumerate(_packers(self.order)):
            packed |= int.from_bytes(entries[position::step].translate(table), "little")
        return packed.to_bytes(len(entries) // step, "little")

    @staticmethod
    def find_free(entries: MutableSequence[int], start: int = 0) -> int:
        """The index of the first 0 from `start` on, -1 when there is none."""
        if isinstance(entries, bytearray):
            return entries.find(0, start)
        assert isinstance(entries, array)
        try:
            return entries.index(0, start)
        except ValueError:
            return -1


@functools.cache
def codec(order: int) -> Codec:
    """The codec for entries of 2**`order` bits."""
    return Codec(order)


@functools.cache
def _unpackers(order: int) -> list[bytes]:
    """For each entry of a byte, its value in every byte there is."""
    bits = 1 << order
    mask = (1 << bits) - 1
    return [bytes(byte >> shift & mask for byte in range(256)) for shift in range(0, 8, bits)]


@functools.cache
def _packers(order: int) -> list[bytes]:
    """For each entry of a byte, where its value goes; a value that does not fit is our bug and loses its high bits."""
    bits = 1 << order
    mask = (1 << bits) - 1
    return [bytes((value & mask) << shift for value in range(256)) for shift in range(0, 8, bits)]
