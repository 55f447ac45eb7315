"""Clusters that have no place a reader could be sent to: compressed and encrypted ones, and those that cannot be."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import compression
from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COMPRESSED, OFFSET
from blkferry.drivers.qcow2.header import CryptMethod
from blkferry.drivers.qcow2.words import CorruptError
from blkferry.extent import Content
from blkferry.graph import access
from blkferry.units import align_down, align_up

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

log = logging.getLogger(__name__)

_IN_THREAD = 64 << 10
"""Clusters from this size on are inflated and ciphered in a thread: below, the way there costs more than it saves."""

_KEPT_BYTES = 4 << 20
"""Inflated clusters that are kept: a client that reads in small pieces comes back for the next one."""


class Opaque:
    """What only the driver can read of one image."""

    def __init__(self, node: Qcow2) -> None:
        self.node = node
        self._inflated: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self._changes = 0

    def forget(self, start: int = 0, end: int | None = None) -> None:
        """What these guest offsets hold has changed."""
        self._changes += 1
        if end is None:
            self._inflated.clear()
        elif self._inflated:
            bits = self.node.header.cluster_bits
            for cluster in range(start >> bits, end >> bits):
                self._inflated.pop(cluster, None)

    async def read(self, start: int, view: memoryview) -> None:
        """Compressed and encrypted clusters, and the error for what cannot be."""
        geometry = self.node.metadata.geometry
        at, end = start, start + len(view)
        while at < end:
            stop = min(end, align_down(at, geometry.cluster_size) + geometry.cluster_size)
            await self._read_cluster(at, view[at - start : stop - start])
            at = stop

    async def _read_cluster(self, at: int, view: memoryview) -> None:
        geometry, metadata = self.node.metadata.geometry, self.node.metadata
        number = at >> geometry.slice_shift
        while (table := self.node.metadata.slices.get(number)) is None and metadata.slice_host(number):
            await metadata.load_slice(number)
        cluster = at >> geometry.cluster_bits
        index = (cluster & geometry.slice_mask) * geometry.words
        entry = table.values[index] if table is not None else 0
        within = at & (geometry.cluster_size - 1)
        if entry & COMPRESSED:
            data = await self._inflate(cluster, entry)
            view[:] = data[within : within + len(view)]
            return
        (extent, *others) = self.node.mapper.extents(table.values, at, at + len(view)) if table is not None else (None,)
        if extent is None or extent.content is not Content.OPAQUE or others:
            await access.read(self.node, at, view)  # it has changed meanwhile
            return
        host = entry & OFFSET
        if self.node.cipher is None or not self._is_sound(entry, table.values if table else None, index, host, cluster):
            error = CorruptError(
                f"Cluster allocation offset {host:#x} unaligned or impossible (L2 entry of guest offset "
                f"{cluster << geometry.cluster_bits:#x})",
                host,
            )
            self.node.found_corruption(error)
            raise error
        await self._read_encrypted(at, host + within, view)

    def _is_sound(self, entry: int, values: object, index: int, host: int, cluster: int) -> bool:
        geometry = self.node.metadata.geometry
        if not host and not self.node.mapper.fixed:
            return False
        if geometry.extended:
            bitmap: int = values[index + 1]  # type: ignore[index]
            if bitmap & ALL_ALLOCATED & bitmap >> 32:
                return False
        try:
            self.node.check_guest_place(host, cluster, reading=True)
        except CorruptError:
            return False
        return not entry & COMPRESSED

    async def _inflate(self, cluster: int, entry: int) -> bytes:
        kept = self._inflated.get(cluster)
        if kept is not None and kept[0] == entry:
            self._inflated.move_to_end(cluster)
            return kept[1]
        changes = self._changes
        geometry = self.node.metadata.geometry
        place = geometry.compressed_place(entry)
        length = min(place.length, max(self.node.file.length - place.offset, 0))
        file = self.node.file
        with file.reading():
            data = await file.get(place.offset, length)
        kind, size = self.node.header.compression_type, geometry.cluster_size
        try:
            if size >= _IN_THREAD:
                found = await self.node.services.in_thread(compression.decompress, kind, data, size)
            else:
                found = compression.decompress(kind, data, size)
        except compression.BadCompression as problem:
            at = cluster << geometry.cluster_bits
            message = f"compressed cluster of guest offset {at:#x} at {place.offset:#x} cannot be inflated: {problem}"
            log.warning("%s: %s", self.node.filename(), message)
            raise CorruptError(message, place.offset) from problem
        if changes != self._changes:  # the same entry may mean other bytes by now
            return found
        self._inflated[cluster] = (entry, found)
        while len(self._inflated) > max(_KEPT_BYTES // size, 2):
            self._inflated.popitem(last=False)
        return found

    async def _read_encrypted(self, at: int, host: int, view: memoryview) -> None:
        first, last = align_down(host, 512), align_up(host + len(view), 512)
        guest_file = self.node.data_file or self.node.file
        with guest_file.reading():
            data = await guest_file.get(first, last - first)
        sector = self.cipher_sector(at - (host - first), first)
        assert self.node.cipher is not None
        plain = await self.ciphered(self.node.cipher.decrypt, sector, data)
        view[:] = plain[host - first : host - first + len(view)]

    def cipher_sector(self, guest: int, host: int) -> int:
        """What the initialisation vector counts: LUKS the sectors of the file, the old AES those of the disk."""
        return (guest if self.node.header.crypt_method is CryptMethod.AES else host) >> 9

    async def ciphered(self, cipher: object, sector: int, data: bytes | bytearray | memoryview) -> bytes:
        if len(data) >= _IN_THREAD:
            return await self.node.services.in_thread(cipher, sector, data)  # type: ignore[arg-type]
        return cipher(sector, data)  # type: ignore[operator, no-any-return]

    async def encrypt(self, at: int, host: int, view: memoryview) -> tuple[int, memoryview]:
        """Encrypt what is to be written for guest offset `at` at `host`; where it goes, in whole sectors, and what."""
        node = self.node
        assert node.cipher is not None
        if host % 512 or len(view) % 512:  # the sectors at the edges have to be whole
            first, last = align_down(at, 512), align_up(at + len(view), 512)
            whole = memoryview(bytearray(last - first))
            await node.read_guest(first, whole)
            whole[at - first : at - first + len(view)] = view
            host, at, view = host - (at - first), first, whole
        data = await self.ciphered(node.cipher.encrypt, self.cipher_sector(at, host), view)
        return host, memoryview(data)
