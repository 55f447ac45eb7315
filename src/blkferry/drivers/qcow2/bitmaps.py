"""Persistent dirty bitmaps: loaded when an image is opened, kept up by a writer, stored when that closes it.

While a writer has them, the image says that its copies are in use: after a crash they are known not to be complete.
What cannot be used (unknown extra data, left in use by somebody who crashed) is kept as it is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import bitmap_directory
from blkferry.drivers.qcow2.bitmap_directory import ALL_ONES, MAX_BITMAP_SIZE, BitmapEntry, BitmapFlags
from blkferry.drivers.qcow2.extensions import BitmapsExtension
from blkferry.drivers.qcow2.header import Autoclear
from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import DirtyBitmap

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

log = logging.getLogger(__name__)


class StoredBitmaps:
    """The bitmaps of one image."""

    def __init__(self) -> None:
        self.entries: list[BitmapEntry] = []
        self.loaded: dict[str, DirtyBitmap] = {}

    @property
    def enabled(self) -> bool:
        """Whether writes have to be marked."""
        return any(bitmap.enabled for bitmap in self.loaded.values())

    def mark(self, start: int, end: int) -> None:
        """A range is being written."""
        for bitmap in self.loaded.values():
            if bitmap.enabled:
                bitmap.mark(start, min(end, bitmap.size))

    def check_resize(self) -> None:
        """Refuse to resize what is not in memory. Raises Error."""
        for entry in self.entries:
            if entry.name not in self.loaded:
                raise Error(
                    ErrorKind.UNSUPPORTED,
                    f"Cannot resize the image: bitmap '{entry.name}' is inconsistent or unknown",
                    hint="Remove the bitmap first.",
                )

    def resize(self, length: int) -> None:
        for bitmap in self.loaded.values():
            if bitmap.size != length:
                bitmap.resize(length)

    # Loading ---------------------------------------------------------------------------------------------------

    async def load(self, node: Qcow2) -> None:
        """Read the directory and the bitmaps. Those that the node had before stay the same objects.

        Raises Error or OSError.
        """
        before = dict(node.dirty_bitmaps)
        node.dirty_bitmaps.clear()
        header = node.header
        extension = header.bitmaps
        if extension is None:
            return
        if not header.autoclear & Autoclear.BITMAPS:
            log.warning(
                "%s: a program without support for bitmaps has written to this image; its bitmaps cannot be used",
                node.filename(),
            )
            return
        file = node.metadata.file
        if extension.directory_offset + extension.directory_size > file.length:
            raise Error(
                ErrorKind.CORRUPT,
                f"The bitmap directory at {extension.directory_offset:#x} reaches behind the end of the image",
                structure="bitmap directory",
                offset=extension.directory_offset,
            )
        data = bytes(await file.get(extension.directory_offset, extension.directory_size))
        self.entries = bitmap_directory.parse(data, extension.count, header)
        for entry in self.entries:
            if not entry.usable:
                log.warning("%s: bitmap '%s' is of an unknown kind and stays unused", node.filename(), entry.name)
            else:
                node.dirty_bitmaps[entry.name] = await self._load_one(node, entry, before.get(entry.name))
        if node.metadata.writable:
            await self.take_into_use(node)

    async def _load_one(self, node: Qcow2, entry: BitmapEntry, before: DirtyBitmap | None) -> DirtyBitmap:
        if not entry.flags & BitmapFlags.IN_USE:
            try:
                if not node.metadata.writable:
                    self._check_room(node, entry)
                bitmap = await self._read(node, entry)
            except (Error, OSError) as error:
                if node.metadata.writable:
                    raise
                log.warning("%s: bitmap '%s' cannot be read: %s", node.filename(), entry.name, error)  # its disk can
            else:
                if before is not None and before.granularity_bits == bitmap.granularity_bits:
                    before.size, before.bits, before.enabled = bitmap.size, bitmap.bits, bitmap.enabled
                    before.changed = False
                    bitmap = before  # an export may be using it
                self.loaded[entry.name] = bitmap
                return bitmap
        log.warning("%s: bitmap '%s' is inconsistent and stays unused", node.filename(), entry.name)
        bitmap = DirtyBitmap(entry.name, 0, entry.granularity_bits, enabled=False, persistent=True)  # it needs no bits
        bitmap.inconsistent = True
        return bitmap

    def _check_room(self, node: Qcow2, entry: BitmapEntry) -> None:
        """A small file can name huge bitmaps: those who only read the disk do not pay for more than the largest one."""
        needed = sum(len(bitmap.bits) for bitmap in self.loaded.values()) + (node.length >> entry.granularity_bits + 3)
        if needed > MAX_BITMAP_SIZE:
            raise Error(ErrorKind.NO_SPACE, f"the bitmaps would take {needed} bytes of memory")

    async def take_into_use(self, node: Qcow2) -> None:
        """Say in the image that what is in memory is newer from now on. Raises OSError."""
        if self.loaded:
            await self._write_flags(node, BitmapFlags.IN_USE)

    async def _read(self, node: Qcow2, entry: BitmapEntry) -> DirtyBitmap:
        file, size = node.metadata.file, node.header.cluster_size
        enabled = bool(entry.flags & BitmapFlags.AUTO)
        bitmap = DirtyBitmap(entry.name, node.length, entry.granularity_bits, enabled=enabled, persistent=True)
        table = bitmap_directory.parse_table(bytes(await file.get(entry.table_offset, 8 * entry.table_size)), size)
        for index, place in enumerate(table):
            at = index * size
            length = min(size, len(bitmap.bits) - at)
            if length <= 0:
                break
            if place == ALL_ONES:
                bitmap.bits[at : at + length] = b"\xff" * length
            elif place:
                bitmap.bits[at : at + length] = await file.get(place, length)
        if bitmap.count & 7:
            bitmap.bits[-1] &= (1 << (bitmap.count & 7)) - 1
        return bitmap

    async def _write_flags(self, node: Qcow2, in_use: BitmapFlags) -> None:
        """Say in place, durably, whether the image's copies of the loaded bitmaps are in use."""
        self.entries = [
            replace(entry, flags=(entry.flags & ~BitmapFlags.IN_USE) | in_use) if entry.name in self.loaded else entry
            for entry in self.entries
        ]
        extension = node.header.bitmaps
        assert extension is not None
        metadata = node.metadata
        await metadata.file.put(extension.directory_offset, bitmap_directory.build(self.entries, node.header))
        await metadata.file.node.flush()

    # Storing ---------------------------------------------------------------------------------------------------

    async def store(self, node: Qcow2) -> None:
        """Write back what has changed, and say that the image's copies are good again. Raises Error or OSError."""
        if not self.loaded:
            return
        if any(bitmap.changed for bitmap in self.loaded.values()):
            await self._store_changed(node)
        else:
            await self._write_flags(node, BitmapFlags(0))

    async def _store_changed(self, node: Qcow2) -> None:
        metadata = node.metadata
        obsolete: list[tuple[int, int]] = []
        entries: list[BitmapEntry] = []
        bits = node.header.cluster_bits
        for entry in self.entries:
            bitmap = self.loaded.get(entry.name)
            if bitmap is None:
                entries.append(entry)
                continue
            flags = (entry.flags & ~(BitmapFlags.IN_USE | BitmapFlags.AUTO)) | (
                BitmapFlags.AUTO if bitmap.enabled else BitmapFlags(0)
            )
            if not bitmap.changed:
                entries.append(replace(entry, flags=flags))
                continue
            obsolete += await self._clusters_of(node, entry)
            offset, size = await self._write(node, bitmap)
            entries.append(replace(entry, flags=flags, table_offset=offset, table_size=size))
        directory = bitmap_directory.build(entries, node.header)
        offset = await node.metadata.place_table(directory)
        await metadata.commit()
        old = node.header.bitmaps
        assert old is not None
        await metadata.rewrite_header(
            bitmaps=BitmapsExtension(count=len(entries), directory_size=len(directory), directory_offset=offset)
        )
        node.header_changed()
        obsolete.append((old.directory_offset >> bits, metadata.geometry.clusters(old.directory_size)))
        for first, count in obsolete:
            for cluster in range(first, first + count):
                metadata.known.pop(cluster, None)
            metadata.drop(first, count, discard=False)
        self.entries = entries

    async def _clusters_of(self, node: Qcow2, entry: BitmapEntry) -> list[tuple[int, int]]:
        file, bits = node.metadata.file, node.header.cluster_bits
        data = bytes(await file.get(entry.table_offset, 8 * entry.table_size))
        places = bitmap_directory.parse_table(data, node.header.cluster_size)
        table = (entry.table_offset >> bits, node.metadata.geometry.clusters(8 * entry.table_size))
        return [table, *((place >> bits, 1) for place in places if place > ALL_ONES)]

    async def _write(self, node: Qcow2, bitmap: DirtyBitmap) -> tuple[int, int]:
        """Write one bitmap to new clusters; where its table is, and how many entries it has."""
        size = node.header.cluster_size
        table: list[int] = []
        entries = bitmap_directory.table_size_of(node.header.size, bitmap.granularity_bits, size)
        for index in range(entries):
            part = bytes(bitmap.bits[index * size : (index + 1) * size])
            if not any(part):
                table.append(0)
            elif len(part) == size and part == b"\xff" * size:
                table.append(ALL_ONES)
            else:
                table.append(await node.metadata.place_table(part))
        return await node.metadata.place_table(bitmap_directory.build_table(table, size)), entries
