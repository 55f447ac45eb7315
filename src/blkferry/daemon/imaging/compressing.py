"""Clusters compressed by several threads at once; who asks gets them in the order of the disk."""

from __future__ import annotations

import asyncio
import enum
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from blkferry.drivers.qcow2 import compression
from blkferry.drivers.qcow2.header import CompressionType

MIN_THREADS, MAX_THREADS = 4, 16


class Zero(enum.Enum):
    ZERO = enum.auto()


ZERO = Zero.ZERO

Packed: TypeAlias = bytes | Zero | None
"""A compressed cluster; ZERO where all of it is zero, None where it does not get smaller."""


class Compressor:
    """Threads that compress clusters of `cluster` bytes."""

    def __init__(self, kind: CompressionType, cluster: int, threads: int = 0) -> None:
        compression.require(kind)
        self.cluster = cluster
        self.threads = threads or min(max(os.cpu_count() or 1, MIN_THREADS), MAX_THREADS)
        self._kind = kind
        self._zero = bytes(cluster)
        self._pool = ThreadPoolExecutor(self.threads, "compress")

    async def compress(self, view: memoryview) -> list[Packed]:
        """Compress whole clusters; the last one, at the end of a disk, may be shorter and is filled up."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._compress, view)

    def _compress(self, view: memoryview) -> list[Packed]:
        packed: list[Packed] = []
        for at in range(0, len(view), self.cluster):
            data = bytes(view[at : at + self.cluster]).ljust(self.cluster, b"\0")
            packed.append(ZERO if data == self._zero else compression.compress(self._kind, data))
        return packed

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
