"""Block nodes: the options all of them share, what queries say about them, and their commands.

The options of a driver are a branch of `BlockdevOptions` and live with the driver.
"""

import enum
from typing import Annotated

from blkferry.schema.qapi import Command, Doc, Named, Struct, union


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


class ImageInfo(Struct):
    """An image file."""

    filename: Annotated[str, Doc("name of the image file")]
    format: Annotated[str, Doc("its format")]
    virtual_size: Annotated[int, Doc("size that a guest sees, in bytes")]
    actual_size: Annotated[int | None, Doc("space taken on the host, in bytes")] = None
    dirty_flag: Annotated[bool | None, Doc("the image was not closed cleanly")] = None
    cluster_size: Annotated[int | None, Doc("bytes per cluster")] = None
    encrypted: Annotated[bool | None, Doc("the image is encrypted")] = None
    compressed: Annotated[bool | None, Doc("the image is compressed")] = None
    backing_filename: Annotated[str | None, Doc("the backing file as the image names it")] = None
    full_backing_filename: Annotated[str | None, Doc("the same, as a full path")] = None
    backing_filename_format: Annotated[str | None, Doc("format of the backing file")] = None
    backing_image: Annotated["ImageInfo | None", Doc("the backing image")] = None


class BlockdevCacheInfo(Struct):
    """How the caches of a node are used."""

    writeback: Annotated[bool, Doc("writes complete before they are durable")]
    direct: Annotated[bool, Doc("the host's page cache is bypassed")]
    no_flush: Annotated[bool, Doc("flush requests are ignored")]


class BlockDeviceInfo(Struct, rename={"node_name": "node-name"}):
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
    bps: Annotated[int, Doc("total throughput limit in bytes per second, 0 if none", always=True)] = 0
    bps_rd: Annotated[int, Doc("read throughput limit", always=True)] = 0
    bps_wr: Annotated[int, Doc("write throughput limit", always=True)] = 0
    iops: Annotated[int, Doc("limit of operations per second, 0 if none", always=True)] = 0
    iops_rd: Annotated[int, Doc("limit of reads per second", always=True)] = 0
    iops_wr: Annotated[int, Doc("limit of writes per second", always=True)] = 0
    image: Annotated[ImageInfo, Doc("the image", since="1.6")]
    cache: Annotated[BlockdevCacheInfo, Doc("how the caches are used", since="2.3")]
    write_threshold: Annotated[int, Doc("offset whose writing is reported, 0 if none", since="2.3", always=True)] = 0


COMMANDS = (
    Command("blockdev-add", "Open a block node.", BlockdevOptions, since="2.9"),
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
