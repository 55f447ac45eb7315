"""Compressed clusters: deflate without headers, or zstd (qcow2.rst, `compression_type`).

All of it is plain calls that let other threads run meanwhile; who has a large cluster calls them in a thread.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any

from blkferry.drivers.qcow2.header import CompressionType
from blkferry.errors import Error, ErrorKind

_DEFLATE_WINDOW = -12
"""QEMU inflates with a window of 4 KiB, so that is what we compress with."""


class BadCompression(Exception):  # noqa: N818 - a finding, which the caller gives a place
    """The compressed bytes do not make a cluster."""


def require(kind: CompressionType) -> None:
    """Raise Error(UNSUPPORTED) where the library for this compression is not installed."""
    if kind is CompressionType.ZSTD:
        _zstd()


def decompress(kind: CompressionType, data: bytes | bytearray, size: int) -> bytes:
    """The cluster of `size` bytes that `data` begins with; what follows it is ignored. Raises BadCompression."""
    if kind is CompressionType.ZSTD:
        return _decompress_zstd(data, size)
    try:
        found = zlib.decompressobj(-15).decompress(data, size)
    except zlib.error as error:
        raise BadCompression(str(error)) from error
    if len(found) != size:
        raise BadCompression(f"only {len(found)} of {size} bytes")
    return found


def compress(kind: CompressionType, data: bytes | bytearray | memoryview) -> bytes | None:
    """`data`, a whole cluster, in fewer bytes; None when it does not get smaller."""
    if kind is CompressionType.ZSTD:
        found: bytes = _zstd().compress(data)
    else:
        stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _DEFLATE_WINDOW, 9)
        found = stream.compress(data) + stream.flush()
    return found if len(found) < len(data) else None


def _decompress_zstd(data: bytes | bytearray, size: int) -> bytes:
    zstd = _zstd()
    found = bytearray()
    rest = bytes(data)
    try:
        while len(found) < size and rest:  # a cluster may be several frames
            stream = zstd.ZstdDecompressor()
            found += stream.decompress(rest, size - len(found))
            if not stream.eof:
                break
            rest = stream.unused_data
    except zstd.ZstdError as error:
        raise BadCompression(str(error)) from error
    if len(found) != size:
        raise BadCompression(f"only {len(found)} of {size} bytes")
    return bytes(found)


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Error(
        ErrorKind.UNSUPPORTED,
        "Clusters compressed with zstd need a library that is not installed",
        hint="pip install 'blkferry[zstd]'",
    )
