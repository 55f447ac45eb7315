"""Dirty bitmaps: which ranges of a node were written since somebody began to ask."""

from __future__ import annotations


class DirtyBitmap:
    """One bit for every `1 << granularity_bits` bytes of a node of `size` bytes; bit 0 is the lowest of byte 0.

    While it is `enabled`, every write to the node is marked. `changed` tells whether a bit was since it was loaded.
    """

    def __init__(self, name: str, size: int, granularity_bits: int, *, enabled: bool) -> None:
        self.name = name
        self.size = size
        self.granularity_bits = granularity_bits
        self.enabled = enabled
        self.changed = False
        self.bits = bytearray((self.count + 7) >> 3)

    @property
    def count(self) -> int:
        """How many bits there are."""
        return (self.size + (1 << self.granularity_bits) - 1) >> self.granularity_bits

    def mark(self, start: int, end: int) -> None:
        """The bytes from `start` to `end` are being written."""
        first, last = start >> self.granularity_bits, (end - 1) >> self.granularity_bits
        if end <= start:
            return
        self.changed = True
        bits = self.bits
        first_byte, last_byte = first >> 3, last >> 3
        first_mask, last_mask = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        if first_byte == last_byte:
            bits[first_byte] |= first_mask & last_mask
            return
        bits[first_byte] |= first_mask
        bits[last_byte] |= last_mask
        if last_byte - first_byte > 1:
            bits[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)

    def resize(self, size: int) -> None:
        """The node has another size now. What is new has not been written."""
        self.size = size
        self.changed = True
        wanted = (self.count + 7) >> 3
        if wanted <= len(self.bits):
            del self.bits[wanted:]
            if self.count & 7:
                self.bits[-1] &= (1 << (self.count & 7)) - 1
        else:
            self.bits += bytes(wanted - len(self.bits))
