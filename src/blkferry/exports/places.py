"""Where an export's bytes lie, remembered, so that requests need not ask the graph.

Theory of operation. An export that is one piece of one storage, as raw images are, has that piece as its `whole`. Of
any other, what lookups said is kept by granules: a granule that lies in one place, or is all zero, has a piece in
`granules` from the first request that touches it until its range is retired, which happens in the middle of a turn when
a write in it allocates. So whoever uses a piece takes it from here for every request, and within one turn. Granules in
which several things meet are remembered as such and looked at for each request; when there are many of them, granules
become smaller. A piece never reaches beyond its granule: that is what makes retiring cheap.

Whoever overwrites a place that he has from here, `whole` or piece, says so before (`mark`): nodes may have dirty
bitmaps.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from blkferry.exports.marking import Marking, find_marking
from blkferry.extent import Content
from blkferry.graph.access import Run
from blkferry.graph.node import depends_on
from blkferry.graph.root import Root
from blkferry.plane.pace import Pace
from blkferry.plane.storage import Storage
from blkferry.plane.window import REGION_BITS, Window

GRANULE_BITS: Final = 16
"""64 KiB, qcow2's default cluster size. Larger clusters are several granules."""

SMALLEST_GRANULE_BITS: Final = 12

MAX_GRANULES: Final = 1 << 16
"""About 15 MiB of memory for an export, for 4 GiB of working set; beyond it all are forgotten."""

AHEAD: Final = 16
"""Granules that are asked for at once where requests seem to come one after the other."""

MANY_MIXED: Final = 64
"""When this many granules, and an eighth of those that are known, lie in several places, they are too large."""

Ready = tuple[Storage, int, int, bytearray, memoryview, int, int, Window | None]
"""Of a lane in this turn: storage, fd, flags for reads, marks, view, size and hot mark of its window, and that window.

Where nothing may be sent from a mapping the size is 0.
"""

_NO_MARKS: Final = bytearray()
_NO_VIEW: Final = memoryview(b"")


class Lane:
    """A storage that pieces lie in."""

    __slots__ = ("_ready", "_ready_at", "inline", "storage")

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.inline = storage.inline_read_flags is not None
        self._ready_at = 0.0
        self._ready: Ready

    def ready(self, now: float) -> Ready:
        """What the turn that began at `now` needs to know of the storage; found out once a turn."""
        if self._ready_at != now:
            self._ready_at = now
            storage = self.storage
            fd, flags = storage.fd, storage.inline_read_flags or 0
            window = storage.window()
            if window is None or storage.refresh_size() < window.size:
                self._ready = (storage, fd, flags, _NO_MARKS, _NO_VIEW, 0, 0, None)
            else:
                hot = window.tick(now)
                self._ready = (storage, fd, flags, window.marks, window.view, window.size, hot, window)
        return self._ready

    def is_hot(self, place: int, length: int, turn: float) -> bool:
        """Whether what is there is known to be in the page cache and to be no hole."""
        _, _, _, marks, _, map_end, hot, _ = self.ready(turn)
        last = place + length - 1 >> REGION_BITS
        first = place >> REGION_BITS
        return place + length <= map_end and marks[first] == hot == marks[last] and last - first <= 1


Piece = tuple[Lane | None, int, int, int, int]
"""(lane, delta, end, read end, write end) of the export's bytes from some granule's start to `end`.

They lie at their offset plus `delta` of the lane's storage, or are zero if there is none. `end` is 0 where only the
graph can tell. Up to the other two ends they may be read, and overwritten (`mark` first), from within a turn.
"""

NOWHERE: Final[Piece] = (None, 0, 0, 0, 0)
DRIVEN: Final[Piece] = (None, -1, 0, 0, 0)
"""All of it only one driver can read."""

Stretch = tuple[Lane | None, int, int, int]
"""(lane, delta, start, end): like a piece, anywhere in the export."""


class _Found(NamedTuple):
    """A stretch as the graph has it; `known` is false where only a driver can read."""

    lane: Lane | None
    delta: int
    start: int
    end: int
    in_place: bool
    known: bool


class Places:
    """The memory of one export, shared by its clients and owned by the loop of its node."""

    def __init__(self, root: Root, *, writable: bool) -> None:
        self._root = root
        self._writable = writable
        self.size = 0
        self.whole: Piece | None = None
        self.marking: Marking | None = None  # what `mark` marks
        self.granules: dict[int, Piece] = {}
        self.bits = GRANULE_BITS
        self.may_write = False  # from within a turn
        self.opaque = False  # all of the export is for one driver to read: there are no places
        self.lent = False  # a place that is being sent from may be used for something else meanwhile
        self.turn = 0.0  # when this turn of a client began
        self.own_pace = Pace()  # where there is no `whole`
        self._looked = False
        self._mixed = 0
        self._lanes: dict[Storage, Lane] = {}

    def look(self) -> Piece | None:
        """The piece that is all of the export, None where there is no such."""
        if not self._looked:
            self._looked = True
            self.may_write = self._writable and not self._root.detects_zeroes
            self.opaque = False
            self.lent = any(node.reuses_places for node in depends_on(self._root.node))
            self.marking = find_marking(self._root.node, self.size) if self._writable and self.size else None
            self.whole = self._find_whole()
        return self.whole

    @property
    def pace(self) -> Pace:
        """That of writes within a turn: of the one storage that all lies in, else of the export's own."""
        whole = self.look()
        return self.own_pace if whole is None or whole[0] is None else whole[0].storage.pace

    def _find_whole(self) -> Piece | None:
        found = self._root.runs(0, self.size) if self.size else None
        if not found or len(found) > 1:
            return None
        (run,) = found
        if run.content is Content.OPAQUE and run.length == self.size:
            self.opaque, self.may_write = True, False
            return None
        if run.content is not Content.DATA or run.storage is None or run.length < self.size:
            return None
        if self._writable and not self._is_in_place(run):  # a write will move a part of it
            return None
        lane = self._lane(run.storage)
        write_end = self.size if self.may_write else 0
        return lane, run.offset, self.size, self.size if lane.inline else 0, write_end

    def retired(self, start: int, end: int | None) -> None:
        """Earlier lookups of a range are void; of everything, if `end` is None."""
        if end is None or self.whole is not None:
            self.drop()
            return
        granules = self.granules
        first, last = start >> self.bits, (end - 1) >> self.bits
        if last - first < len(granules):
            for number in range(first, last + 1):
                granules.pop(number, None)
        else:
            for number in [each for each in granules if first <= each <= last]:
                del granules[number]

    def drop(self) -> None:
        """Forget everything, storages too."""
        self.granules.clear()
        self._lanes.clear()
        self.whole = self.marking = None
        self._looked = False

    def mark(self, offset: int, length: int) -> None:
        """A range is about to be overwritten at a place that was found here."""
        if self.marking is not None and length:
            self.marking.mark(offset, length)

    def _is_in_place(self, run: Run) -> bool:
        """Whether a run may be overwritten, with no more to do before than `mark`."""
        return run.in_place and (not run.marks or (self.marking is not None and self.marking.suffices(run)))

    def _lane(self, storage: Storage) -> Lane:
        lane = self._lanes.get(storage)
        if lane is None:
            lane = self._lanes[storage] = Lane(storage)
        return lane

    # Granules ----------------------------------------------------------------------------------------------------

    def fill(self, offset: int) -> Piece:
        """The piece at `offset`, which `granules` does not have. `bits` may have changed afterwards."""
        if self.opaque:
            return DRIVEN
        if offset >= self.size:
            return NOWHERE
        bits, granules = self.bits, self.granules
        number = offset >> bits
        start = number << bits
        ahead = AHEAD if number - 1 in granules and number + 1 not in granules else 1
        left = self.size - start
        found = self._find(start, min(1 << bits, left), min(ahead << bits, left))
        if found is None:
            return NOWHERE
        if len(granules) >= MAX_GRANULES:
            granules.clear()
            self._mixed = 0
        for stretch in found:
            self._keep(stretch)
        piece = granules.get(number)
        if piece is None:
            piece = granules[number] = NOWHERE
            self._mixed += 1
            if self._mixed > MANY_MIXED and self._mixed << 3 > len(granules) and bits > SMALLEST_GRANULE_BITS:
                self.bits -= 2
                self._mixed = 0
                granules.clear()
        return piece

    def _keep(self, found: _Found) -> None:
        """Note a piece for every granule that is wholly inside of what was found."""
        lane, delta, start, stop, in_place, known = found
        bits, size = self.bits, self.size
        readable = lane is not None and lane.inline
        writable = in_place and self.may_write and lane is not None and not lane.storage.direct
        number = start + (1 << bits) - 1 >> bits
        while (end := min(number + 1 << bits, size)) <= stop and number << bits < end:
            piece = (lane, delta, end, end if readable else 0, end if writable else 0) if known else DRIVEN
            self.granules[number] = piece
            number += 1

    def _find(self, start: int, enough: int, most: int) -> list[_Found] | None:
        """Ask the graph for `enough` bytes from `start` and take up to `most`; None when it must load metadata."""
        self.look()
        found: list[_Found] = []
        at = start
        while at < start + enough:
            runs = self._root.runs(at, start + most - at)
            if not runs:
                return None
            for run in runs:
                known = run.content is Content.ZERO
                lane, delta = None, 0
                if run.content is Content.DATA and run.storage is not None:
                    lane, delta, known = self._lane(run.storage), run.offset - run.start, True
                at = run.start + run.length
                begun, in_place = run.start, self._is_in_place(run)
                if found and found[-1][:2] == (lane, delta) and found[-1][4:] == (in_place, known):
                    begun = found.pop().start
                found.append(_Found(lane, delta, begun, at, in_place, known))
        return found

    def reach(self, piece: Piece, end: int) -> int:
        """How far, up to `end` at least if it can be, the place of a piece that may be read goes on behind it."""
        lane, delta, at, _, _ = piece
        while at < end:
            following = self.granules.get(at >> self.bits) or self.fill(at)
            if following[0] is not lane or following[1] != delta:
                break
            at = following[2]
        return at

    # Ranges ------------------------------------------------------------------------------------------------------

    def stretches(self, offset: int, length: int) -> list[Stretch] | None:
        """Where a range of the export lies; None if that takes loading metadata, or a driver to read it."""
        end = offset + length
        whole = self.look()
        if whole is not None:
            return [(whole[0], whole[1], offset, end)]
        found: list[Stretch] = []
        at = offset
        while at < end:
            piece = self.granules.get(at >> self.bits) or self.fill(at)
            if piece is DRIVEN:
                return None
            lane, delta, until, _, _ = piece
            parts: list[Stretch] | None = [(lane, delta, at, min(until, end))]
            if not until:
                parts = self._mixed_stretches(at, min((at >> self.bits) + 1 << self.bits, end))
            if parts is None:
                return None
            for lane, delta, start, stop in parts:
                if found and found[-1][0] is lane and found[-1][1] == delta:
                    found[-1] = (lane, delta, found[-1][2], stop)
                else:
                    found.append((lane, delta, start, stop))
                at = stop
        return found

    def _mixed_stretches(self, start: int, end: int) -> list[Stretch] | None:
        found = self._find(start, end - start, end - start)
        if found is None or not all(part.known for part in found):
            return None
        return [part[:4] for part in found]

    def in_place(self, offset: int, length: int) -> tuple[Storage, int] | None:
        """The one place that a range may be overwritten at, if there is one; it counts as written from then on."""
        whole = self.look()
        if whole is not None:
            lane, delta, _, _, write_end = whole
            assert lane is not None
            if offset + length > write_end:
                return None
            self.mark(offset, length)
            return lane.storage, offset + delta
        found = self._find(offset, length, length) if self.may_write else None
        if found is None or len(found) > 1 or not found[0].in_place or found[0].lane is None:
            return None
        self.mark(offset, length)
        return found[0].lane.storage, offset + found[0].delta

    def is_plain_write(self, storage: Storage, place: int, length: int, *, fua: bool) -> bool:
        """Whether a write in place by the engine (`fast_write`) is all there is to do, with `fua` durability too."""
        if fua and self._root.node.flush_target() is not storage:
            return False
        return storage.alignment == 1 or (not (place | length) % storage.alignment and storage.write_shortcut)
