"""Dirty bitmaps: which ranges of a node were written since somebody began to ask.

A write costs the same however many bitmaps record it. The bitmaps of a node have one record in common (`written`), in
granules as fine as the finest of them: a write is marked there and nowhere else. What a bitmap says is what it holds
itself or what the record has, so whoever looks needs no step before it, and looking changes nothing: it may be done
from any thread. Only when something about the bitmaps changes (one comes, goes, is cleared, begins or ends to record)
do those that record take over what the record has, and all of them begin a new one. So a bitmap gets nothing that was
written before it recorded. That must happen while nothing is in flight on the node, and what lookups said is void then.

That the record is told of every write is the part of `graph.access` and of the node.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.graph.granules import PIECE, Granules, coarser, united

if TYPE_CHECKING:
    from blkferry.graph.node import Node


class DirtyBitmap(Granules):
    """The granules of a node of `size` bytes that were written while the bitmap was `enabled`.

    `persistent`: it is stored with the image when that is closed. `inconsistent`: it was not stored in order, and says
    nothing; all it is good for is to be removed. `user` names who works with it, for as long as nobody else may.
    `bits` is all that it says. Of `array`, where the latest may be missing until `take_over`, `changed` tells whether
    anything was changed since it was loaded.
    """

    def __init__(self, name: str, size: int, granularity_bits: int, *, enabled: bool, persistent: bool = False) -> None:
        super().__init__(size, granularity_bits)
        self.name = name
        self.persistent = persistent
        self.inconsistent = False
        self.user = ""
        self.changed = False
        self._enabled = enabled
        self._owner: DirtyBitmaps | None = None
        self._written: Record | None = None  # what it has not taken over yet

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

    # Looking ---------------------------------------------------------------------------------------------------

    def piece(self, start: int, stop: int) -> bytes:
        pending = self._pending(start, stop)  # first: what is taken over from there meanwhile is in `array` by then
        own = super().piece(start, stop)
        return united(own, pending) if pending else own

    def _byte(self, where: int) -> int:
        written = self._written
        if written is None:
            return self.array[where]
        if written.granularity_bits == self.granularity_bits:
            return written.array[where] | self.array[where]
        return self.piece(where, where + 1)[0]

    def _pending(self, start: int, stop: int) -> bytes | bytearray:
        """What the record has for these bytes of `array`; empty if that is nothing."""
        written = self._written
        if written is None:
            return b""
        steps = self.granularity_bits - written.granularity_bits
        fine = written.array[start << steps : stop << steps]
        return coarser(fine, steps) if fine != bytes(len(fine)) else b""

    # Changing --------------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether writes are recorded."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        if self._owner is not None:
            self._owner.begin_anew()

    def take_over(self) -> None:
        """Hold in `array` all that it says."""
        for start in range(0, len(self.array), PIECE):
            pending = self._pending(start, start + PIECE)
            if pending and self.add(start, pending):
                self.changed = True

    def record_in(self, owner: DirtyBitmaps | None, written: Record | None) -> None:
        """Say what it says now and, from now on, what will be in `written`, if there is that."""
        self.take_over()
        self._owner, self._written = owner, written

    def clear(self) -> bytearray:
        """Forget all that was marked. Returns what `restore` brings back."""
        if self._owner is not None:
            self._owner.begin_anew()
        before, self.array = self.array, bytearray(len(self.array))
        self.changed = True
        return before

    def restore(self, array: bytearray) -> None:
        """Hold this again, as before `clear` or `merge`. Nothing has been written since."""
        self.array = array

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
        steps = self.granularity_bits - other.granularity_bits
        if steps >= 0:
            self.add(0, coarser(other.bits, steps))
            return
        at = 0
        for length, dirty in other.runs(0, other.size):
            if dirty:
                self.mark(at, at + length)
            at += length

    def resize(self, size: int) -> None:
        super().resize(size)
        self.changed = True


class Record(Granules):
    """What was written while somebody recorded it.

    `array` stays the same object and never becomes shorter: whoever writes often may mark there himself.
    """

    def resize(self, size: int) -> None:
        room = len(self.array)
        super().resize(size)
        self.array += bytes(max(room - len(self.array), 0))


class DirtyBitmaps(MutableMapping[str, DirtyBitmap]):
    """The bitmaps of one node, by name, in the order they came.

    `written` is the record of those that are enabled, None while there are none. `fit` sees to it that all are as long
    as the node.
    """

    def __init__(self) -> None:
        self._bitmaps: dict[str, DirtyBitmap] = {}
        self.written: Record | None = None

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._bitmaps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def __setitem__(self, name: str, bitmap: DirtyBitmap) -> None:
        self.replace({**self._bitmaps, name: bitmap})

    def __delitem__(self, name: str) -> None:
        left = dict(self._bitmaps)
        del left[name]
        self.replace(left)

    def replace(self, bitmaps: dict[str, DirtyBitmap]) -> None:
        """Have these from now on, in this order."""
        before, self._bitmaps = self._bitmaps, bitmaps
        for bitmap in before.values():
            if bitmap not in bitmaps.values():
                bitmap.record_in(None, None)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Have those that record take over what was written, and begin another record."""
        recording = [bitmap for bitmap in self._bitmaps.values() if bitmap.enabled]
        written = None
        if recording:
            finest = min(bitmap.granularity_bits for bitmap in recording)
            written = Record(max(bitmap.size for bitmap in recording), finest)
        for bitmap in self._bitmaps.values():
            bitmap.record_in(self, written if bitmap.enabled else None)
        self.written = written

    def fit(self, size: int) -> None:
        """Be for a node of `size` bytes."""
        changed = [bitmap for bitmap in self._bitmaps.values() if bitmap.size != size and not bitmap.inconsistent]
        for bitmap in changed:
            bitmap.take_over()  # the last granule of a bitmap may have been marked in one of the record's that goes
        if self.written is not None and self.written.size != size:
            self.written.resize(size)
        for bitmap in changed:
            bitmap.resize(size)


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
