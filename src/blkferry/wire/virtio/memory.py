"""Guest memory: where the bytes are that a driver names by address and length.

Nothing here reads or writes them. Rings and devices get memoryviews and leave payload to system calls, which fail with
EFAULT where the memory has gone; who looks at the bytes himself relies on his transport to survive that (see
`plane.guarded`) and asks `lost` before he acts on what he saw.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from collections.abc import Callable, Iterable
from typing import Final


class MemoryFault(Exception):  # noqa: N818 - the driver's fault, not an error of ours
    """A driver named memory that is not there, or may not be used like that."""


def host_address(view: memoryview) -> int:
    """Where in this process the bytes of a writable view begin; 0 for what is empty or read-only."""
    return 0 if view.readonly or not view else ctypes.addressof(ctypes.c_char.from_buffer(view))


class Region:
    """`length` bytes of the guest's memory from `guest_start`: `view`, which is at `address` in this process."""

    __slots__ = ("address", "guest_end", "guest_start", "length", "view", "writable")

    def __init__(self, guest_start: int, length: int, view: memoryview) -> None:
        if length <= 0 or length > len(view) or guest_start < 0 or guest_start + length > 1 << 64:
            raise MemoryFault(f"a region of {length} bytes at {guest_start:#x} cannot be")
        self.guest_start = guest_start
        self.guest_end = guest_start + length
        self.length = length
        self.view = view[:length]
        self.writable = not view.readonly
        self.address = host_address(view)


Home = tuple[int, int, memoryview, Region]
"""Start, end and bytes of a region that may be read and written, and that region."""

NO_HOME: Final[Home] = (1, 0, memoryview(b""), Region(0, 1, memoryview(b"\0")))


class GuestMemory:
    """The regions that a driver may name, none of which overlap.

    `miss` is asked for the region at an address that none has; what it returns is kept. `log` hears of every range
    (guest address, length) that was written, after it was and before the driver is told. `lost` is set by the owner of
    the mappings when the peer took memory away that this process then looked at: what was read may be zeroes. `home` is
    for a hot loop to remember the region in which it found things last.
    """

    def __init__(
        self,
        regions: Iterable[Region] = (),
        *,
        miss: Callable[[int], Region | None] | None = None,
        log: Callable[[int, int], None] | None = None,
    ) -> None:
        self.miss = miss
        self.log = log
        self.lost = False
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self.replace(regions)

    def replace(self, regions: Iterable[Region]) -> None:
        """Have these regions instead. Raises MemoryFault when some overlap. Rings and requests keep what they have."""
        ordered = sorted(regions, key=lambda region: region.guest_start)
        for one, other in itertools.pairwise(ordered):
            if other.guest_start < one.guest_end:
                raise MemoryFault(f"regions at {one.guest_start:#x} and {other.guest_start:#x} overlap")
        self.regions = ordered
        self._starts = [region.guest_start for region in ordered]
        self.home = NO_HOME

    def add(self, region: Region) -> None:
        """One region more. Raises MemoryFault when it overlaps one that there is."""
        self.replace([*self.regions, region])

    def remove(self, start: int, end: int) -> None:
        """Forget all regions that have a part in the range of guest addresses."""
        self.replace(region for region in self.regions if region.guest_end <= start or end <= region.guest_start)

    def region(self, address: int) -> Region:
        """The region that has this guest address. Raises MemoryFault."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.regions[index].guest_end:
            return self.regions[index]
        found = self.miss(address) if self.miss is not None else None
        if found is None or not found.guest_start <= address < found.guest_end:
            raise MemoryFault(f"no memory at {address:#x}")
        self.remove(found.guest_start, found.guest_end)  # it may have grown, or been moved
        self.add(found)
        return found

    def locate(self, address: int) -> Home:
        """The region that has this address, for looking at it in a hurry; `NO_HOME` where that is not possible."""
        try:
            region = self.region(address)
        except MemoryFault:
            return NO_HOME
        return (region.guest_start, region.guest_end, region.view, region) if region.writable else NO_HOME

    def pieces(self, address: int, length: int, *, write: bool = False) -> list[memoryview]:
        """The bytes of a range, in order; one piece unless it crosses regions that lie side by side."""
        region = self.region(address)
        start = address - region.guest_start
        if start + length <= region.length and (region.writable or not write):
            return [region.view[start : start + length]]
        found: list[memoryview] = []
        end = address + length
        while address < end:
            region = self.region(address)
            if write and not region.writable:
                raise MemoryFault(f"the memory at {address:#x} is read-only")
            stop = min(end, region.guest_end)
            found.append(region.view[address - region.guest_start : stop - region.guest_start])
            address = stop
        return found

    def piece(self, address: int, length: int, *, write: bool = False) -> memoryview:
        """The bytes of a range that must lie in one region, as rings have to."""
        found = self.pieces(address, length, write=write)
        if len(found) != 1:
            raise MemoryFault(f"{length} bytes at {address:#x} are not in one region")
        return found[0]

    def wrote(self, address: int, length: int) -> None:
        """A range was written by us."""
        if self.log is not None and length:
            self.log(address, length)
