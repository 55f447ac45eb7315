"""What a `vduse-blk` export takes."""

from typing import Annotated, Literal

from blkferry.schema.export import BlockExportOptions
from blkferry.schema.qapi import Doc, Size, Uint16, branch


@branch
class BlockExportOptionsVduseBlk(BlockExportOptions):
    """A block device of this host, or a disk for a guest, by the kernel's VDUSE."""

    type: Literal["vduse-blk"] = "vduse-blk"
    name: Annotated[str, Doc("the name of the VDUSE device, unique on this host", since="7.1")]
    num_queues: Annotated[Uint16, Doc("how many virtqueues it has", since="7.1")] = 1
    queue_size: Annotated[Uint16, Doc("entries of each virtqueue, a power of two from 4 to 1024", since="7.1")] = 256
    logical_block_size: Annotated[
        Size, Doc("bytes of a block, a power of two from 512 to 2 MiB; Linux takes up to a page", since="7.1")
    ] = 512
    serial: Annotated[str, Doc("the serial number of the disk, of which drivers see 20 bytes", since="7.1")] = ""
