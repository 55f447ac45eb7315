"""Packed virtqueues, the device's side (virtio 1.3, section 2.8).

One ring of descriptors that both sides write: the driver makes one available by flags that match its wrap counter, and
we overwrite it with what was used. Two areas of four bytes say when either side wants to be notified. A position is the
index of a descriptor and the wrap counter with which the ring is being walked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from blkferry.wire.virtio.chain import (
    INDIRECT,
    MAX_DESCRIPTORS,
    MAX_SIZE,
    NEXT,
    OUT_OF_ORDER,
    WRITE,
    Chain,
    DescFlag,
    Descriptor,
    RingError,
    add,
)
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, MemoryFault, host_address
from blkferry.wire.virtio.order import Fence

DESCRIPTOR: Final = struct.Struct("<QIHH")
"""struct pvirtq_desc: address, length, buffer id, flags (section 2.8.13)."""

_USED: Final = struct.Struct("<IH")
"""What we write into a used descriptor apart from its flags, from byte 8 on: bytes written, buffer id."""

EVENT_SIZE: Final = 4
"""struct pvirtq_event_suppress: descriptor's offset and wrap counter, flags (section 2.8.14)."""

ENABLE, DISABLE, DESC = 0, 1, 2
_AVAIL, _USED_FLAG = int(DescFlag.AVAIL), int(DescFlag.USED)


class PackedState(NamedTuple):
    """Where the next chain is taken and the next used descriptor is written, with the wrap counters there (0 or 1)."""

    next_avail: int = 0
    avail_wrap: int = 1
    next_used: int = 0
    used_wrap: int = 1


class PackedRing:
    """A ring of `size` descriptors; `driver` and `device` are the two event suppression areas.

    `features` are the accepted ones. `ring_address` and `device_address` are the guest addresses of what we write, for
    the memory's log. Raises RingError where size, lengths, alignments or state are not what section 2.8 demands.
    """

    def __init__(
        self,
        size: int,
        descriptors: memoryview,
        driver: memoryview,
        device: memoryview,
        memory: GuestMemory,
        *,
        features: int,
        state: PackedState | None = None,
        ring_address: int | None = None,
        device_address: int | None = None,
    ) -> None:
        if not 0 < size <= MAX_SIZE:
            raise RingError(f"{size} is no size of a ring")
        if descriptors.readonly or device.readonly:
            raise RingError("the ring is read-only")
        for what, area, length, alignment in (
            ("descriptor area", descriptors, 16 * size, 16),
            ("driver area", driver, EVENT_SIZE, 4),
            ("device area", device, EVENT_SIZE, 4),
        ):
            if len(area) < length:
                raise RingError(f"the {what} is {len(area)} bytes, not {length}")
            if host_address(area) % alignment:
                raise RingError(f"the {what} is not aligned to {alignment} bytes")
        self.size = size
        self.memory = memory
        self.fence = Fence()
        self._descriptors = descriptors[: 16 * size].cast("B")
        self._words = self._descriptors.cast("H")
        self._driver = driver[:EVENT_SIZE].cast("H")
        self._device = device[:EVENT_SIZE].cast("H")
        self._event_idx = bool(features & Feature.EVENT_IDX)
        self._indirect = bool(features & Feature.INDIRECT_DESC)
        self._ring_address = ring_address
        self._device_address = device_address
        self._avail, self._avail_wrap, self._used, self._used_wrap = state or PackedState()
        if max(self._avail, self._used) >= size:
            raise RingError(f"a position behind the end of a ring of {size}")
        self._held: tuple[int, int] | None = None  # of the first used descriptor that is not published: index, flags
        self._published = self._position(self._used, self._used_wrap)

    @property
    def state(self) -> PackedState:
        return PackedState(self._avail, self._avail_wrap, self._used, self._used_wrap)

    @property
    def next_used(self) -> int:
        """Where the next used descriptor goes, its wrap counter in bit 15."""
        return self._used | self._used_wrap << 15

    def _position(self, index: int, wrap: int) -> int:
        """Both in one number, of 0 to twice the size, which the ring is walked through by counting up."""
        return index if wrap else index + self.size

    # Taking ----------------------------------------------------------------------------------------------------

    def available(self) -> bool:
        flags = self._words[8 * self._avail + 7]
        return bool(flags & _AVAIL) == bool(self._avail_wrap) != bool(flags & _USED_FLAG)

    def take(self) -> Chain | None:
        if not self.available():
            return None
        self.fence.light()  # the rest of the descriptor must not be older than its flags
        found: list[Descriptor] = []
        index = self._avail
        while True:
            descriptor = DESCRIPTOR.unpack_from(self._descriptors, 16 * index)
            found.append(descriptor)
            if not descriptor[3] & NEXT:
                break
            if len(found) == min(self.size, MAX_DESCRIPTORS):
                raise RingError("a chain that is longer than the ring")
            index = (index + 1) % self.size
        chain = self.again(found[-1][2], found)
        self._avail += len(found)
        if self._avail >= self.size:
            self._avail -= self.size
            self._avail_wrap ^= 1
        return chain

    def again(self, head: int, descriptors: Sequence[Descriptor]) -> Chain:
        if head >= self.size:  # ids are the driver's, who has no use for more of them than descriptors
            raise RingError(f"buffer id {head} in a ring of {self.size}")
        chain = Chain(head, [], [], [], len(descriptors), descriptors)
        for address, length, _, flags in descriptors:
            if flags & INDIRECT:
                self._add_indirect(chain, address, length, flags)
            else:
                self._add(chain, address, length, flags)
        return chain

    def _add(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """One buffer; mostly it lies in the region in which something was found last."""
        base, limit, view, _ = self.memory.home
        end = address + length
        if not base <= address < end <= limit:
            add(chain, self.memory, address, length, flags)
            if not base <= address < limit:
                self.memory.home = self.memory.locate(address)
        elif flags & WRITE:
            chain.writable.append(view[address - base : end - base])
            chain.spans.append((address, length))
        elif chain.writable:
            raise RingError(OUT_OF_ORDER)
        else:
            chain.readable.append(view[address - base : end - base])

    def _add_indirect(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """A table elsewhere, in order and without flags but WRITE (section 2.8.7)."""
        if not self._indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if flags & NEXT or chain.slots != 1:
            raise RingError("an indirect descriptor in a chain")
        if not length or length % 16 or length > 16 * MAX_DESCRIPTORS:
            raise RingError(f"an indirect table of {length} bytes")
        try:
            table = b"".join(self.memory.pieces(address, length))
        except MemoryFault as fault:
            raise RingError(str(fault)) from fault
        for where, count, _, marks in DESCRIPTOR.iter_unpack(table):
            if marks & INDIRECT:
                raise RingError("an indirect descriptor within a table")
            self._add(chain, where, count, marks)

    # Giving back -----------------------------------------------------------------------------------------------

    def put(self, chain: Chain, written: int) -> None:
        if self.memory.log is not None:
            for address, length in chain.spans:
                self.memory.log(address, length)
        _USED.pack_into(self._descriptors, 16 * self._used + 8, written, chain.head)
        flags = (_AVAIL | _USED_FLAG) if self._used_wrap else 0
        if written:
            flags |= WRITE
        if self._held is None:
            self._held = self._used, flags  # the driver looks at this one first: it hides all that follow
        else:
            self._words[8 * self._used + 7] = flags
        if self._ring_address is not None:
            self.memory.wrote(self._ring_address + 16 * self._used, 16)
        self._used += chain.slots
        if self._used >= self.size:
            self._used -= self.size
            self._used_wrap ^= 1

    def publish(self, *, idle: bool = False) -> bool:
        """Section 2.8.14: notify if the driver has not said that it wants no notification of these."""
        del idle
        if self._held is None:
            return False
        index, flags = self._held
        self._held = None
        self.fence.light()  # all that is used, and the data it tells of, come before the flags that show it
        self._words[8 * index + 7] = flags
        if self._ring_address is not None:
            self.memory.wrote(self._ring_address + 16 * index, 16)
        self.fence.full()  # the flags are out before we look whether the driver waits for them
        old, new = self._published, self._position(self._used, self._used_wrap)
        self._published = new
        wish = self._driver[1]
        if wish != DESC or not self._event_idx:
            return wish != DISABLE
        self.fence.light()  # the driver writes the position before the flags
        event = self._driver[0]
        where = self._position(event & 0x7FFF, event >> 15)
        return (where - old) % (2 * self.size) < (new - old) % (2 * self.size)

    # Suppression of kicks ----------------------------------------------------------------------------------------

    def arm(self) -> bool:
        if self._event_idx:
            self._device[0] = self._avail | self._avail_wrap << 15
            self.fence.light()  # the position before the flags
        self._wish(DESC if self._event_idx else ENABLE)
        self.fence.full()  # the wish is out before we look whether it came too late
        return self.available()

    def disarm(self) -> None:
        if not self._event_idx:  # a position that has been passed suppresses by itself
            self._wish(DISABLE)

    def _wish(self, flags: int) -> None:
        self._device[1] = flags
        if self._device_address is not None:
            self.memory.wrote(self._device_address, EVENT_SIZE)
