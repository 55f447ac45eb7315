"""The front end's memory table: which descriptor has which part of the guest's memory, mapped into this process.

Descriptor chains name guest addresses, messages about vrings name user addresses, those of the front end itself
("Memory access"). Regions overlap in neither.

A mapping is of what its descriptor really has: touching the rest would be SIGBUS. That the file does not shrink later
is what a seal (F_SEAL_SHRINK) promises; where there is none we set it, if that is allowed. Not all memory can be sealed
(files, memfds that were made without), and pages of sealed memory can fail to come, too, when the host has no more: so
all of it is guarded (`plane.guarded`), which costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Final

from blkferry.plane.guarded import guarded_map
from blkferry.plane.syscalls import filesystem_type
from blkferry.units import align_down, align_up
from blkferry.wire.vhost_user.constants import MAX_MEM_SLOTS
from blkferry.wire.vhost_user.payloads import MemoryRegion, ProtocolError
from blkferry.wire.virtio.memory import GuestMemory, MemoryFault, Region

_HUGETLBFS: Final = 0x958458F6


class Mapping:
    """One region, mapped; it ends when nobody holds `view` or a part of it any more. Raises ProtocolError.

    `owner` is told when some of it was cut off: see `plane.guarded`.
    """

    def __init__(self, described: MemoryRegion, fd: int, owner: GuestMemory) -> None:
        where = f"the memory region at {described.guest_start:#x}"
        status = os.fstat(fd)
        end = described.mmap_offset + described.length
        if not stat.S_ISREG(status.st_mode):
            raise ProtocolError(f"{where} is not in a file, a memfd or huge pages")
        if status.st_size < end:
            raise ProtocolError(f"{where} ends at {end:#x} of a file of {status.st_size:#x} bytes")
        page = status.st_blksize if filesystem_type(fd) == _HUGETLBFS else mmap.ALLOCATIONGRANULARITY
        start = align_down(described.mmap_offset, page)
        try:
            length = min(align_up(end, page), status.st_size) - start
            _seal(fd)
            view = guarded_map(fd, length, start, owner)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{where} cannot be mapped: {error}") from error
        self.described = described
        self.view = view[described.mmap_offset - start : end - start]

    @property
    def region(self) -> Region:
        return Region(self.described.guest_start, self.described.length, self.view)


def _seal(fd: int) -> None:
    """See to it that the file does not shrink, if it can be."""
    with contextlib.suppress(OSError):  # no memfd, or one that may not be sealed, or was
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


class MemoryTable:
    """All regions. Whoever uses them must stop before the table changes, and look everything up anew."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []
        self.guest = GuestMemory()

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Have these regions and no others (SET_MEM_TABLE)."""
        self._have([Mapping(region, fd, self.guest) for region, fd in zip(regions, fds, strict=True)])

    def add(self, region: MemoryRegion, fd: int) -> None:
        """Have one more (ADD_MEM_REG)."""
        if len(self._mappings) >= MAX_MEM_SLOTS:
            raise ProtocolError(f"there are {MAX_MEM_SLOTS} memory regions already")
        self._have([*self._mappings, Mapping(region, fd, self.guest)])

    def remove(self, region: MemoryRegion) -> None:
        """Give one up, which is the one with these addresses and this length (REM_MEM_REG)."""
        rest = [each for each in self._mappings if each.described[:3] != region[:3]]
        if len(rest) == len(self._mappings):
            raise ProtocolError(f"there is no memory region at {region.guest_start:#x} of {region.length:#x} bytes")
        self._have(rest)

    def clear(self) -> None:
        """Have none."""
        self._have([])

    def _have(self, mappings: list[Mapping]) -> None:
        ordered = sorted((each.described.user_start, each.described.length) for each in mappings)
        for (start, length), (following, _) in itertools.pairwise(ordered):
            if start + length > following:
                raise ProtocolError(f"memory regions at {start:#x} and {following:#x} overlap")
        try:
            self.guest.replace(each.region for each in mappings)
        except MemoryFault as fault:
            raise ProtocolError(str(fault)) from fault
        self._mappings = mappings
        self.guest.lost = False

    def guest_address(self, address: int, length: int) -> int:
        """The guest address of bytes at a user address, all in one region. Raises ProtocolError."""
        for mapping in self._mappings:
            start = address - mapping.described.user_start
            if start >= 0 and start + length <= mapping.described.length:
                return mapping.described.guest_start + start
        raise ProtocolError(f"{length} bytes at user address {address:#x} are not in one memory region")
