"""Dirty bitmaps: which ranges of a node were written since somebody began to ask.

A bitmap belongs to one node (`Node.dirty_bitmaps`) and to that node's loop. It marks what it is told; that it is told
of every write is the part of `graph.access` and of the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from blkferry.graph.node import Node

_LOWEST: Final = bytes([0, *((byte & -byte).bit_length() - 1 for byte in range(1, 256))])
"""The number of the lowest bit that is set, of a byte that has one."""

_FLAGS_OF_WORTH: Final = bytes([0] + [1] * 255)
_FLAGS_OF_LACK: Final = bytes([1] * 255 + [0])


class DirtyBitmap:
    """One bit for every `1 << granularity_bits` bytes of a node of `size` bytes; bit 0 is the lowest of byte 0.

    While it is `enabled`, every write to the node is marked. `persistent`: it is stored with the image when that is
    closed. `inconsistent`: it was not stored in order, and says nothing; all it is good for is to be removed. `user`
    names who works with it, for as long as nobody else may. `changed` tells whether a bit was since it was loaded.
    """

    def __init__(self, name: str, size: int, granularity_bits: int, *, enabled: bool, persistent: bool = False) -> None:
        self.name = name
        self.size = size
        self.granularity_bits = granularity_bits
        self.enabled = enabled
        self.persistent = persistent
        self.inconsistent = False
        self.user = ""
        self.changed = False
        self.bits = bytearray((self.count + 7) >> 3)

    @property
    def count(self) -> int:
        """How many bits there are."""
        return (self.size + (1 << self.granularity_bits) - 1) >> self.granularity_bits

    @property
    def granularity(self) -> int:
        """What one bit stands for, in bytes."""
        return 1 << self.granularity_bits

    @property
    def dirty_bytes(self) -> int:
        """How many bytes the bits that are set stand for; the last one for no more than there is."""
        dirty = int.from_bytes(self.bits, "little").bit_count() << self.granularity_bits
        beyond = (self.count << self.granularity_bits) - self.size
        return dirty - beyond if beyond and self._is_set(self.count - 1) else dirty

    def _is_set(self, number: int) -> bool:
        return bool(self.bits[number >> 3] >> (number & 7) & 1)

    # Users -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.user)

    def acquire(self, user: str) -> None:
        """Let nobody else change, remove or use it until `release`; `user` says who. It goes on recording."""
        self.check(busy=True, inconsistent=True)
        self.user = user

    def release(self) -> None:
        """Let others have it again."""
        self.user = ""

    def check(self, *, busy: bool, inconsistent: bool) -> None:
        """Raise Error where it is busy or inconsistent, of these what is asked for."""
        if busy and self.user:
            raise Error(
                ErrorKind.BUSY,
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used",
                hint=f"It is used by {self.user}.",
                bitmap=self.name,
            )
        if inconsistent and self.inconsistent:
            raise Error(
                ErrorKind.CORRUPT,
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
                bitmap=self.name,
            )

    # Bits ------------------------------------------------------------------------------------------------------

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

    def covers(self, start: int, end: int) -> bool:
        """Whether all bytes from `start` to `end` (more than none, inside the node) are marked."""
        first, last = start >> self.granularity_bits, (end - 1) >> self.granularity_bits
        if first == last:
            return self._is_set(first)
        return self._next(first, last + 1, set_=False) > last

    def runs(self, start: int, end: int) -> Iterator[tuple[int, bool]]:
        """What the range from `start` to `end` (inside the node) consists of: lengths in bytes, and whether dirty.

        Neighbours differ. The bitmap must not be resized meanwhile; what is marked meanwhile may be seen or not.
        """
        at, bits = start, self.granularity_bits
        stop = (end - 1 >> bits) + 1
        while at < end:
            number = at >> bits
            dirty = self._is_set(number)
            until = min(self._next(number + 1, stop, set_=not dirty) << bits, end)
            yield until - at, dirty
            at = until

    def _next(self, number: int, stop: int, *, set_: bool) -> int:
        """The first bit from `number` on that is set, or is not; `stop` if there is none before that."""
        bits, where = self.bits, number >> 3
        if number >= stop:
            return stop
        # Of inverted bytes the lowest set bit is the lowest one that is not set.
        flip = 0 if set_ else 0xFF
        byte = (bits[where] ^ flip) >> (number & 7) << (number & 7)
        if not byte:
            where = self._next_byte(where + 1, (stop + 7) >> 3, set_=set_)
            if where < 0:
                return stop
            byte = bits[where] ^ flip
        return min((where << 3) + _LOWEST[byte], stop)

    def _next_byte(self, where: int, stop: int, *, set_: bool) -> int:
        """The first byte from `where` on with a bit that is set, or is not; -1 if there is none before `stop`."""
        bits, step = self.bits, 512
        flags = _FLAGS_OF_WORTH if set_ else _FLAGS_OF_LACK
        while where < stop:
            found = bits[where : min(where + step, stop)].translate(flags).find(1)
            if found >= 0:
                return where + found
            where += step
            step = min(step * 2, 1 << 20)
        return -1

    def clear(self) -> None:
        """Forget all that was marked."""
        self.bits = bytearray(len(self.bits))
        self.changed = True

    def merge(self, other: DirtyBitmap) -> None:
        """Mark what `other`, a bitmap of the same size, has marked; where granules differ, every one it touches."""
        if other.size != self.size:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Bitmaps are of different sizes (destination size is "
                f"{self.size}, source size is {other.size}) and can't be merged",
                bitmap=self.name,
            )
        self.changed = True
        if other.granularity_bits == self.granularity_bits:
            merged = int.from_bytes(self.bits, "little") | int.from_bytes(other.bits, "little")
            self.bits[:] = merged.to_bytes(len(self.bits), "little")
            return
        at = 0
        for length, dirty in list(other.runs(0, other.size)):
            if dirty:
                self.mark(at, at + length)
            at += length

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


def mark_recording(node: Node, start: int, end: int) -> int:
    """Mark a range (more than nothing, inside the node) in all that record; 0 if it was news to none of them.

    Otherwise the largest granularity of those to which it was. Every write that allocates comes here, so what is
    commonest, a range within one granule, is done without a call.
    """
    widest = 0
    for bitmap in node.dirty_bitmaps.values():
        if not bitmap.enabled:
            continue
        if bitmap.size != node.length:
            node.fit_bitmaps()
        shift = bitmap.granularity_bits
        first = start >> shift
        if (end - 1) >> shift == first:
            bits, where, bit = bitmap.bits, first >> 3, 1 << (first & 7)
            if bits[where] & bit:
                continue
            bits[where] |= bit
            bitmap.changed = True
        elif bitmap.covers(start, end):
            continue
        else:
            bitmap.mark(start, end)
        if shift > widest:  # noqa: PLR1730 - a call of max would be a fifth of all this
            widest = shift
    return 1 << widest if widest else 0


def find_bitmap(node: Node, name: str) -> DirtyBitmap:
    """The bitmap of this name that the node itself has. Raises Error if there is none."""
    bitmap = node.dirty_bitmaps.get(name)
    if bitmap is None:
        raise Error(ErrorKind.NOT_FOUND, f"Dirty bitmap '{name}' not found", node=node.name, bitmap=name)
    return bitmap


def find_bitmap_below(node: Node, name: str) -> tuple[Node, DirtyBitmap] | None:
    """The first bitmap of this name from `node` down its chain of filters and backing files, and whose it is."""
    current: Node | None = node
    while current is not None:
        bitmap = current.dirty_bitmaps.get(name)
        if bitmap is not None:
            return current, bitmap
        edge = current.children.get("backing") or (current.children.get("file") if current.is_filter else None)
        current = edge.node if edge is not None else None
    return None
