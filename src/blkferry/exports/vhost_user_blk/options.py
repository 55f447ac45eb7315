"""The options of a vhost-user-blk export."""

from typing import Annotated, Literal

from blkferry.schema.export import BlockExportOptions
from blkferry.schema.qapi import EXTENSION, Doc, Size, Uint16, branch
from blkferry.schema.sockets import SocketAddress


@branch
class BlockExportOptionsVhostUserBlk(BlockExportOptions):
    """A disk for virtual machines: a vhost-user back end for virtio-blk devices."""

    type: Literal["vhost-user-blk"] = "vhost-user-blk"
    addr: Annotated[
        SocketAddress,
        Doc("where front ends connect: of type unix, or fd (a listening socket)", since="5.2"),
    ]
    logical_block_size: Annotated[
        Size, Doc("the unit of the guest's requests, a power of 2 between 512 and 2097152", since="5.2")
    ] = 512
    num_queues: Annotated[Uint16, Doc("how many request queues a guest may have, at most 256", since="5.2")] = 1
    serial: Annotated[
        str | None,
        Doc("what the guest is told when it asks for the disk's identity, at most 20 bytes", features=(EXTENSION,)),
    ] = None
