"""The reconnect log: which requests a daemon had taken from the rings and not given back, should it die.

A file that is mapped and that nobody ever syncs: it has to survive the process, not the machine. For each virtqueue it
has a region in the manner of the vhost-user specification ("Inflight I/O tracking"), which costs four stores for every
request, and a shortcut for what begins and ends together:

    le16 version  le16 entries  le16 last_batch_head  2 bytes unused  le16 begun  le16 used_index  4 bytes unused
    for each descriptor: u8 in flight  5 bytes unused  le16 next  le64 counter
    le16 heads of those that began together, as many as there are descriptors

Before the regions is a byte that says whether writes were answered which only the daemon knows of, as those to new
clusters of a qcow2 image before a flush: they are lost with it, and its successor has to say so.

Requests are noted before they begin: their heads, then `begun`, how many they are. As long as the used ring stays at
`used_index` they are in flight. When it moves on they are over, all of them at once: what does not end together with
those it began with is marked first, each for itself, and `begun` is 0 from then on. Marked requests that are done are
chained from `last_batch_head` before the driver can see them, and unmarked after it can: where the used ring has moved
on and `used_index` has not, the chain says who was last. `begun` and `used_index` are one word, stored at once.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import runtime
from blkferry.units import align_up
from blkferry.wire.virtio.chain import Chain, Descriptor

_VERSION: Final = 1
_HEADER = struct.Struct("<HHHxxHHxxxx")
_ENTRY: Final = 16
_LAST_BATCH: Final = 2
"""Of the header's 16-bit words."""
_BATCH: Final = 2
"""Of its 32-bit words: `begun`, and `used_index` in the upper half."""
_HEAD: Final = 64
"""Bytes before the regions, of which one is used."""


def region_size(entries: int) -> int:
    """Bytes of a virtqueue's region."""
    return align_up(_HEADER.size + (_ENTRY + 2) * entries, 64)


class QueueLog:
    """The region of one virtqueue; what `Inflight` asks for. `note` is called before the driver sees what was done."""

    def __init__(self, region: memoryview, entries: int, note: Callable[[], None] = lambda: None) -> None:
        self._entries = entries
        self._note = note
        self._bytes = region.cast("B")
        self._words = self._bytes.cast("H")
        self._pairs = self._bytes.cast("I")
        self._longs = self._bytes.cast("Q")
        self._heads = self._words[(_HEADER.size + _ENTRY * entries) // 2 :][:entries]
        self._batch: list[int] = []  # began together, and are not marked
        self._ended: Sequence[int] = ()
        self._used = 0
        self._counter = 0
        self._pending: list[int] = []

    @property
    def sound(self) -> bool:
        """Whether it was written for a virtqueue like this."""
        return _HEADER.unpack_from(self._bytes)[:2] == (_VERSION, self._entries)

    def clear(self) -> None:
        """Nothing is in flight, and the used ring is at its beginning."""
        self._bytes[:] = bytes(len(self._bytes))
        _HEADER.pack_into(self._bytes, 0, _VERSION, self._entries, 0, 0, 0)
        self._batch, self._ended, self._pending = [], (), []
        self._used = self._counter = 0

    def recover(self, used_index: int) -> int:
        """Find out what is in flight if the used ring has come this far; return how many requests that are."""
        begun, used = self._pairs[_BATCH] & 0xFFFF, self._pairs[_BATCH] >> 16
        marks = self._bytes[_HEADER.size :: _ENTRY][: self._entries]
        if not begun:
            self._unmark_last((used_index - used) & 0xFFFF)
        counters = self._longs[3::2]
        marked = [head for head in range(self._entries) if marks[head]]
        self._counter = max((counters[head] for head in marked), default=0)
        self._pending = sorted(marked, key=counters.__getitem__)
        if begun and used == used_index:
            heads = dict.fromkeys(self._heads[:begun])
            fresh = [head for head in heads if head < self._entries and not marks[head]]
            self._mark(fresh)
            self._pending += fresh
        self._used = used_index
        self._pairs[_BATCH] = used_index << 16
        return len(self._pending)

    def _unmark_last(self, count: int) -> None:
        """The last `count` that were chained are done."""
        head = self._words[_LAST_BATCH]
        for _ in range(min(count, self._entries)):
            if head >= self._entries:
                break
            self._bytes[_HEADER.size + _ENTRY * head] = 0
            head = self._words[_HEADER.size // 2 + 8 * head + 3]

    def _mark(self, heads: Sequence[int]) -> None:
        """Have these stand each for itself."""
        counter, marks, longs = self._counter, self._bytes, self._longs
        for head in heads:
            counter += 1
            if head < self._entries:  # heads come as the driver has given them; the ring is about to refuse others
                longs[3 + 2 * head] = counter
                marks[16 + 16 * head] = 1
        self._counter = counter

    def _split(self) -> None:
        """Those that began together do not end together."""
        self._mark(self._batch)
        self._pairs[_BATCH] = self._used << 16
        self._batch = []

    # What `Inflight` asks for ----------------------------------------------------------------------------------

    def begin(self, heads: Sequence[int], chains: Sequence[Chain] = ()) -> None:
        del chains  # a split ring's descriptors stay in their table
        if self._batch:
            self._split()
        count = len(heads)
        self._heads[:count] = array("H", heads)
        self._pairs[_BATCH] = self._used << 16 | count
        self._batch = list(heads)

    def end(self, heads: Sequence[int]) -> None:
        if heads == self._batch:
            self._batch = []
        else:
            if self._batch:
                self._split()
            self._chain(heads)
        self._note()

    def _chain(self, heads: Sequence[int]) -> None:
        words = self._words
        last = words[_LAST_BATCH]
        for head in heads:
            words[8 + 8 * head + 3] = last
            last = head
        words[_LAST_BATCH] = last
        self._ended = heads

    def published(self, used_index: int) -> None:
        if self._ended:
            marks = self._bytes
            for head in self._ended:
                marks[16 + 16 * head] = 0
            self._ended = ()
        self._used = used_index
        self._pairs[_BATCH] = used_index << 16

    def pending(self) -> Sequence[tuple[int, Sequence[Descriptor]]]:
        pending, self._pending = self._pending, []
        return [(head, ()) for head in pending]


class ReconnectLog:
    """The log of a device, in the runtime directory."""

    def __init__(
        self, name: str, queues: int, entries: int, *, keep: bool, volatile: Callable[[], bool] = lambda: False
    ) -> None:
        """Open it; what an earlier daemon has left in it counts if `keep`, and is `lost` if it does not fit.

        `volatile` tells whether there are answered writes that would be lost with this process, and `lost_writes`
        whether there were such in an earlier one. Raises Error.
        """
        self._volatile = volatile
        self._path = os.path.join(runtime.directory(), f"vduse-{name}.log")
        size = region_size(entries)
        whole = _HEAD + size * queues
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._path, flags if keep else flags | os.O_TRUNC, 0o600)
            try:
                if keep and os.fstat(fd).st_size not in (0, whole):
                    raise Error(
                        ErrorKind.INVALID_ARGUMENT,
                        f"failed to set reconnect log file: '{self._path}' is one of other options",
                        hint="Give the num-queues and queue-size that the device was made with.",
                    )
                os.posix_fallocate(fd, 0, whole)  # a full file system is an error here, and a signal later
                self._map = memoryview(mmap.mmap(fd, whole))
            finally:
                os.close(fd)
        except OSError as error:
            raise Error.from_oserror(f"failed to set reconnect log file: '{self._path}'", error) from error
        regions = (self._map[at : at + size] for at in range(_HEAD, whole, size))
        self.queues = [QueueLog(region, entries, self.note) for region in regions]
        self.lost_writes = bool(self._map[0])
        self.lost = False
        for queue in self.queues:
            if not queue.sound:
                self.lost = keep
                queue.clear()

    def clear(self) -> None:
        """Nothing is in flight, and all virtqueues begin anew."""
        for queue in self.queues:
            queue.clear()

    def note(self) -> None:
        """Write down what `volatile` says."""
        self._map[0] = self._volatile()

    def remove(self) -> None:
        """The device is gone, and nobody will come back to it."""
        try:
            os.unlink(self._path)
        except OSError:
            pass
