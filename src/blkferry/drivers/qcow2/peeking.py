"""Reading what an image says of itself without opening it: no key, backing file or data file is needed for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import bitmap_directory, describing, snapshot_table
from blkferry.drivers.qcow2.header import Autoclear, CryptMethod, Header, Incompatible
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.drivers.qcow2.opening import read_header
from blkferry.drivers.qcow2.options import BlockdevOptionsQcow2
from blkferry.graph.permissions import Edge
from blkferry.schema.image import ImageInfo

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.snapshot_table import Snapshot
    from blkferry.graph.node import Node


async def peek(file: Node, data_file: Node | None = None) -> ImageInfo:
    """What there is to know of the image in `file`. Raises Error or OSError."""
    host = HostFile(file)
    header = await read_header(host)
    node = Qcow2("peeked", BlockdevOptionsQcow2(file=file.name), file.services, read_only=True)
    node.children["file"] = Edge(node, file, "file")  # the file does not know: nobody uses it that way
    node.adopt_header(header)
    node.snapshots = await read_snapshots(host, header)
    if header.incompatible & Incompatible.DATA_FILE:
        node.data_file = HostFile(data_file or file)
    if header.crypt_method is CryptMethod.LUKS and header.encryption is not None:
        from blkferry.crypt import luks_layout

        pointer = header.encryption
        node.luks = luks_layout.parse(bytes(await host.get(pointer.offset, luks_layout.SIZE)), pointer.length)
    if header.bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        directory = bytes(await host.get(header.bitmaps.directory_offset, header.bitmaps.directory_size))
        node.bitmaps.entries = bitmap_directory.parse(directory, header.bitmaps.count, header)
    return describing.image_info(node)


async def read_snapshots(host: HostFile, header: Header) -> list[Snapshot]:
    """The snapshot table of an image. Raises Error or OSError."""
    reader = snapshot_table.SnapshotTableReader(header.nb_snapshots, header)
    at = header.snapshots_offset
    while reader.wanted and at < host.length:
        length = max(reader.wanted, header.cluster_size)
        reader.receive(bytes(await host.get(at, length)))
        at += length
    return list(reader.snapshots)
