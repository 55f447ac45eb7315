"""One bit for each granule of a disk: which ranges something happened to. Pure: it does not know what that is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_LOWEST: Final = bytes([0, *((byte & -byte).bit_length() - 1 for byte in range(1, 256))])
"""The number of the lowest bit that is set, of a byte that has one."""

_FLAGS_OF_WORTH: Final = bytes([0] + [1] * 255)
_FLAGS_OF_LACK: Final = bytes([1] * 255 + [0])

_HALVED: Final = bytes(sum(1 << bit for bit in range(4) if byte >> 2 * bit & 3) for byte in range(256))
"""Of a byte's four pairs of bits, in the lower half of a byte, which have one that is set."""

_HALVED_UPWARDS: Final = bytes(half << 4 for half in _HALVED)

PIECE: Final = 1 << 20
"""What is looked at or put together at once, in bytes of bits: some milliseconds of work."""


class Granules:
    """One bit for every `1 << granularity_bits` bytes of `size`; bit 0 is the lowest of byte 0.

    `array` holds them.
    """

    def __init__(self, size: int, granularity_bits: int) -> None:
        self.size = size
        self.granularity_bits = granularity_bits
        self.array = bytearray((self.count + 7) >> 3)

    @property
    def count(self) -> int:
        """How many bits there are."""
        return (self.size + (1 << self.granularity_bits) - 1) >> self.granularity_bits

    @property
    def granularity(self) -> int:
        """What one bit stands for, in bytes."""
        return 1 << self.granularity_bits

    # Changing --------------------------------------------------------------------------------------------------

    def mark(self, start: int, end: int) -> None:
        """Something happened to the bytes from `start` to `end`."""
        if end <= start:
            return
        shift, array = self.granularity_bits, self.array
        first, last = start >> shift, end - 1 >> shift
        if first == last:  # most writes
            array[first >> 3] |= 1 << (first & 7)
            return
        first_byte, last_byte = first >> 3, last >> 3
        first_mask, last_mask = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        if first_byte == last_byte:
            array[first_byte] |= first_mask & last_mask
            return
        array[first_byte] |= first_mask
        array[last_byte] |= last_mask
        if last_byte - first_byte > 1:
            array[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)

    def add(self, start: int, bits: bytes | bytearray) -> bool:
        """Set what is set in `bits`, from byte `start` of `array` on; tells whether anything was not set before."""
        before = self.array[start : start + len(bits)]
        merged = united(before, bits)
        self.array[start : start + len(before)] = merged
        return merged != before

    def resize(self, size: int) -> None:
        """Be for `size` bytes from now on. To what is new nothing has happened."""
        self.size = size
        wanted = (self.count + 7) >> 3
        if wanted <= len(self.array):
            del self.array[wanted:]
            if self.count & 7:
                self.array[-1] &= (1 << (self.count & 7)) - 1
        else:
            self.array += bytes(wanted - len(self.array))

    # Looking ---------------------------------------------------------------------------------------------------

    def piece(self, start: int, stop: int) -> bytes:
        """The bits, of these bytes of `array` or as many as there are."""
        return bytes(self.array[start:stop])

    @property
    def bits(self) -> bytes:
        """All of them."""
        return b"".join(self.piece(start, start + PIECE) for start in range(0, len(self.array), PIECE))

    @property
    def dirty_bytes(self) -> int:
        """How many bytes the bits that are set stand for; the last one for no more than there is."""
        bits = self.bits
        dirty = int.from_bytes(bits, "little").bit_count() << self.granularity_bits
        last = self.count - 1
        beyond = (self.count << self.granularity_bits) - self.size
        return dirty - beyond if beyond and bits[last >> 3] >> (last & 7) & 1 else dirty

    def runs(self, start: int, end: int) -> Iterator[tuple[int, bool]]:
        """What the range from `start` to `end` (inside the size) consists of: lengths in bytes, and whether dirty.

        Neighbours differ. The size must not change meanwhile; what is marked meanwhile may be seen or not.
        """
        at, shift = start, self.granularity_bits
        stop = (end - 1 >> shift) + 1
        while at < end:
            number = at >> shift
            dirty = bool(self._byte(number >> 3) >> (number & 7) & 1)
            until = min(self._next(number + 1, stop, set_=not dirty) << shift, end)
            yield until - at, dirty
            at = until

    def _byte(self, where: int) -> int:
        return self.array[where]

    def _next(self, number: int, stop: int, *, set_: bool) -> int:
        """The first bit from `number` on that is set, or is not; `stop` if there is none before that."""
        where = number >> 3
        if number >= stop:
            return stop
        # Of inverted bytes the lowest set bit is the lowest one that is not set.
        flip = 0 if set_ else 0xFF
        byte = (self._byte(where) ^ flip) >> (number & 7) << (number & 7)
        if not byte:
            where, byte = self._next_byte(where + 1, (stop + 7) >> 3, set_=set_)
            if not byte:
                return stop
        return min((where << 3) + _LOWEST[byte], stop)

    def _next_byte(self, where: int, stop: int, *, set_: bool) -> tuple[int, int]:
        """The first byte from `where` on with a bit that is set, or is not; and these bits, 0 if there are none."""
        step = 512
        flags, flip = (_FLAGS_OF_WORTH, 0) if set_ else (_FLAGS_OF_LACK, 0xFF)
        while where < stop:
            piece = self.piece(where, min(where + step, stop))
            found = piece.translate(flags).find(1)
            if found >= 0:
                return where + found, piece[found] ^ flip
            where += step
            step = min(step * 2, PIECE)
        return stop, 0


def united(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """What is set in either, as long as `one`."""
    length = len(one)
    both = int.from_bytes(one, "little") | int.from_bytes(other[:length], "little")
    return both.to_bytes(length, "little")


def coarser(bits: bytes | bytearray, steps: int) -> bytes | bytearray:
    """The bits of granules that are larger by `steps` powers of two, where the first of `bits` is the first of one."""
    for _ in range(steps):
        bits = united(bits[0::2].translate(_HALVED), bits[1::2].translate(_HALVED_UPWARDS))
    return bits
