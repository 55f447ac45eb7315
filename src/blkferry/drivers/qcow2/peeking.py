"""Reading what an image says of itself without opening it: no key, backing file or data file is needed for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import bitmap_directory, describing
from blkferry.drivers.qcow2.bitmap_directory import BitmapEntry
from blkferry.drivers.qcow2.header import Autoclear, CryptMethod
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.opening import read_header, read_snapshots
from blkferry.schema.image import ImageInfo

if TYPE_CHECKING:
    from blkferry.graph.node import Node


async def peek(file: Node, data_file: Node | None = None) -> ImageInfo:
    """What there is to know of the image in `file`. Raises Error or OSError."""
    host = HostFile(file)
    header = await read_header(host)
    luks = None
    if header.crypt_method is CryptMethod.LUKS and header.encryption is not None:
        from blkferry.crypt import luks_layout

        pointer = header.encryption
        luks = luks_layout.parse(bytes(await host.get(pointer.offset, luks_layout.SIZE)), pointer.length)
    bitmaps: list[BitmapEntry] = []
    if header.bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        directory = bytes(await host.get(header.bitmaps.directory_offset, header.bitmaps.directory_size))
        bitmaps = bitmap_directory.parse(directory, header.bitmaps.count, header)
    return describing.image_info(
        describing.Known(
            filename=file.filename(),
            header=header,
            actual_size=file.allocated_size(),
            snapshots=await read_snapshots(host, header),
            bitmaps=bitmaps,
            luks=luks,
            data_file=data_file.filename() if data_file is not None else None,
        )
    )
