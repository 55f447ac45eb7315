"""The driver's side of virtio: rings of both kinds in memory of the test's own, and block requests put into them.

Everything lies in one memfd, as a front end's memory does, at guest addresses of the test's choice. A test that wants
mischief writes where it likes: `memory` and the areas of a ring are plain memoryviews.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from blkferry.wire.virtio import packed, split
from blkferry.wire.virtio.chain import DescFlag
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, Region
from blkferry.wire.virtio.order import Fence
from blkferry.wire.virtio_blk import HEADER

NEXT, WRITE, INDIRECT = int(DescFlag.NEXT), int(DescFlag.WRITE), int(DescFlag.INDIRECT)

Buffer = tuple[int, int, bool]
"""(guest address, length, whether the device writes it)."""

GUEST_START: Final = 0x4000_0000


class DriverMemory:
    """`size` bytes of a memfd, at guest address `start`; `fd` is what a transport would pass on.

    Another process that is given the `fd`, and asks for the same in the same order, has the same things in it.
    """

    def __init__(self, size: int, *, start: int = GUEST_START, fd: int = -1) -> None:
        self.fd = os.memfd_create("driver", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd < 0 else fd
        os.ftruncate(self.fd, size)
        self.start, self.size = start, size
        self.view = memoryview(mmap.mmap(self.fd, size))
        self._free = start

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Room that nobody else gets; its guest address."""
        address = -(-self._free // alignment) * alignment
        self._free = address + size
        if self._free > self.start + self.size:
            raise MemoryError(f"the driver's memory has no {size} bytes left")
        return address

    def free_all(self, address: int) -> None:
        """Take back what was allocated from this address on."""
        self._free = address

    def at(self, address: int, length: int) -> memoryview:
        offset = address - self.start
        return self.view[offset : offset + length]

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.at(address, length))

    def write(self, address: int, data: bytes) -> None:
        self.at(address, len(data))[:] = data

    def region(self) -> Region:
        """What the device is told of it."""
        return Region(self.start, self.size, self.view)

    def close(self) -> None:
        os.close(self.fd)


class SplitDriver:
    """The driver's side of a split ring (virtio 1.3, section 2.7). Chains are added, published, and come back used."""

    def __init__(self, memory: DriverMemory, size: int, features: int) -> None:
        self.memory, self.size, self.features = memory, size, features
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.descriptor_address = memory.allocate(split.descriptor_size(size), 16)
        self.driver_address = memory.allocate(split.driver_size(size), 4)
        self.device_address = memory.allocate(split.device_size(size), 4)
        self.descriptors = memory.at(self.descriptor_address, split.descriptor_size(size))
        self.avail = memory.at(self.driver_address, split.driver_size(size)).cast("H")
        self.used_bytes = memory.at(self.device_address, split.device_size(size))
        self.used = self.used_bytes.cast("H")
        self.free = list(range(size - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}
        self.next_avail = self.published = self.next_used = 0
        self.fence = Fence()

    def ring(self, guest: GuestMemory, state: split.SplitState | None = None) -> split.SplitRing:
        """The device's side, as it sees the areas in `guest`."""
        areas = (
            guest.piece(self.descriptor_address, split.descriptor_size(self.size)),
            guest.piece(self.driver_address, split.driver_size(self.size), write=True),
            guest.piece(self.device_address, split.device_size(self.size), write=True),
        )
        return split.SplitRing(
            self.size, *areas, guest, features=self.features, state=state, used_address=self.device_address
        )

    def put_descriptor(self, table: memoryview, index: int, address: int, length: int, flags: int, after: int) -> None:
        split.DESCRIPTOR.pack_into(table, 16 * index, address, length, flags, after)

    def add(self, buffers: Sequence[Buffer], *, table: int | None = None) -> int:
        """Put a chain into the table, or its descriptors into an indirect table at guest address `table`; its head."""
        if table is not None:
            view = self.memory.at(table, 16 * len(buffers))
            for index, (address, length, write) in enumerate(buffers):
                flags = (WRITE if write else 0) | (NEXT if index < len(buffers) - 1 else 0)
                self.put_descriptor(view, index, address, length, flags, index + 1)
            head = self.free.pop()
            self.put_descriptor(self.descriptors, head, table, 16 * len(buffers), INDIRECT, 0)
            self.chains[head] = [head]
        else:
            indexes = [self.free.pop() for _ in buffers]
            for index, after, (address, length, write) in zip(indexes, [*indexes[1:], 0], buffers, strict=True):
                flags = (WRITE if write else 0) | (NEXT if index != indexes[-1] else 0)
                self.put_descriptor(self.descriptors, index, address, length, flags, after)
            head = indexes[0]
            self.chains[head] = indexes
        self.make_available(head)
        return head

    def make_available(self, head: int) -> None:
        """Put any number into the available ring."""
        self.avail[2 + self.next_avail % self.size] = head
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show what was added; whether the device wants to be kicked."""
        self.fence.light()
        old, new = self.published, self.next_avail
        self.avail[1] = self.published = new
        self.fence.full()
        if self.event_idx:
            event = self.used[2 + 4 * self.size]
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.used[0] & split.NO_NOTIFY

    def take(self) -> tuple[int, int] | None:
        """The next used chain: its head and how many bytes were written."""
        if self.used[1] == self.next_used:
            return None
        self.fence.light()
        head, written = split.USED_ELEM.unpack_from(self.used_bytes, 4 + 8 * (self.next_used % self.size))
        self.next_used = (self.next_used + 1) & 0xFFFF
        self.free.extend(self.chains.pop(head))
        return head, written

    def arm(self) -> bool:
        """Ask to be notified of the next used chain; True if there is one already."""
        if self.event_idx:
            self.avail[2 + self.size] = self.next_used
        else:
            self.avail[0] = 0
        self.fence.full()
        return self.used[1] != self.next_used

    def disarm(self) -> None:
        """Ask not to be notified."""
        if not self.event_idx:
            self.avail[0] = split.NO_INTERRUPT


class PackedDriver:
    """The driver's side of a packed ring (section 2.8)."""

    def __init__(self, memory: DriverMemory, size: int, features: int) -> None:
        self.memory, self.size, self.features = memory, size, features
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.descriptor_address = memory.allocate(16 * size, 16)
        self.driver_address = memory.allocate(packed.EVENT_SIZE, 4)
        self.device_address = memory.allocate(packed.EVENT_SIZE, 4)
        self.descriptors = memory.at(self.descriptor_address, 16 * size)
        self.words = self.descriptors.cast("H")
        self.driver = memory.at(self.driver_address, packed.EVENT_SIZE).cast("H")
        self.device = memory.at(self.device_address, packed.EVENT_SIZE).cast("H")
        self.free = list(range(size - 1, -1, -1))
        self.slots: dict[int, int] = {}
        self.room = size
        self.next_avail, self.avail_wrap, self.next_used, self.used_wrap = 0, 1, 0, 1
        self.held: list[tuple[int, int]] = []
        self.added = 0
        self.published = (0, 1)
        self.fence = Fence()

    def ring(self, guest: GuestMemory, state: packed.PackedState | None = None) -> packed.PackedRing:
        """The device's side, as it sees the areas in `guest`."""
        areas = (
            guest.piece(self.descriptor_address, 16 * self.size, write=True),
            guest.piece(self.driver_address, packed.EVENT_SIZE, write=True),
            guest.piece(self.device_address, packed.EVENT_SIZE, write=True),
        )
        return packed.PackedRing(
            self.size,
            *areas,
            guest,
            features=self.features,
            state=state,
            ring_address=self.descriptor_address,
            device_address=self.device_address,
        )

    def add(self, buffers: Sequence[Buffer], *, table: int | None = None) -> int:
        """Put a chain into the ring, or its descriptors into an indirect table at guest address `table`; its id."""
        if table is not None:
            view = self.memory.at(table, 16 * len(buffers))
            for index, (address, length, write) in enumerate(buffers):
                packed.DESCRIPTOR.pack_into(view, 16 * index, address, length, 0, WRITE if write else 0)
            entries = [(table, 16 * len(buffers), INDIRECT)]
        else:
            last = len(buffers) - 1
            entries = [
                (address, length, (WRITE if write else 0) | (NEXT if index < last else 0))
                for index, (address, length, write) in enumerate(buffers)
            ]
        if len(entries) > self.room:
            raise IndexError("the ring is full")
        buffer_id = self.free.pop()
        self.slots[buffer_id] = len(entries)
        self.room -= len(entries)
        for address, length, flags in entries:
            self.put_slot(address, length, buffer_id, flags)
        return buffer_id

    def put_slot(self, address: int, length: int, buffer_id: int, flags: int) -> None:
        """Any descriptor at all, the next one."""
        flags |= int(DescFlag.AVAIL if self.avail_wrap else DescFlag.USED)
        packed.DESCRIPTOR.pack_into(self.descriptors, 16 * self.next_avail, address, length, buffer_id, 0)
        # Its old flags are back at once: what was there before is not available either.
        self.words[8 * self.next_avail + 7] = 0 if self.avail_wrap else int(DescFlag.AVAIL | DescFlag.USED)
        self.held.append((self.next_avail, flags))
        self.next_avail += 1
        if self.next_avail == self.size:
            self.next_avail, self.avail_wrap = 0, self.avail_wrap ^ 1

    def _position(self, index: int, wrap: int) -> int:
        return index if wrap else index + self.size

    def publish(self) -> bool:
        """Show what was added; whether the device wants to be kicked."""
        for index, flags in self.held[:0:-1]:
            self.words[8 * index + 7] = flags
        self.fence.light()
        if self.held:
            index, flags = self.held[0]
            self.words[8 * index + 7] = flags
        self.held.clear()
        self.fence.full()
        old, new = self._position(*self.published), self._position(self.next_avail, self.avail_wrap)
        self.published = self.next_avail, self.avail_wrap
        if self.device[1] != packed.DESC:
            return self.device[1] != packed.DISABLE
        where = self._position(self.device[0] & 0x7FFF, self.device[0] >> 15)
        return (where - old) % (2 * self.size) < (new - old) % (2 * self.size)

    def _is_used(self) -> bool:
        flags = self.words[8 * self.next_used + 7]
        return bool(flags & DescFlag.AVAIL) == bool(flags & DescFlag.USED) == bool(self.used_wrap)

    def take(self) -> tuple[int, int] | None:
        """The next used chain: its id and how many bytes were written."""
        if not self._is_used():
            return None
        self.fence.light()
        _, written, buffer_id, _ = packed.DESCRIPTOR.unpack_from(self.descriptors, 16 * self.next_used)
        slots = self.slots.pop(buffer_id)
        self.free.append(buffer_id)
        self.room += slots
        self.next_used += slots
        if self.next_used >= self.size:
            self.next_used, self.used_wrap = self.next_used - self.size, self.used_wrap ^ 1
        return buffer_id, written

    def arm(self) -> bool:
        """Ask to be notified of the next used chain; True if there is one already."""
        if self.event_idx:
            self.driver[0] = self.next_used | self.used_wrap << 15
            self.fence.light()
        self.driver[1] = packed.DESC if self.event_idx else packed.ENABLE
        self.fence.full()
        return self._is_used()

    def disarm(self) -> None:
        """Ask not to be notified."""
        self.driver[1] = packed.DISABLE


RingDriver = SplitDriver | PackedDriver


def ring_driver(memory: DriverMemory, size: int, features: int) -> RingDriver:
    """The kind that the features say."""
    return (PackedDriver if features & Feature.RING_PACKED else SplitDriver)(memory, size, features)


@dataclass(eq=False)
class Sent:
    """A block request on its way: where its parts are in the driver's memory."""

    header: int
    data: int
    length: int
    status: int
    head: int = -1
    written: int = -1


@dataclass
class BlockDriver:
    """Block requests over one ring: requests are added, published together, and collected when they are done.

    `indirect` puts each chain into a table of its own; `cut` is the length of data descriptors. Each request takes
    fresh memory, which is given back when nothing is waiting any more.
    """

    ring: RingDriver
    indirect: bool = False
    cut: int = 1 << 20
    waiting: dict[int, Sent] = field(default_factory=dict)
    floor: int = 0

    def __post_init__(self) -> None:
        self.floor = self.ring.memory.allocate(0, 64)

    def add(self, kind: int, sector: int = 0, data: bytes = b"", length: int = 0) -> Sent:
        """A request that brings `data` along, or wants `length` bytes."""
        memory = self.ring.memory
        if not self.waiting:
            memory.free_all(self.floor)
        count = len(data) or length
        sent = Sent(memory.allocate(16), memory.allocate(max(count, 1), 512), count, memory.allocate(1, 1))
        memory.write(sent.header, HEADER.pack(kind, 0, sector))
        memory.write(sent.status, b"\xff")
        memory.write(sent.data, data)
        buffers: list[Buffer] = [(sent.header, HEADER.size, False)]
        buffers += [(sent.data + start, min(self.cut, count - start), not data) for start in range(0, count, self.cut)]
        buffers.append((sent.status, 1, True))
        return self.send(sent, buffers)

    def send(self, sent: Sent, buffers: Sequence[Buffer]) -> Sent:
        """A request in descriptors of the test's choice."""
        table = self.ring.memory.allocate(16 * len(buffers)) if self.indirect else None
        sent.head = self.ring.add(buffers, table=table)
        self.waiting[sent.head] = sent
        return sent

    def collect(self) -> list[Sent]:
        """What is done."""
        done: list[Sent] = []
        while (used := self.ring.take()) is not None:
            sent = self.waiting.pop(used[0])
            sent.written = used[1]
            done.append(sent)
        return done

    def status(self, sent: Sent) -> int:
        return self.ring.memory.read(sent.status, 1)[0]

    def data(self, sent: Sent) -> bytes:
        return self.ring.memory.read(sent.data, sent.length)


class Requester:
    """Sends block requests, kicking the device if it wants that, and sleeps for its notifications.

    `ring` and `block` are the driver's side; -1 as `kick_fd` kicks nobody.
    """

    ring: RingDriver
    block: BlockDriver
    kick_fd: int
    call_fd: int

    def publish(self) -> None:
        """Show what was added, and kick if the device wants that."""
        if self.ring.publish() and self.kick_fd >= 0:
            os.eventfd_write(self.kick_fd, 1)

    def wait(self, count: int = 1, *, timeout: float = 10.0) -> list[Sent]:
        """Collect `count` requests that are done; TimeoutError when one takes longer than `timeout` seconds."""
        done = self.block.collect()
        while len(done) < count:
            if not self.ring.arm():
                if not select.select([self.call_fd], [], [], timeout)[0]:
                    raise TimeoutError(f"{count - len(done)} requests are not answered")
                os.eventfd_read(self.call_fd)
            done += self.block.collect()
        return done

    def run(self, kind: int, sector: int = 0, data: bytes = b"", length: int = 0) -> tuple[int, bytes]:
        """One request, to its end: status, and what was read."""
        sent = self.block.add(kind, sector, data, length)
        self.publish()
        self.wait()
        return self.block.status(sent), self.block.data(sent) if length else b""
