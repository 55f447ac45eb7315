"""What is in flight, kept where it outlives this process ("Inflight I/O tracking").

The front end holds a buffer that we share with it. When this process dies in the middle of its work, the next one gets
the buffer back and does once more what had been taken and not given back. Nobody else reads it meanwhile: the order of
stores matters to a process that dies, not to another processor.

The layouts are the specification's, for a split ring and for a packed one. A record of a ring of another size is no
record: it was never used, or the guest has chosen another size since. What comes from the front end is checked; at
worst a request is done twice or never, which is the front end's own disk.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

from blkferry.units import align_up
from blkferry.wire.vhost_user.payloads import Inflight, ProtocolError
from blkferry.wire.virtio.chain import Chain, DescFlag, Descriptor, RingError

VERSION: Final = 1

SPLIT: Final = struct.Struct("=QHHHH")  # features, version, desc_num, last_batch_head, used_idx
SPLIT_ENTRY: Final = struct.Struct("=B5xHQ")  # inflight, next, counter
PACKED: Final = struct.Struct("=QHHHHHHBB10x")
"""features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, used_wrap_counter, its old value."""
PACKED_ENTRY: Final = struct.Struct("=BxHHHQHHIQ")  # inflight, next, last, num, counter, id, flags, len, addr

DESCRIPTOR: Final = struct.Struct("=HHIQ")  # id, flags, len, addr: the second half of an entry

ALIGNMENT: Final = 64

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


OWNER_BYTES: Final = 8
"""At the end of the buffer, ours alone: which process may have writes that are not flushed, or zeroes."""

_OURSELVES: Final = os.urandom(OWNER_BYTES)

LEAST_SIZE: Final = 1024
"""Descriptors there is always room for: QEMU asks for its own queue-size, and lets a guest choose a larger ring."""


def buffer_size(num_queues: int, queue_size: int) -> int:
    """Bytes of the whole buffer."""
    return num_queues * region_size(queue_size) + OWNER_BYTES


def region_size(queue_size: int) -> int:
    """Bytes for one ring of either kind, where rings of this size were spoken of."""
    return align_up(PACKED.size + PACKED_ENTRY.size * max(queue_size, LEAST_SIZE), ALIGNMENT)


class InflightBuffer:
    """The shared buffer, one region for each ring. It owns `fd` until `close`."""

    def __init__(self, described: Inflight, fd: int) -> None:
        """Take one that a front end gives back. Raises ProtocolError, and leaves the descriptor to the caller."""
        needed = buffer_size(described.num_queues, described.queue_size)
        status = os.fstat(fd)
        if described.mmap_size < needed or status.st_size < described.mmap_offset + described.mmap_size:
            raise ProtocolError(f"the buffer for what is in flight has less than {needed} bytes")
        if described.mmap_offset % mmap.ALLOCATIONGRANULARITY or not stat.S_ISREG(status.st_mode):
            raise ProtocolError("the buffer for what is in flight is none of ours")
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("the buffer for what is in flight is not sealed")
            self._view = memoryview(mmap.mmap(fd, needed, offset=described.mmap_offset))
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"the buffer for what is in flight cannot be mapped: {error}") from error
        self.described = described
        self.fd = fd

    @classmethod
    def make(cls, num_queues: int, queue_size: int) -> InflightBuffer:
        """A new one."""
        size = buffer_size(num_queues, queue_size)
        fd = os.memfd_create("blkferry-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(Inflight(size, 0, num_queues, queue_size), fd)
        except BaseException:
            os.close(fd)
            raise

    def region(self, vring: int, size: int) -> memoryview:
        """What belongs to one ring. Raises ProtocolError when it is not for one of this size."""
        if vring >= self.described.num_queues or size > max(self.described.queue_size, LEAST_SIZE):
            raise ProtocolError(f"the buffer for what is in flight has no room for vring {vring} of {size}")
        length = region_size(self.described.queue_size)
        return self._view[vring * length : (vring + 1) * length]

    @property
    def abandoned(self) -> bool:
        """Whether another process had this and did not come to an orderly end: what it had not flushed may be lost."""
        return bytes(self._view[-OWNER_BYTES:]) not in {bytes(OWNER_BYTES), _OURSELVES}

    def claim(self) -> None:
        """This process is going to write."""
        self._view[-OWNER_BYTES:] = _OURSELVES

    def release(self) -> None:
        """All that was written is flushed."""
        self._view[-OWNER_BYTES:] = bytes(OWNER_BYTES)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)


class SplitInflight:
    """The record of a split ring of `size`, whose used ring says `used_index`. Raises ProtocolError.

    `pending` is what was in flight when the record was last written: `taken` of it counts the chains.
    """

    def __init__(self, region: memoryview, size: int, used_index: int) -> None:
        self._header = region[: SPLIT.size].cast("H")
        entries = region[SPLIT.size : SPLIT.size + SPLIT_ENTRY.size * size]
        self._flags = entries
        self._next = entries.cast("H")
        self._counters = entries.cast("Q")
        self._batch: Sequence[int] = ()
        _, version, count, head, before = SPLIT.unpack_from(region)
        if (version, count) != (VERSION, size):
            region[:] = bytes(len(region))
            SPLIT.pack_into(region, 0, 0, VERSION, size, 0, used_index)
        else:
            self._settle(head, (used_index - before) & 0xFFFF, size)
            self._header[7] = used_index
        left = [head for head in range(size) if self._flags[head * SPLIT_ENTRY.size]]
        self._pending = sorted(left, key=lambda head: self._counters[2 * head + 1])
        self._counter = self._counters[2 * self._pending[-1] + 1] + 1 if self._pending else 0

    def _settle(self, head: int, batch: int, size: int) -> None:
        """The last batch was published, and perhaps not struck off."""
        for _ in range(min(batch, size)):
            if head >= size:
                raise ProtocolError(f"what is in flight has descriptor {head} of {size}")
            self._flags[head * SPLIT_ENTRY.size] = 0
            head = self._next[head * 8 + 3]

    @property
    def taken(self) -> int:
        """How many chains were in flight."""
        return len(self._pending)

    def pending(self) -> Sequence[tuple[int, Sequence[Descriptor]]]:
        return [(head, ()) for head in self._pending]

    def begin(self, heads: Sequence[int], chains: Sequence[Chain] = ()) -> None:
        del chains
        flags, counters, counter = self._flags, self._counters, self._counter
        for head in heads:
            if head >= len(flags) >> 4:
                raise RingError(f"descriptor {head} of a table of {len(flags) >> 4}")
            counters[2 * head + 1] = counter
            counter = (counter + 1) & 0xFFFFFFFFFFFFFFFF
            flags[head * 16] = 1
        self._counter = counter

    def end(self, heads: Sequence[int]) -> None:
        header, following = self._header, self._next
        last = header[6]
        for head in heads:
            following[head * 8 + 3] = last
            header[6] = last = head
        self._batch = [*self._batch, *heads] if self._batch else heads

    def published(self, used_index: int) -> None:
        flags = self._flags
        for head in self._batch:
            flags[head * 16] = 0
        self._batch = ()
        self._header[7] = used_index


class PackedInflight:
    """The record of a packed ring of `size`, whose descriptor area is `descriptors`. Raises ProtocolError.

    An entry is kept for every descriptor that was taken, since the driver may reuse its place in the ring before it is
    given back; free entries are a list, which ends with `size`. `used` is the position of the next used descriptor and
    its wrap counter, which the ring itself does not tell.
    """

    def __init__(self, region: memoryview, size: int, descriptors: memoryview, used: tuple[int, int]) -> None:
        self._bytes = region
        self._words = region.cast("H")
        self._counters = region.cast("Q")
        self._size = size
        self._entry_of: dict[int, int] = {}
        self._batch: list[int] = []
        _, version, count, *_ = PACKED.unpack_from(region)
        if (version, count) != (VERSION, size):
            for index in range(size):
                PACKED_ENTRY.pack_into(region, _entry(index), 0, index + 1, 0, 0, 0, 0, 0, 0, 0)
            PACKED.pack_into(region, 0, 0, VERSION, size, 0, 0, used[0], used[0], used[1], used[1])
        self._recover(descriptors)
        left = [index for index in range(size) if self._bytes[_entry(index)]]
        left.sort(key=lambda index: self._counters[_entry(index) // 8 + 1])
        self._counter = self._counters[_entry(left[-1]) // 8 + 1] + 1 if left else 0
        self._pending = [self._descriptors(index) for index in left]
        self._entry_of = {found[-1][2]: index for index, found in zip(left, self._pending, strict=True)}
        if len(self._entry_of) < len(left):
            raise ProtocolError("what is in flight has a buffer id twice")

    def _recover(self, descriptors: memoryview) -> None:
        """Roll back what the last batch had not come to, or finish it if the driver has seen it."""
        words, size = self._words, self._size
        _, _, _, free, old_free, used, old_used, wrap, old_wrap = PACKED.unpack_from(self._bytes)
        if (used, wrap) != (old_used, old_wrap):
            if old_used >= size:
                raise ProtocolError(f"what is in flight has position {old_used} of {size}")
            flags = int.from_bytes(descriptors[old_used * 16 + 14 : old_used * 16 + 16], "little")
            untouched = bool(flags & DescFlag.AVAIL) == bool(old_wrap) != bool(flags & DescFlag.USED)
            if not untouched:
                old_free, old_used, old_wrap = free, used, wrap
        self.used = (old_used, old_wrap)
        self._keep(old_free)
        self._settle(old_free)
        index, left = old_free, size
        while index < size:
            if not left:
                raise ProtocolError("what is in flight has a loop of free entries")
            left -= 1
            self._bytes[_entry(index)] = 0
            index = words[_entry(index) // 2 + 1]

    def _keep(self, free: int) -> None:
        """The present state."""
        self._words[6] = free
        self._words[8], self._bytes[20] = self.used

    def _settle(self, free: int) -> None:
        """The present state is what the driver sees."""
        self._words[7] = free
        self._words[9], self._bytes[21] = self.used

    def _descriptors(self, head: int) -> list[Descriptor]:
        """Those of a chain, from its first entry on."""
        _, _, _, count, _, _, _, _, _ = self._load(head)
        found: list[Descriptor] = []
        index = head
        for _ in range(count):
            _, following, _, _, _, buffer_id, flags, length, address = self._load(index)
            found.append((address, length, buffer_id, flags))
            index = following
        if not found:
            raise ProtocolError("what is in flight has a request without descriptors")
        return found

    def _load(self, index: int) -> tuple[int, ...]:
        if index >= self._size:
            raise ProtocolError(f"what is in flight has entry {index} of {self._size}")
        return PACKED_ENTRY.unpack_from(self._bytes, _entry(index))

    @property
    def taken(self) -> int:
        """How many entries of the ring were in flight."""
        return sum(map(len, self._pending))

    def pending(self) -> Sequence[tuple[int, Sequence[Descriptor]]]:
        return [(found[-1][2], found) for found in self._pending]

    def begin(self, heads: Sequence[int], chains: Sequence[Chain] = ()) -> None:
        words = self._words
        for head, chain in zip(heads, chains, strict=True):
            if head in self._entry_of:
                raise RingError(f"buffer id {head} is in flight twice")
            first = index = last = words[6]
            self._counters[_entry(first) // 8 + 1] = self._counter
            self._counter += 1
            for address, length, buffer_id, flags in chain.descriptors:
                last = index
                DESCRIPTOR.pack_into(self._bytes, _entry(index) + 16, buffer_id, flags, length, address)
                index = words[_entry(index) // 2 + 1]
            words[_entry(first) // 2 + 2] = last
            words[_entry(first) // 2 + 3] = len(chain.descriptors)
            self._bytes[_entry(first)] = 1
            words[6] = words[7] = index
            self._entry_of[head] = first

    def end(self, heads: Sequence[int]) -> None:
        words = self._words
        free = words[6]
        position, wrap = self.used
        for head in heads:
            first = self._entry_of.pop(head)
            words[_entry(words[_entry(first) // 2 + 2]) // 2 + 1] = free
            free = first
            position += words[_entry(first) // 2 + 3]
            if position >= self._size:
                position -= self._size
                wrap ^= 1
            self._batch.append(first)
        self.used = position, wrap
        self._keep(free)

    def published(self, used_index: int) -> None:
        del used_index  # `end` has counted
        for first in self._batch:
            self._bytes[_entry(first)] = 0
        self._batch.clear()
        self._settle(self._words[6])


def _entry(index: int) -> int:
    """Where an entry of a packed ring's record begins."""
    return PACKED.size + PACKED_ENTRY.size * index
