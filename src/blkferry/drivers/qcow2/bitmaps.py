"""Persistent dirty bitmaps: loaded when an image is opened, kept up by a writer, stored when that closes it.

While a writer has them, the image says that its copies are in use: after a crash they are known not to be complete.
What cannot be used (unknown extra data, left in use by somebody who crashed) is kept as it is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import bitmap_directory
from blkferry.drivers.qcow2.bitmap_directory import ALL_ONES, MAX_BITMAP_SIZE, MAX_NAME, BitmapEntry, BitmapFlags
from blkferry.drivers.qcow2.extensions import MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAPS, BitmapsExtension
from blkferry.drivers.qcow2.header import Autoclear
from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import DirtyBitmap

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

log = logging.getLogger(__name__)


def _kept(node: Qcow2) -> dict[str, DirtyBitmap]:
    """The bitmaps that are to be stored, by name."""
    return {b.name: b for b in node.dirty_bitmaps.values() if b.persistent and not b.inconsistent}


class StoredBitmaps:
    """What an image's bitmap directory says; the bitmaps themselves are the node's `dirty_bitmaps`."""

    def __init__(self) -> None:
        self.entries: list[BitmapEntry] = []

    def check_resize(self, node: Qcow2) -> None:
        """Refuse to resize what is not in memory. Raises Error."""
        kept = _kept(node)
        for entry in self.entries:
            if entry.name not in kept:
                raise Error(
                    ErrorKind.UNSUPPORTED,
                    f"Cannot resize the image: bitmap '{entry.name}' is inconsistent or unknown",
                    hint="Remove the bitmap first.",
                )

    def check_new(self, node: Qcow2, name: str, granularity_bits: int) -> None:
        """Refuse a bitmap that could not be stored besides the others. Raises Error."""
        header = node.header
        names = {entry.name for entry in self.entries} | set(_kept(node))
        allocated = header.cluster_size * bitmap_directory.table_size_of(
            node.length, granularity_bits, header.cluster_size
        )
        directory = sum(map(bitmap_directory.entry_size, (*names, name)))
        if header.version < 3:
            wrong = "Cannot store dirty bitmaps in qcow2 v2 files"
        elif len(name.encode()) > MAX_NAME:
            wrong = f"Name length exceeds maximum ({MAX_NAME} characters)"
        elif name in names:
            wrong = f"Bitmap with the same name is already stored in the image: '{name}'"
        elif len(names) >= MAX_BITMAPS:
            wrong = "Maximum number of persistent bitmaps is already reached"
        elif directory > MAX_BITMAP_DIRECTORY_SIZE:
            wrong = "Not enough space in the bitmap directory"
        elif allocated > MAX_BITMAP_SIZE:
            wrong = "Too much space will be occupied by the bitmap. Use larger granularity"
        else:
            return
        raise Error(
            ErrorKind.UNSUPPORTED, f"Can't make bitmap '{name}' persistent in '{node.name}': {wrong}", node=node.name
        )

    async def remove(self, node: Qcow2, name: str) -> None:
        """Take a bitmap out of the image, if it is there. Raises Error or OSError."""
        gone = [entry for entry in self.entries if entry.name == name]
        if not gone:
            return
        obsolete: list[tuple[int, int]] = []
        try:
            obsolete = await self._clusters_of(node, gone[0])
        except Error as error:  # a table that makes no sense: what it takes stays taken, for a check to find
            log.warning("%s: bitmap '%s' is removed, but not its clusters: %s", node.filename(), name, error)
        await self._write_directory(node, [entry for entry in self.entries if entry.name != name], obsolete)

    # Loading ---------------------------------------------------------------------------------------------------

    async def load(self, node: Qcow2) -> None:
        """Read the directory and the bitmaps. Those that the node had before stay the same objects.

        Raises Error or OSError.
        """
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
            if entry.usable:
                _put(node, await self._load_one(node, entry))
            else:
                log.warning("%s: bitmap '%s' is of an unknown kind and stays unused", node.filename(), entry.name)
        if node.metadata.writable:
            await self.take_into_use(node)

    async def _load_one(self, node: Qcow2, entry: BitmapEntry) -> DirtyBitmap:
        if not entry.flags & BitmapFlags.IN_USE:
            try:
                if not node.metadata.writable:
                    _check_room(node, entry)
                return await self._read(node, entry)
            except (Error, OSError) as error:
                if node.metadata.writable:
                    raise
                log.warning("%s: bitmap '%s' cannot be read: %s", node.filename(), entry.name, error)  # its disk can
        log.warning("%s: bitmap '%s' is inconsistent and stays unused", node.filename(), entry.name)
        lost = DirtyBitmap(entry.name, 0, entry.granularity_bits, enabled=False, persistent=True)  # it needs no bits
        lost.inconsistent = True
        return lost

    async def take_into_use(self, node: Qcow2) -> None:
        """Say in the image that what is in memory is newer from now on. Raises OSError."""
        kept = _kept(node)
        if any(entry.name in kept for entry in self.entries):
            await self._write_flags(node, BitmapFlags.IN_USE)

    async def _read(self, node: Qcow2, entry: BitmapEntry) -> DirtyBitmap:
        file, size = node.metadata.file, node.header.cluster_size
        enabled = bool(entry.flags & BitmapFlags.AUTO)
        bitmap = DirtyBitmap(entry.name, node.length, entry.granularity_bits, enabled=enabled, persistent=True)
        table = bitmap_directory.parse_table(bytes(await file.get(entry.table_offset, 8 * entry.table_size)), size)
        for index, place in enumerate(table):
            at = index * size
            length = min(size, len(bitmap.array) - at)
            if length <= 0:
                break
            if place == ALL_ONES:
                bitmap.array[at : at + length] = b"\xff" * length
            elif place:
                bitmap.array[at : at + length] = await file.get(place, length)
        if bitmap.count & 7:
            bitmap.array[-1] &= (1 << (bitmap.count & 7)) - 1
        return bitmap

    async def _write_flags(self, node: Qcow2, in_use: BitmapFlags) -> None:
        """Say in place, durably, whether the image's copies of the loaded bitmaps are in use."""
        kept = _kept(node)
        self.entries = [
            replace(entry, flags=(entry.flags & ~BitmapFlags.IN_USE) | in_use) if entry.name in kept else entry
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
        kept = _kept(node)
        if not kept:
            return
        for bitmap in kept.values():
            bitmap.take_over()
        if any(bitmap.changed for bitmap in kept.values()):
            await self._store_changed(node, kept)
        else:
            await self._write_flags(node, BitmapFlags(0))

    async def _store_changed(self, node: Qcow2, kept: dict[str, DirtyBitmap]) -> None:
        obsolete: list[tuple[int, int]] = []
        entries: list[BitmapEntry] = []
        for entry in self.entries:
            bitmap = kept.get(entry.name)
            if bitmap is None:
                entries.append(entry)
                continue
            flags = (entry.flags & ~(BitmapFlags.IN_USE | BitmapFlags.AUTO)) | _auto(bitmap)
            if not bitmap.changed:
                entries.append(replace(entry, flags=flags))
                continue
            obsolete += await self._clusters_of(node, entry)
            offset, size = await self._write(node, bitmap)
            entries.append(replace(entry, flags=flags, table_offset=offset, table_size=size))
        known = {entry.name for entry in self.entries}
        for bitmap in kept.values():
            if bitmap.name not in known:
                offset, size = await self._write(node, bitmap)
                entries.append(
                    BitmapEntry(
                        name=bitmap.name,
                        table_offset=offset,
                        table_size=size,
                        flags=_auto(bitmap),
                        granularity_bits=bitmap.granularity_bits,
                    )
                )
        await self._write_directory(node, entries, obsolete)
        for bitmap in kept.values():
            bitmap.changed = False

    async def _write_directory(self, node: Qcow2, entries: list[BitmapEntry], obsolete: list[tuple[int, int]]) -> None:
        """Let the image have a new directory, and give up the old one and these runs of clusters."""
        metadata, header = node.metadata, node.header
        extension = None
        if entries:
            directory = bitmap_directory.build(entries, header)
            offset = await metadata.place_table(directory)
            extension = BitmapsExtension(count=len(entries), directory_size=len(directory), directory_offset=offset)
        await metadata.commit()
        old = header.bitmaps if header.autoclear & Autoclear.BITMAPS else None
        autoclear = header.autoclear & ~Autoclear.BITMAPS
        if entries:
            autoclear |= Autoclear.BITMAPS
        await metadata.rewrite_header(bitmaps=extension, autoclear=autoclear)
        node.header_changed()
        if old is not None:
            first = old.directory_offset >> header.cluster_bits
            obsolete = [*obsolete, (first, metadata.geometry.clusters(old.directory_size))]
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
            part = bytes(bitmap.array[index * size : (index + 1) * size])
            if not any(part):
                table.append(0)
            elif len(part) == size and part == b"\xff" * size:
                table.append(ALL_ONES)
            else:
                table.append(await node.metadata.place_table(part))
        return await node.metadata.place_table(bitmap_directory.build_table(table, size)), entries


def _check_room(node: Qcow2, entry: BitmapEntry) -> None:
    """A small file can name huge bitmaps: those who only read the disk do not pay for more than the largest one."""
    needed = sum(len(bitmap.array) for bitmap in _kept(node).values()) + (node.length >> entry.granularity_bits + 3)
    if needed > MAX_BITMAP_SIZE:
        raise Error(ErrorKind.NO_SPACE, f"the bitmaps would take {needed} bytes of memory")


def _auto(bitmap: DirtyBitmap) -> BitmapFlags:
    return BitmapFlags.AUTO if bitmap.enabled else BitmapFlags(0)


def _put(node: Qcow2, stored: DirtyBitmap) -> None:
    """The node has this bitmap now; where it had it before the image was opened anew, users keep theirs."""
    bitmap = node.dirty_bitmaps.get(stored.name)
    if bitmap is None:
        node.dirty_bitmaps[stored.name] = stored
        return
    bitmap.array, bitmap.size, bitmap.changed = stored.array, stored.size, False
    bitmap.inconsistent = stored.inconsistent
