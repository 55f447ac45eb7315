"""Block nodes: the options all of them share, what queries say about them, and their commands.

The options of a driver are a branch of `BlockdevOptions` and live with the driver.
"""

import enum
from typing import Annotated

from blkferry.schema.image import ImageInfo
from blkferry.schema.qapi import Command, Doc, Event, Named, Null, Struct, union


class BlockdevDiscardOptions(enum.StrEnum):
    """What becomes of a discard request."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockdevDetectZeroesOptions(enum.StrEnum):
    """What becomes of a write whose bytes are all zero."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class BlockdevCacheOptions(Struct):
    """How the host's caches are used."""

    direct: Annotated[bool, Doc("bypass the host's page cache (O_DIRECT)", since="2.9")] = False
    no_flush: Annotated[bool, Doc("ignore flush requests: data is lost when the host fails", since="2.9")] = False


@union("driver")
class BlockdevOptions(Struct):
    """A block node."""

    driver: Annotated[str, Doc("the block driver", since="2.9")]
    node_name: Annotated[str | None, Doc("name of the node; required unless it is given inline", since="2.0")] = None
    discard: Annotated[
        BlockdevDiscardOptions | None,
        Doc("pass discard requests on or not (default: ignore; for an inline child, as its parent says)", since="2.9"),
    ] = None
    cache: Annotated[BlockdevCacheOptions | None, Doc("how the host's caches are used", since="2.9")] = None
    active: Annotated[bool, Doc("whether the node may be used at once", since="10.0")] = True
    read_only: Annotated[bool, Doc("refuse writes", since="2.9")] = False
    auto_read_only: Annotated[bool, Doc("open read-only when that is all the host allows", since="3.1")] = False
    force_share: Annotated[bool, Doc("let others write at the same time; needs read-only", since="2.10")] = False
    detect_zeroes: Annotated[BlockdevDetectZeroesOptions, Doc("turn zeros into write-zeroes", since="2.1")] = (
        BlockdevDetectZeroesOptions.OFF
    )


BlockdevRef = Annotated[str | BlockdevOptions, Named("BlockdevRef")]
"""A child: the name of a node, or the options of one that belongs to its parent."""

BlockdevRefOrNull = Annotated[str | BlockdevOptions | Null, Named("BlockdevRefOrNull")]
"""The same, or no child at all."""


class BlockdevReopen(Struct):
    """Arguments of blockdev-reopen."""

    options: Annotated[list[BlockdevOptions], Doc("the nodes, each with all its options as they shall be", since="6.1")]


class BlockdevDel(Struct):
    """Arguments of blockdev-del."""

    node_name: Annotated[str, Doc("the node to remove")]


class BlockResize(Struct):
    """Arguments of block_resize."""

    device: Annotated[str | None, Doc("name of a device; nodes have none here")] = None
    node_name: Annotated[str | None, Doc("the node to resize", since="2.0")] = None
    size: Annotated[int, Doc("the new size in bytes")]


class QueryNamedBlockNodes(Struct):
    """Arguments of query-named-block-nodes."""

    flat: Annotated[bool, Doc("leave out the backing images of each node", since="5.0")] = False


class BlockdevCacheInfo(Struct):
    """How the caches of a node are used."""

    writeback: Annotated[bool, Doc("writes complete before they are durable")]
    direct: Annotated[bool, Doc("the host's page cache is bypassed")]
    no_flush: Annotated[bool, Doc("flush requests are ignored")]


class BlockDirtyInfo(Struct):
    """A dirty bitmap, as queries list it."""

    name: Annotated[str | None, Doc("its name", since="2.4")] = None
    count: Annotated[int, Doc("how many bytes are dirty")]
    granularity: Annotated[int, Doc("bytes a bit", since="1.4")]
    recording: Annotated[bool, Doc("writes are marked", since="4.0")]
    busy: Annotated[bool, Doc("a job or an export uses it: it cannot be changed", since="4.0")]
    persistent: Annotated[bool, Doc("it is stored with the image", since="4.0")]
    inconsistent: Annotated[bool | None, Doc("it was not stored in order and can only be removed", since="4.0")] = None


class BlockDeviceInfo(Struct, rename={"node_name": "node-name", "dirty_bitmaps": "dirty-bitmaps"}):
    """A node, as query-named-block-nodes lists it. Its names mix dashes and underscores, and are QEMU's."""

    file: Annotated[str, Doc("name of the image file")]
    node_name: Annotated[str | None, Doc("name of the node", since="2.0")] = None
    ro: Annotated[bool, Doc("the node is read-only")]
    drv: Annotated[str, Doc("the block driver")]
    backing_file: Annotated[str | None, Doc("name of the backing file")] = None
    backing_file_depth: Annotated[int, Doc("number of backing files below", since="1.2")]
    active: Annotated[bool, Doc("the node may be used", since="10.0", always=True)] = True
    encrypted: Annotated[bool, Doc("the image is encrypted", always=True)] = False
    detect_zeroes: Annotated[
        BlockdevDetectZeroesOptions, Doc("what becomes of a write of zeros", since="2.1", always=True)
    ] = BlockdevDetectZeroesOptions.OFF
    dirty_bitmaps: Annotated[list[BlockDirtyInfo] | None, Doc("the dirty bitmaps, if there are any", since="4.2")] = (
        None
    )
    bps: Annotated[int, Doc("total throughput limit in bytes per second, 0 if none", always=True)] = 0
    bps_rd: Annotated[int, Doc("read throughput limit", always=True)] = 0
    bps_wr: Annotated[int, Doc("write throughput limit", always=True)] = 0
    iops: Annotated[int, Doc("limit of operations per second, 0 if none", always=True)] = 0
    iops_rd: Annotated[int, Doc("limit of reads per second", always=True)] = 0
    iops_wr: Annotated[int, Doc("limit of writes per second", always=True)] = 0
    image: Annotated[ImageInfo, Doc("the image", since="1.6")]
    cache: Annotated[BlockdevCacheInfo, Doc("how the caches are used", since="2.3")]
    write_threshold: Annotated[int, Doc("offset whose writing is reported, 0 if none", since="2.3", always=True)] = 0


class BlockImageCorrupted(Struct):
    """Data of BLOCK_IMAGE_CORRUPTED."""

    device: Annotated[str, Doc("name of a device; empty, for nodes have none here", since="1.7")]
    node_name: Annotated[str | None, Doc("the node", since="2.4")] = None
    msg: Annotated[str, Doc("what is wrong", since="1.7")]
    offset: Annotated[int | None, Doc("where in the image file, in bytes", since="1.7")] = None
    size: Annotated[int | None, Doc("how many bytes", since="1.7")] = None
    fatal: Annotated[bool, Doc("the image can no longer be used until it is repaired", since="1.7")]


COMMANDS = (
    Command("blockdev-add", "Open a block node.", BlockdevOptions, since="2.9"),
    Command(
        "blockdev-reopen",
        "Give nodes other options, all of them or, when one is refused, none. What is left out gets its default.",
        BlockdevReopen,
        since="6.1",
    ),
    Command("blockdev-del", "Close a node that nothing uses.", BlockdevDel, since="2.9"),
    Command("block_resize", "Change the size of a node.", BlockResize, since="0.14"),
    Command(
        "query-named-block-nodes",
        "List the nodes.",
        QueryNamedBlockNodes,
        returns=list[BlockDeviceInfo],
        since="2.0",
    ),
)

EVENTS = (Event("BLOCK_IMAGE_CORRUPTED", "An image was found to be damaged.", BlockImageCorrupted, "1.7"),)
