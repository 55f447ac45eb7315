"""A file mapped for reading, and which parts of it are known to be in memory: replies can be sent straight from there.

Theory of operation. Reading from the page cache by preadv and sending the copy costs two copies and a system call for
every request; sending from a mapping costs one copy, made by the kernel while it sends. That is safe only where the
page is in memory, or the loop would sleep on the disk inside of send. So the file is watched in regions: one that is
read a second time within a second is examined, and counts as hot until the next second if all of it is cached and none
of it is a hole (holes are to be reported, not sent). A page that the kernel gives up in between costs one sleep.

Python code must never look at the bytes of `view` itself: were the file cut off meanwhile, that would be a SIGBUS. The
kernel's send gets EFAULT instead, and the connection ends. Who wants to copy them, into a guest's memory say, takes the
`copies`, another mapping that is guarded, and asks `lost` after each: then it was not the file's bytes that he copied.
"""

from __future__ import annotations

import mmap
import os

from blkferry.plane.guarded import guarded_map
from blkferry.plane.syscalls import CacheStat

REGION_BITS = 21
"""2 MiB: to examine one takes a few microseconds, and a terabyte has half a million of them."""

_EPOCHS = 63
_TOUCHED, _COLD, _HOT = 1, 2, 3


class Window:
    """One mapping, owned by the loop of its storage. `view` is what sends may take slices of.

    `marks` has a byte for each region; a read may use the mapping where it equals `hot`. Both change with `tick`.
    """

    def __init__(self, fd: int, size: int, *, in_memory: bool) -> None:
        self._fd = fd
        self.size = size
        self._in_memory = in_memory
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.view = memoryview(self._map)
        self.marks = bytearray((size >> REGION_BITS) + 1)
        self._second = 0
        self._epoch = 0
        self.hot = _HOT
        self._copies: memoryview | None = None
        self.lost = False

    @property
    def copies(self) -> memoryview:
        """The file, to copy from; empty where it cannot be mapped once more."""
        if self._copies is None:
            try:
                self._copies = guarded_map(self._fd, self.size, 0, self, prot=mmap.PROT_READ)
            except (OSError, ValueError):
                self._copies = memoryview(b"")
        return self._copies

    def tick(self, now: float) -> int:
        """Say what time it is, in monotonic seconds; returns the mark of hot regions."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._epoch += 1
            if self._epoch == _EPOCHS:  # old marks would look new again
                self.forget()
            self.hot = self._epoch << 2 | _HOT
        return self.hot

    def forget(self) -> None:
        """Holes may have come into the file: nothing is known to be hot any more."""
        self._epoch = 0
        self.hot = _HOT
        self.marks[:] = bytes(len(self.marks))

    def touch(self, region: int, cache: CacheStat) -> None:
        """A region that is not hot was read."""
        touched = self._epoch << 2 | _TOUCHED
        mark = self.marks[region]
        if mark == touched:
            self.marks[region] = self.hot if self._examine(region, cache) else self._epoch << 2 | _COLD
        elif mark >> 2 != self._epoch or not mark:
            self.marks[region] = touched

    def _examine(self, region: int, cache: CacheStat) -> bool:
        start = region << REGION_BITS
        end = min(start + (1 << REGION_BITS), self.size)
        try:
            if os.lseek(self._fd, start, os.SEEK_HOLE) < end:
                return False
        except OSError:
            return False
        return self._in_memory or cache.resident(self._fd, start, end - start) is True

    def close(self) -> None:
        """Unmap. No slice of the view may be left."""
        self.view.release()
        self._map.close()
        self._copies = None
