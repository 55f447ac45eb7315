"""What queries tell of an image: its size and names, its snapshots, and what only its format has."""

import enum
from typing import Annotated, Literal

from blkferry.schema.crypto import ImageInfoSpecificQCow2Encryption
from blkferry.schema.qapi import Doc, Form, Struct, branch, union


class SnapshotInfo(Struct):
    """An internal snapshot."""

    id: Annotated[str, Doc("unique id of the snapshot")]
    name: Annotated[str, Doc("its name")]
    vm_state_size: Annotated[int, Doc("bytes of the saved state of a virtual machine")]
    date_sec: Annotated[int, Doc("when it was made, in seconds since 1970")]
    date_nsec: Annotated[int, Doc("and nanoseconds")]
    vm_clock_sec: Annotated[int, Doc("the virtual machine's clock, in seconds")]
    vm_clock_nsec: Annotated[int, Doc("and nanoseconds")]
    icount: Annotated[int | None, Doc("instructions that had been executed", since="5.2")] = None


class Qcow2CompressionType(enum.StrEnum):
    """What clusters are compressed with."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class Qcow2BitmapInfoFlags(enum.StrEnum):
    """What the image says of a bitmap."""

    IN_USE = "in-use"
    AUTO = "auto"


class Qcow2BitmapInfo(Struct):
    """A persistent bitmap."""

    name: Annotated[str, Doc("its name", since="4.0")]
    granularity: Annotated[int, Doc("bytes that one bit stands for", since="4.0")]
    flags: Annotated[list[Qcow2BitmapInfoFlags], Doc("what the image says of it", since="4.0")]


@union("type", wrappable=True)
class ImageInfoSpecific(Struct):
    """What only one format has to tell."""

    type: Annotated[str, Doc("the format", since="1.7")]


@branch
class ImageInfoSpecificFile(ImageInfoSpecific):
    """A file of the host."""

    type: Literal["file"] = "file"
    extent_size_hint: Annotated[int | None, Doc("the file system's hint, in bytes", since="8.0")] = None


@branch
class ImageInfoSpecificQCow2(ImageInfoSpecific):
    """A qcow2 image."""

    type: Literal["qcow2"] = "qcow2"
    compat: Annotated[str, Doc("level of compatibility: 0.10 for version 2, 1.1 for version 3", since="1.7")]
    data_file: Annotated[str | None, Doc("name of the external data file", since="4.0")] = None
    data_file_raw: Annotated[bool | None, Doc("the external data file alone is a raw image", since="4.0")] = None
    extended_l2: Annotated[bool | None, Doc("clusters have subclusters", since="5.2")] = None
    lazy_refcounts: Annotated[bool | None, Doc("reference counts may be out of date", since="1.7")] = None
    corrupt: Annotated[bool | None, Doc("the image has been marked corrupt", since="2.2")] = None
    refcount_bits: Annotated[int, Doc("width of a reference count", since="2.3")]
    encrypt: Annotated[ImageInfoSpecificQCow2Encryption | None, Doc("how it is encrypted", since="2.10")] = None
    bitmaps: Annotated[list[Qcow2BitmapInfo] | None, Doc("the persistent bitmaps", since="4.0")] = None
    compression_type: Annotated[Qcow2CompressionType, Doc("what clusters are compressed with", since="5.1")]


_Specific = Annotated[ImageInfoSpecific, Form.WRAPPED]


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
    snapshots: Annotated[list[SnapshotInfo] | None, Doc("the internal snapshots")] = None
    format_specific: Annotated[_Specific | None, Doc("what only this format has", since="1.7")] = None
    backing_image: Annotated["ImageInfo | None", Doc("the backing image")] = None
