"""What users may say of qcow2 images that are opened or made; the names are QEMU's (qapi/block-core.json)."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from blkferry.schema.block import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from blkferry.schema.create import BlockdevCreateOptions, PreallocMode
from blkferry.schema.crypto import BlockdevQcow2Encryption, QCryptoBlockCreateOptions
from blkferry.schema.image import Qcow2CompressionType
from blkferry.schema.qapi import EXTENSION, Doc, Named, Size, Struct, TagOf, branch


class Qcow2OverlapCheckMode(enum.StrEnum):
    """Which metadata is protected against being overwritten by mistake."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(Struct):
    """Which metadata is protected, one by one; what is left out is as the template says."""

    template: Annotated[Qcow2OverlapCheckMode | None, Doc("where to begin (default: cached)", since="2.9")] = None
    main_header: Annotated[bool | None, Doc("the header", since="2.9")] = None
    active_l1: Annotated[bool | None, Doc("the active L1 table", since="2.9")] = None
    active_l2: Annotated[bool | None, Doc("the active L2 tables", since="2.9")] = None
    refcount_table: Annotated[bool | None, Doc("the refcount table", since="2.9")] = None
    refcount_block: Annotated[bool | None, Doc("the refcount blocks", since="2.9")] = None
    snapshot_table: Annotated[bool | None, Doc("the snapshot table", since="2.9")] = None
    inactive_l1: Annotated[bool | None, Doc("the L1 tables of snapshots", since="2.9")] = None
    inactive_l2: Annotated[bool | None, Doc("the L2 tables of snapshots", since="2.9")] = None
    bitmap_directory: Annotated[bool | None, Doc("the bitmap directory", since="3.0")] = None


Qcow2OverlapChecks = Annotated[Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, Named("Qcow2OverlapChecks")]
"""A set of checks by its name, or one by one."""


@branch
class BlockdevOptionsQcow2(BlockdevOptions):
    """A qcow2 image."""

    driver: Literal["qcow2"] = "qcow2"
    file: Annotated[BlockdevRef, Doc("the node that holds the image", since="2.9")]
    backing: Annotated[
        BlockdevRefOrNull | None,
        Doc("the backing node, null for none (default: what the image names)", since="2.9"),
    ] = None
    lazy_refcounts: Annotated[
        bool | None, Doc("let reference counts be out of date (default: as the image says)", since="2.9")
    ] = None
    pass_discard_request: Annotated[
        bool | None, Doc("pass discards of guests on (default: if discard is unmap)", since="2.9")
    ] = None
    pass_discard_snapshot: Annotated[
        bool | None, Doc("discard what deleted snapshots free (default on)", since="2.9")
    ] = None
    pass_discard_other: Annotated[
        bool | None, Doc("discard what is freed for other reasons (default off)", since="2.9")
    ] = None
    discard_no_unref: Annotated[
        bool | None, Doc("keep the place of discarded clusters in the image (default off)", since="8.1")
    ] = None
    overlap_check: Annotated[
        Qcow2OverlapChecks | None, Doc("which metadata is protected (default: cached)", since="2.9")
    ] = None
    cache_size: Annotated[int | None, Doc("bytes for both metadata caches together", since="2.9")] = None
    l2_cache_size: Annotated[int | None, Doc("bytes for the cache of L2 tables", since="2.9")] = None
    l2_cache_entry_size: Annotated[
        int | None, Doc("bytes of one entry in it, a power of two from 512 up to the cluster size", since="2.12")
    ] = None
    refcount_cache_size: Annotated[int | None, Doc("bytes for the cache of refcount blocks", since="2.9")] = None
    cache_clean_interval: Annotated[
        int | None, Doc("seconds after which unused entries are dropped, 0 for never (default 600)", since="2.9")
    ] = None
    encrypt: Annotated[BlockdevQcow2Encryption | None, Doc("how it is encrypted", since="2.10")] = None
    data_file: Annotated[BlockdevRef | None, Doc("the node of the external data file", since="4.0")] = None
    snapshot: Annotated[str | None, Doc("open this internal snapshot instead, read-only", features=(EXTENSION,))] = None


class BlockdevQcow2Version(enum.StrEnum):
    """A version of the format."""

    V2 = "v2"
    V3 = "v3"


@branch
class BlockdevCreateOptionsQcow2(BlockdevCreateOptions):
    """A qcow2 image."""

    driver: Literal["qcow2"] = "qcow2"
    file: Annotated[BlockdevRef, Doc("the node to write the image to", since="2.12")]
    data_file: Annotated[BlockdevRef | None, Doc("the node for an external data file", since="4.0")] = None
    data_file_raw: Annotated[
        bool | None, Doc("let the external data file alone be a raw image (default off)", since="4.0")
    ] = None
    extended_l2: Annotated[bool | None, Doc("divide clusters into subclusters (default off)", since="5.2")] = None
    size: Annotated[Size, Doc("size that a guest sees, in bytes", since="2.12")]
    version: Annotated[BlockdevQcow2Version | None, Doc("version of the format (default: v3)", since="2.12")] = None
    backing_file: Annotated[str | None, Doc("name of the backing file", since="2.12")] = None
    backing_fmt: Annotated[str | None, TagOf(BlockdevOptions), Doc("its format", since="2.12")] = None
    encrypt: Annotated[QCryptoBlockCreateOptions | None, Doc("how it is encrypted", since="2.12")] = None
    cluster_size: Annotated[Size | None, Doc("bytes per cluster (default 65536)", since="2.12")] = None
    preallocation: Annotated[PreallocMode | None, Doc("what is allocated now (default: off)", since="2.12")] = None
    lazy_refcounts: Annotated[bool | None, Doc("let reference counts be out of date (default off)", since="2.12")] = (
        None
    )
    refcount_bits: Annotated[int | None, Doc("width of a reference count (default 16)", since="2.12")] = None
    compression_type: Annotated[
        Qcow2CompressionType | None, Doc("what clusters are compressed with (default: zlib)", since="5.1")
    ] = None
