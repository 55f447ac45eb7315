"""Dirty bitmaps: which ranges of a node were written since somebody began to ask."""

from __future__ import annotations

import re
from collections.abc import Iterator

from blkferry.errors import Error, ErrorKind

_ALL_CLEAN, _ALL_DIRTY = 0, 0xFF
_STRIDE = 512  # bytes that are compared at once: ten times as fast as looking for the one that differs
_ALIKE = {each: bytes([each]) * _STRIDE for each in (_ALL_CLEAN, _ALL_DIRTY)}
_OTHER_THAN = {each: re.compile(b"[^\\x%02x]" % each) for each in (_ALL_CLEAN, _ALL_DIRTY)}


class DirtyBitmap:
    """One bit for every `1 << granularity_bits` bytes of a node of `size` bytes; bit 0 is the lowest of byte 0.

    While it is `enabled`, every write to the node is marked. `changed` tells whether a bit was since it was loaded.
    An `inconsistent` one has missed writes: it has no bits, and is good for nothing but to be removed. `user` says who
    counts on it as it is, None when nobody does.
    """

    def __init__(
        self, name: str, size: int, granularity_bits: int, *, enabled: bool, inconsistent: bool = False
    ) -> None:
        self.name = name
        self.size = size
        self.granularity_bits = granularity_bits
        self.enabled = enabled
        self.inconsistent = inconsistent
        self.changed = False
        self.user: str | None = None
        self.bits = bytearray(0 if inconsistent else (self.count + 7) >> 3)

    def acquire(self, user: str) -> None:
        """Let nobody but `user` use or change it, until `release`. Raises Error(BUSY) or, if inconsistent, CORRUPT."""
        if self.user is not None:
            raise Error(
                ErrorKind.BUSY,
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used",
                hint=f"It is used by {self.user}.",
                bitmap=self.name,
            )
        if self.inconsistent:
            raise Error(
                ErrorKind.CORRUPT,
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk.",
                bitmap=self.name,
            )
        self.user = user

    def release(self) -> None:
        """End that use."""
        self.user = None

    @property
    def count(self) -> int:
        """How many bits there are."""
        return (self.size + (1 << self.granularity_bits) - 1) >> self.granularity_bits

    def become(self, other: DirtyBitmap) -> None:
        """Say what another one says, of the same granularity; whoever uses this one goes on."""
        self.size, self.bits, self.enabled, self.inconsistent = (
            other.size,
            other.bits,
            other.enabled,
            other.inconsistent,
        )
        self.changed = other.changed

    def runs(self, start: int, end: int) -> Iterator[tuple[int, bool]]:
        """The range from `start` to `end`, inside the node, as (length, dirty); no two neighbours are alike.

        What is marked meanwhile may be in it or not.
        """
        while start < end:
            index = start >> self.granularity_bits
            is_dirty = bool(self.bits[index >> 3] >> (index & 7) & 1)
            stop = min(end, self._first_other(index, is_dirty, end) << self.granularity_bits)
            yield stop - start, is_dirty
            start = stop

    def _first_other(self, index: int, is_dirty: bool, end: int) -> int:
        """The first bit after `index` that is not like it, or one that is not before `end`."""
        like = _ALL_DIRTY if is_dirty else _ALL_CLEAN
        byte = index >> 3
        others = (self.bits[byte] ^ like) >> (index & 7) << (index & 7)
        if not others:
            end_byte = (((end - 1) >> self.granularity_bits) >> 3) + 1
            byte += 1
            while byte < end_byte and self.bits[byte : byte + _STRIDE] == _ALIKE[like]:
                byte += _STRIDE
            found = _OTHER_THAN[like].search(self.bits, byte, end_byte)
            if found is None:
                return end_byte << 3
            byte = found.start()
            others = self.bits[byte] ^ like
        return (byte << 3) + (others & -others).bit_length() - 1

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
