"""Who uses which host cluster how often, and where free ones are.

The refcount table is in memory whole (8 MiB at most), refcount blocks as far as their cache goes. Plain calls work on
what is in memory and say `MISSING` where that is not enough; then `make_room` or `load` has to be awaited. Nothing here
writes: blocks and table entries become dirty, and a commit writes them before anything that relies on them.
"""

from __future__ import annotations

import enum
import errno
from array import array
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.tables import Table, TableCache
from blkferry.drivers.qcow2.words import CorruptError

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.hostfile import HostFile
    from blkferry.drivers.qcow2.refcount_codec import Codec

TABLE_OFFSET = 0xFFFF_FFFF_FFFF_FE00
MAX_TABLE_BYTES = 8 << 20
"""QEMU opens no image whose refcount table is larger."""


class Missing(enum.Enum):
    """Why a plain call could not be done."""

    MISSING = "missing"


MISSING = Missing.MISSING


class RefcountOverflowError(OSError):
    """A cluster would be used more often than its refcount can say. Nothing is wrong with the image."""

    def __init__(self, offset: int, maximum: int) -> None:
        super().__init__(errno.ERANGE, f"the refcount of the cluster at {offset:#x} cannot exceed {maximum}")


class Refcounts:
    """The refcounts of one image."""

    def __init__(self, file: HostFile, codec: Codec, cluster_bits: int, table: array[int], cache: TableCache) -> None:
        self.file = file
        self.codec = codec
        self.cluster_bits = cluster_bits
        self.table = table
        self.dirty_entries: set[int] = set()
        self.blocks = cache
        self.per_block = codec.entries(1 << cluster_bits)
        self.hint = 0
        """No cluster below this index is free, as far as is known."""
        self.resting: set[int] = set()
        """Clusters whose count is 0 and that must not be taken yet, for somebody may still read there."""

    def block_offset(self, number: int) -> int:
        """Where block `number` is, 0 if there is none. Raises CorruptError for a place that cannot be."""
        if number >= len(self.table):
            return 0
        offset = self.table[number] & TABLE_OFFSET
        if offset & ((1 << self.cluster_bits) - 1):
            raise CorruptError(f"refcount block {number} is not aligned to a cluster: {offset:#x}", offset)
        if offset >= self.file.length:
            raise CorruptError(f"refcount block {number} lies behind the end of the image: {offset:#x}", offset)
        return offset

    async def load(self, number: int) -> None:
        """Bring block `number` into the cache; one that is not on disk has only zeroes and is not kept."""
        if self.blocks.get(number) is None and (offset := self.block_offset(number)):
            data = await self.file.get(offset, 1 << self.cluster_bits)
            if self.blocks.get(number) is None and self.block_offset(number) == offset:
                self.blocks.add(number, Table(offset, self.codec.load(data)))

    def get(self, cluster: int) -> int | Missing:
        """The refcount of a host cluster."""
        number, index = divmod(cluster, self.per_block)
        block = self.blocks.get(number)
        if block is None:
            return MISSING if self.block_offset(number) else 0
        block.used = True
        return block.values[index]

    async def count(self, cluster: int) -> int:
        """The same, loading what is needed."""
        while (found := self.get(cluster)) is MISSING:
            await self.load(cluster // self.per_block)
        return found

    def take(self, wanted: int) -> tuple[int, int] | Missing:
        """Take up to `wanted` adjacent free clusters: the first one and how many.

        MISSING when a block must be loaded or made first (`make_room`).
        """
        per_block = self.per_block
        while True:
            number, index = divmod(self.hint, per_block)
            block = self.blocks.get(number)
            if block is None:
                return MISSING
            block.used = True
            values = block.values
            base = number * per_block
            first = self.codec.find_free(values, index)
            while first >= 0 and base + first in self.resting:
                first = self.codec.find_free(values, first + 1)
            if first < 0:
                self.hint = (number + 1) * per_block
                continue
            last = first + 1
            end = min(first + wanted, per_block)
            values[first] = 1
            while last < end and not values[last] and base + last not in self.resting:
                values[last] = 1
                last += 1
            self.blocks.touch(number, first, last)
            self.hint = base + last
            return base + first, last - first

    def take_one(self) -> int:
        """Take one free cluster if the next one is free and its block at hand; 0 otherwise, which is never free."""
        number, index = divmod(self.hint, self.per_block)
        block = self.blocks.get(number)
        if block is None or block.values[index] or self.hint in self.resting:
            return 0
        taken = self.hint
        block.used = True
        block.values[index] = 1
        self.blocks.touch(number, index, index + 1)
        self.hint = taken + 1
        return taken

    def give_back(self, first: int, count: int) -> None:
        """Undo `take`: nothing refers to these clusters yet, in memory or on disk."""
        for cluster in range(first, first + count):
            number, index = divmod(cluster, self.per_block)
            self.blocks.tables[number].values[index] = 0
            self.blocks.touch(number, index, index + 1)
        self.hint = min(self.hint, first)

    async def adjust(self, first: int, count: int, change: int, *, rest: bool = False) -> list[int]:
        """Add `change` to the refcounts of clusters that are in use. Raises CorruptError when that cannot be.

        Those that become 0 are free at once, or with `rest` when `wake` says so; they are returned.
        """
        zero: list[int] = []
        done = 0
        try:
            for cluster in range(first, first + count):
                if not await self._adjust(cluster, change, rest=rest):
                    zero.append(cluster)
                done += 1
        except OSError:
            for cluster in range(first, first + done):
                await self._adjust(cluster, -change, rest=rest, back=True)
            raise
        return zero

    async def _adjust(self, cluster: int, change: int, *, rest: bool, back: bool = False) -> int:
        number, index = divmod(cluster, self.per_block)
        while (block := self.blocks.get(number)) is None:
            if not self.block_offset(number):
                raise CorruptError(f"cluster {cluster << self.cluster_bits:#x} is in use but has no refcount", 0)
            await self.load(number)
        old = block.values[index]
        value = old + change
        at = cluster << self.cluster_bits
        if value < 0 or (not old and not back):
            raise CorruptError(f"the refcount of the cluster at {at:#x} is 0 although it is in use", at)
        if value > self.codec.maximum:
            raise RefcountOverflowError(at, self.codec.maximum)
        block.values[index] = value
        self.blocks.touch(number, index, index + 1)
        if not value:
            if rest:
                self.resting.add(cluster)
            else:
                self.hint = min(self.hint, cluster)
        elif back:
            self.resting.discard(cluster)
        return value

    def wake(self, first: int, count: int) -> None:
        """These clusters have rested, and are free."""
        self.resting.difference_update(range(first, first + count))
        self.hint = min(self.hint, first)

    def add_block(self, number: int, offset: int) -> None:
        """Begin block `number` in its own first cluster, at `offset`, which counts itself."""
        values = self.codec.load(bytes(1 << self.cluster_bits))
        values[0] = 1
        self.blocks.add(number, Table(offset, values, fresh=True))
        self.table[number] = offset
        self.dirty_entries.add(number)
