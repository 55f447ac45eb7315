"""Space for compressed clusters, which are packed one behind the other: several share a host cluster.

Every compressed cluster counts once in the refcount of each host cluster that it has bytes in.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2


class CompressedSpace:
    """Where the next compressed bytes of one image go."""

    def __init__(self, node: Qcow2) -> None:
        self._node = node
        self._next = 0  # a free offset within a cluster of compressed bytes; 0 for none
        self._lock = asyncio.Lock()

    async def take(self, length: int) -> int:
        """The offset of `length` bytes (less than a cluster) that nobody else has. Raises OSError."""
        metadata = self._node.metadata
        geometry = metadata.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        async with self._lock:
            offset = self._next
            room = -offset & (size - 1)
            if not room or await self._full(offset >> bits):
                offset = room = 0
            if length > room:
                first, _ = await metadata.take(1)
                metadata.check_free(first << bits, size)
                await metadata.file.extend((first + 1) << bits)
                if room and first == (offset >> bits) + 1 and self._next == offset:
                    await metadata.refcounts.adjust(offset >> bits, 1, 1)
                else:
                    offset = first << bits
            else:
                await metadata.refcounts.adjust(offset >> bits, 1, 1)
            if offset + length > geometry.compressed_offset_limit():
                await self._release(offset, length)
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            self._next = offset + length
            return offset

    async def _full(self, cluster: int) -> bool:
        refcounts = self._node.metadata.refcounts
        return await refcounts.count(cluster) in (0, refcounts.codec.maximum)

    async def give_back(self, offset: int, length: int) -> None:
        """Undo `take`: nothing refers to these bytes."""
        async with self._lock:
            self._next = 0
            await self._release(offset, length)

    async def _release(self, offset: int, length: int) -> None:
        bits = self._node.metadata.geometry.cluster_bits
        first = offset >> bits
        await self._node.metadata.refcounts.adjust(first, ((offset + length - 1) >> bits) - first + 1, -1)

    def avoid(self, first: int, count: int) -> None:
        """These host clusters lose a reference, and may be free soon: pack nothing more into them."""
        if first <= self._next >> self._node.metadata.geometry.cluster_bits < first + count:
            self._next = 0
