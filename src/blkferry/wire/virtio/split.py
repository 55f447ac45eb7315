"""Split virtqueues, the device's side (virtio 1.3, section 2.7).

Three areas, each with one writer: the descriptor table and the driver area (available ring) are the driver's, the
device area (used ring) is ours. All positions count up for ever, modulo 2^16; an entry is found by its position modulo
the size. Everything the driver writes is read once and checked before it is used, for it may change at any time.
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
    Descriptor,
    RingError,
    add,
)
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, MemoryFault, host_address
from blkferry.wire.virtio.order import Fence

DESCRIPTOR: Final = struct.Struct("<QIHH")
"""struct virtq_desc: address, length, flags, next (section 2.7.5)."""

USED_ELEM: Final = struct.Struct("<II")
"""struct virtq_used_elem: head, bytes written (section 2.7.8)."""

NO_INTERRUPT: Final = 1
NO_NOTIFY: Final = 1


class SplitState(NamedTuple):
    """Positions of the next chain to take, and of the next used element; equal while nothing is in flight.

    Where the used ring is believed, as vhost-user does, the second may be left out.
    """

    next_avail: int
    next_used: int | None = None


def descriptor_size(size: int) -> int:
    """Bytes of the descriptor table."""
    return 16 * size


def driver_size(size: int) -> int:
    """Bytes of the available ring, with used_event."""
    return 6 + 2 * size


def device_size(size: int) -> int:
    """Bytes of the used ring, with avail_event."""
    return 6 + 8 * size


class SplitRing:
    """A ring of `size` entries over the three areas, which are views of the driver's memory.

    `features` are the accepted ones. Without a `state` the ring goes on where its used ring says that it ended.
    `used_address` is the guest address of the device area, for the memory's log. Raises RingError where size, lengths
    or alignments are not what section 2.7 demands.
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
        state: SplitState | None = None,
        used_address: int | None = None,
    ) -> None:
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise RingError(f"{size} is no size of a ring")
        if device.readonly:
            raise RingError("the device area is read-only")
        for what, area, length, alignment in (
            ("descriptor table", descriptors, descriptor_size(size), 1),
            ("driver area", driver, driver_size(size), 2),
            ("device area", device, device_size(size), 4),
        ):
            if len(area) < length:
                raise RingError(f"the {what} is {len(area)} bytes, not {length}")
            if host_address(area) % alignment:
                raise RingError(f"the {what} is not aligned to {alignment} bytes")
        self.size = size
        self.memory = memory
        self.fence = Fence()
        self.descriptors = descriptors[: descriptor_size(size)]
        self.driver = driver[: driver_size(size)].cast("H")
        self.device = device[: device_size(size)].cast("B")
        self.device_words = self.device.cast("H")
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self._notify_on_empty = bool(features & Feature.NOTIFY_ON_EMPTY)
        self._used_address = used_address
        used = self.device_words[1]
        next_avail, next_used = state or (used, used)
        self.next_avail = next_avail
        self.next_used = used if next_used is None else next_used
        self.published = self.next_used

    @property
    def state(self) -> SplitState:
        return SplitState(self.next_avail, self.next_used)

    # Taking ----------------------------------------------------------------------------------------------------

    def waiting(self) -> int:
        """How many chains are available. Raises RingError."""
        index = self.driver[1]
        count = (index - self.next_avail) & 0xFFFF
        if count:
            if count > self.size or (index - self.next_used) & 0xFFFF > self.size:
                raise RingError(f"more chains are available, or in flight, than a ring of {self.size} has")
            self.fence.light()  # what the ring and the descriptors hold must not be older than the index
        return count

    def available(self) -> bool:
        return self.waiting() > 0

    def take(self) -> Chain | None:
        if not self.waiting():
            return None
        head = self.driver[2 + (self.next_avail & (self.size - 1))]
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return self.chain(head)

    def take_heads(self, most: int) -> list[int]:
        """Take up to `most` chains, by their heads only, which may be any numbers. Raises RingError."""
        count = min(self.waiting(), most)
        first = self.next_avail & (self.size - 1)
        self.next_avail = (self.next_avail + count) & 0xFFFF
        if count == 1:
            return [self.driver[2 + first]]
        heads = self.driver[2 + first : 2 + min(first + count, self.size)].tolist()
        if len(heads) < count:
            heads += self.driver[2 : 2 + count - len(heads)].tolist()
        return heads

    def again(self, head: int, descriptors: Sequence[Descriptor]) -> Chain:
        del descriptors  # the table still has them: the driver may not touch them before they are used
        return self.chain(head)

    def chain(self, head: int) -> Chain:
        """The chain that begins with a descriptor of the table. Raises RingError."""
        table, count, index = self.descriptors, self.size, head
        if head >= count:
            raise RingError(f"descriptor {head} of a table of {count}")
        memory, unpack = self.memory, DESCRIPTOR.unpack_from
        base, limit, view, _ = memory.home
        chain = Chain(head, [], [], [])
        _, readable, writable, spans, _, _ = chain
        for _ in range(MAX_DESCRIPTORS):
            address, length, flags, following = unpack(table, index << 4)
            if flags & INDIRECT:
                table, count = self._indirect_table(address, length, flags, nested=table is not self.descriptors)
                index = 0
                continue
            end = address + length
            if not (base <= address < end <= limit):  # in another region than the last one, or nowhere
                base, limit, view, _ = memory.locate(address)
            if base <= address < end <= limit:
                if flags & WRITE:
                    writable.append(view[address - base : end - base])
                    spans.append((address, length))
                elif writable:
                    raise RingError(OUT_OF_ORDER)
                else:
                    readable.append(view[address - base : end - base])
            else:
                add(chain, memory, address, length, flags)
            if not flags & NEXT:
                return chain
            if following >= count:
                raise RingError(f"descriptor {following} of a table of {count}")
            index = following
        raise RingError(f"a chain of more than {MAX_DESCRIPTORS} descriptors, or a loop")

    def _indirect_table(self, address: int, length: int, flags: int, *, nested: bool) -> tuple[memoryview, int]:
        """A table elsewhere, and how many descriptors it has (section 2.7.5.3)."""
        if not self.indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if nested or flags & NEXT:
            raise RingError("an indirect descriptor within a table or with a next one")
        if not length or length % 16:
            raise RingError(f"an indirect table of {length} bytes")
        length = min(length, 16 * MAX_DESCRIPTORS)
        try:
            pieces = self.memory.pieces(address, length)
        except MemoryFault as fault:
            raise RingError(str(fault)) from fault
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)), length // 16

    # Giving back -----------------------------------------------------------------------------------------------

    def put(self, chain: Chain, written: int) -> None:
        if self.memory.log is not None:
            for address, length in chain.spans:
                self.memory.log(address, length)
        self.put_head(chain.head, written)

    def put_head(self, head: int, written: int) -> None:
        """`put` of a chain whose spans need not be logged."""
        at = 4 + 8 * (self.next_used & (self.size - 1))
        USED_ELEM.pack_into(self.device, at, head, written)
        self.next_used = (self.next_used + 1) & 0xFFFF
        if self._used_address is not None:
            self.memory.wrote(self._used_address + at, 8)

    def publish(self, *, idle: bool = False) -> bool:
        """Section 2.7.10: notify if the driver has not said that it wants no notification of these."""
        old, new = self.published, self.next_used
        if old == new:
            return False
        self.fence.light()  # the elements, and the data they tell of, come before the index
        self.device_words[1] = new
        self.published = new
        if self._used_address is not None:
            self.memory.wrote(self._used_address + 2, 2)
        self.fence.full()  # the index is out before we look whether the driver waits for it
        if self._notify_on_empty and idle and self.driver[1] == self.next_avail:
            return True
        if self.event_idx:
            event = self.driver[2 + self.size]
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.driver[0] & NO_INTERRUPT

    # Suppression of kicks ----------------------------------------------------------------------------------------

    def arm(self) -> bool:
        words = self.device_words
        if self.event_idx:
            words[2 + 4 * self.size] = self.next_avail
            self._wrote_word(2 + 4 * self.size)
        elif words[0]:
            words[0] = 0
            self._wrote_word(0)
        self.fence.full()  # the wish is out before we look whether it came too late
        return self.available()

    def disarm(self) -> None:
        if not self.event_idx and not self.device_words[0]:
            self.device_words[0] = NO_NOTIFY
            self._wrote_word(0)

    def _wrote_word(self, word: int) -> None:
        if self._used_address is not None:
            self.memory.wrote(self._used_address + 2 * word, 2)
