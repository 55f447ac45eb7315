"""Making qcow2 images: the options and what they exclude, where everything goes, and the order in which it is written.

A new image has no gaps: header, refcount table, refcount blocks, L1 table, encryption header, then, if it is
preallocated, all L2 tables and all clusters of the disk. The sizes of all of these are known before the first byte is
written. The header is written last, when the rest is on the disk: an image whose making was cut short is not an image.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from blkferry.drivers.qcow2.checks import MAX_L1_SIZE
from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COPIED
from blkferry.drivers.qcow2.extensions import EncryptionPointer, default_feature_names
from blkferry.drivers.qcow2.header import (
    MAX_BACKING_FILE,
    MAX_CLUSTER_BITS,
    MAX_REFCOUNT_TABLE_SIZE,
    MIN_CLUSTER_BITS,
    SUBCLUSTERS,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Header,
    Incompatible,
)
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.measuring import refcount_clusters
from blkferry.drivers.qcow2.refcount_codec import codec
from blkferry.errors import Error, ErrorKind
from blkferry.graph import access
from blkferry.graph.node import Node
from blkferry.units import SECTOR

_PIECE = 1 << 20
"""Tables are written in pieces of about so many bytes, however large they are: what creating an image keeps in memory.
(The L1 table and the refcount table, 32 and 8 MiB at most, are built whole.)"""

_WORDS = codec(6)  # L1, L2 and refcount tables are 64-bit numbers like the widest refcounts

_ALLOCATE_AT_ONCE = 1 << 30  # bytes; between two of these the loop serves others


class Preallocation(enum.StrEnum):
    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSpec:
    """What an image shall be like. `size` in bytes is a multiple of 512.

    `encryption` is None, AES (which needs no header), or makes the LUKS header for a given cluster size.
    `data_file_name` is what the image calls its data file; without it, that is the data file's own name.
    """

    size: int
    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    backing_file: str | None = None
    backing_format: str | None = None
    data_file_name: str | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: CompressionType = CompressionType.ZLIB
    preallocation: Preallocation = Preallocation.OFF
    encryption: Callable[[int], bytes] | Literal[CryptMethod.AES] | None = None

    @property
    def refcount_order(self) -> int:
        return self.refcount_bits.bit_length() - 1

    @property
    def l2_entries(self) -> int:
        """Entries per L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    @property
    def preallocates_data(self) -> bool:
        return self.preallocation in {Preallocation.FALLOC, Preallocation.FULL}

    def check_format(self) -> None:
        """Refuse what an image cannot be, whatever it is for."""
        if self.extended_l2 and self.version < 3:
            raise _invalid(_needs_version_3("Extended L2 entries are"))
        bits = self.cluster_size.bit_length() - 1
        if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS or self.cluster_size != 1 << bits:
            smallest, largest = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS - 10
            raise _invalid(f"Cluster size must be a power of two between {smallest} and {largest}k")
        if self.extended_l2 and self.cluster_size < SUBCLUSTERS << MIN_CLUSTER_BITS:
            smallest = SUBCLUSTERS << MIN_CLUSTER_BITS
            raise _invalid(f"Extended L2 entries are only supported with cluster sizes of at least {smallest} bytes")
        if self.version < 3 and self.lazy_refcounts:
            raise _invalid(_needs_version_3("Lazy refcounts"))
        if not 0 < self.refcount_bits <= 64 or self.refcount_bits & self.refcount_bits - 1:
            raise _invalid("Refcount width must be a power of two and may not exceed 64 bits")
        if self.version < 3 and self.refcount_bits != 16:
            raise _invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or "
                "greater)"
            )
        if self.version < 3 and self.compression_type is not CompressionType.ZLIB:
            raise _invalid(_needs_version_3("Non-zlib compression type is"))

    def check(self, *, has_data_file: bool) -> None:
        """Refuse options that exclude each other, with QEMU's words."""
        if self.size % SECTOR or self.size < 0:
            raise _invalid(f"Image size must be a multiple of {SECTOR} bytes")
        self.check_format()
        if self.backing_file is not None:
            if self.preallocation is not Preallocation.OFF and not self.extended_l2:
                raise _invalid("Backing file and preallocation can only be used at the same time if extended_l2 is on")
            if len(self.backing_file.encode(errors="surrogateescape")) > MAX_BACKING_FILE:
                raise _invalid("Backing file name too long")
        elif self.backing_format is not None:
            raise _invalid("Backing format cannot be used without backing file")
        if self.data_file_raw and not has_data_file:
            raise _invalid("data-file-raw requires data-file")
        if self.data_file_raw and self.backing_file is not None:
            raise _invalid("Backing file and data-file-raw cannot be used at the same time")
        if has_data_file and self.version < 3:
            raise _invalid(_needs_version_3("External data files are"))


def _needs_version_3(what: str) -> str:
    return f"{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)"


def _invalid(sentence: str) -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, sentence)


async def create(file: Node, data_file: Node | None, spec: CreateSpec) -> None:
    """Make `file` an image; what it held before is lost. Raises Error; then `file` holds no image."""
    image = _Image(spec, file, data_file)
    try:
        await image.write()
    except OSError as error:
        raise Error.from_oserror("Could not write the qcow2 image", error, path=file.filename()) from error


class _Image:
    """Where everything goes in a new image, in clusters from its beginning."""

    def __init__(self, spec: CreateSpec, file: Node, data_file: Node | None) -> None:
        spec.check(has_data_file=data_file is not None)
        self.spec = spec
        self.file = file
        self.host = HostFile(file)
        self.data_file = data_file
        self.cluster_size = spec.cluster_size
        self.preallocated = spec.preallocation is not Preallocation.OFF or spec.data_file_raw
        # Made first, because it may be refused.
        self.luks = (
            b""
            if spec.encryption is None or isinstance(spec.encryption, CryptMethod)
            else spec.encryption(spec.cluster_size)
        )
        self.guest_clusters = self._clusters(spec.size)
        self.l1_size = -(-self.guest_clusters // spec.l2_entries)
        if self.l1_size * 8 > MAX_L1_SIZE:
            raise Error(
                ErrorKind.NO_SPACE,
                "Could not resize image: Failed to grow the L1 table: File too large",
                hint="Use larger clusters, or a smaller size.",
                size=spec.size,
            )
        self.l2_tables = self.l1_size if self.preallocated else 0
        self.data = self.guest_clusters if self.preallocated and data_file is None else 0
        l1_clusters, luks_clusters = self._clusters(self.l1_size * 8), self._clusters(len(self.luks))
        others = 1 + l1_clusters + luks_clusters + self.l2_tables + self.data
        self.refcounts = refcount_clusters(others, spec.cluster_size, spec.refcount_order)
        if self.refcounts.table * spec.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise Error(
                ErrorKind.NO_SPACE,
                "Could not resize image: Failed to resize refcount structures: File too large",
                hint="Use larger clusters, a smaller size or no preallocation.",
                size=spec.size,
            )
        self.l1 = 1 + sum(self.refcounts)
        self.luks_at = self.l1 + l1_clusters
        self.l2 = self.luks_at + luks_clusters
        self.data_at = self.l2 + self.l2_tables
        self.end = self.data_at + self.data
        self.header = self._header().build()

    def _clusters(self, length: int) -> int:
        return -(-length // self.cluster_size)

    def _header(self) -> Header:
        spec = self.spec
        incompatible, autoclear = Incompatible(0), Autoclear(0)
        if self.data_file is not None:
            incompatible |= Incompatible.DATA_FILE
            autoclear |= Autoclear.DATA_FILE_RAW if spec.data_file_raw else Autoclear(0)
        if spec.compression_type is not CompressionType.ZLIB:
            incompatible |= Incompatible.COMPRESSION
        if spec.extended_l2:
            incompatible |= Incompatible.EXTENDED_L2
        cluster_bits = spec.cluster_size.bit_length() - 1
        method = CryptMethod.LUKS if self.luks else CryptMethod.NONE
        return Header(
            version=spec.version,
            cluster_bits=cluster_bits,
            size=spec.size,
            crypt_method=spec.encryption if isinstance(spec.encryption, CryptMethod) else method,
            l1_size=self.l1_size,
            l1_table_offset=self.l1 * self.cluster_size if self.l1_size else 0,
            refcount_table_offset=self.cluster_size,
            refcount_table_clusters=self.refcounts.table,
            incompatible=incompatible,
            compatible=Compatible.LAZY_REFCOUNTS if spec.lazy_refcounts else Compatible(0),
            autoclear=autoclear,
            refcount_order=spec.refcount_order,
            compression_type=spec.compression_type,
            backing_file=spec.backing_file,
            backing_format=spec.backing_format,
            data_file=spec.data_file_name or self.data_file.filename() if self.data_file is not None else None,
            feature_names=default_feature_names(spec.version, cluster_bits),
            encryption=EncryptionPointer(self.luks_at * self.cluster_size, len(self.luks)) if self.luks else None,
        )

    # Writing ---------------------------------------------------------------------------------------------------

    async def write(self) -> None:
        stale = await self._empty()
        await self._put_all(self.cluster_size, self._refcount_table())
        await self._put_all((1 + self.refcounts.table) * self.cluster_size, self._refcount_blocks())
        await self._put_all(self.l1 * self.cluster_size, self._l1_table())
        if self.luks:
            padding = bytes(-len(self.luks) % self.cluster_size)
            await self.host.put(self.luks_at * self.cluster_size, self.luks + padding)
        await self._put_all(self.l2 * self.cluster_size, self._l2_tables())
        await self._allocate_data(stale=stale)
        await self.file.flush()
        await self.host.put(0, self.header.ljust(self.cluster_size, b"\0"))
        await self.file.flush()

    async def _empty(self) -> bool:
        """Make the file as long as it has to be, without what it held; tells whether some of that may still be there.

        A device keeps its length and its content, except that no image begins there any more.
        """
        length = self.end * self.cluster_size
        await self.file.resize(0)
        stale = self.file.length > 0
        if stale and self.file.length < length:
            raise Error(
                ErrorKind.NO_SPACE,
                f"The image needs {length} bytes, but '{self.file.filename()}' has only {self.file.length}",
            )
        if stale:
            await self.host.put(0, bytes(self.cluster_size))
            await self.file.flush()
        else:
            await self.file.resize(length)
        return stale

    async def _put_all(self, offset: int, pieces: Iterator[bytes]) -> None:
        """Write `pieces` one after the other, a few at once if they are small."""
        waiting = bytearray()
        for piece in pieces:
            waiting += piece
            if len(waiting) >= _PIECE:
                await self.host.put(offset, waiting)
                offset += len(waiting)
                waiting = bytearray()
        await self.host.put(offset, waiting)

    def _refcount_table(self) -> Iterator[bytes]:
        first = 1 + self.refcounts.table
        blocks = self._offsets(first, first + self.refcounts.blocks)
        yield _WORDS.dump(blocks).ljust(self.refcounts.table * self.cluster_size, b"\0")

    def _refcount_blocks(self) -> Iterator[bytes]:
        """Every cluster of a new image is used once."""
        form = codec(self.spec.refcount_order)
        per_block = form.entries(self.cluster_size)
        ones = form.new(per_block)
        for index in range(per_block):
            ones[index] = 1
        full = form.dump(ones)
        used = self.end % per_block or per_block
        for index in range(used, per_block):
            ones[index] = 0
        for _ in range(self.refcounts.blocks - 1):
            yield full
        yield form.dump(ones)

    def _l1_table(self) -> Iterator[bytes]:
        if self.l2_tables:
            table = _WORDS.dump(self._offsets(self.l2, self.l2 + self.l2_tables, COPIED))
        else:
            table = bytes(self.l1_size * 8)
        yield table.ljust((self.luks_at - self.l1) * self.cluster_size, b"\0")

    def _l2_tables(self) -> Iterator[bytes]:
        per_table = self.spec.l2_entries
        first = self.data_at if self.data_file is None else 0  # places in a data file are guest offsets
        # Subclusters that are only preallocated let the backing file show through. In a raw data file all is data.
        bitmap = ALL_ALLOCATED if self.spec.data_file_raw else 0
        for table in range(self.l2_tables):
            start = table * per_table
            end = min(start + per_table, self.guest_clusters)
            entries = self._offsets(first + start, first + end, COPIED)
            if self.spec.extended_l2:
                pairs = array("Q", [bitmap]) * (2 * len(entries))
                pairs[0::2] = entries
                entries = pairs
            yield _WORDS.dump(entries).ljust(self.cluster_size, b"\0")

    def _offsets(self, first: int, end: int, flags: int = 0) -> array[int]:
        """The offsets of these clusters."""
        return array("Q", range(flags + first * self.cluster_size, flags + end * self.cluster_size, self.cluster_size))

    async def _allocate_data(self, *, stale: bool) -> None:
        """Do what preallocation promises for the bytes of the disk, and size the data file."""
        if self.data_file is not None:
            # An old data file keeps its content where only metadata is made: that is how one becomes an image.
            if not self.preallocated or self.data_file.length < self.spec.size:
                await self.data_file.resize(self.spec.size)
            await self._allocate(self.data_file, 0, self.spec.size, stale=False)
            await self.data_file.flush()
        else:
            await self._allocate(
                self.file, self.data_at * self.cluster_size, self.data * self.cluster_size, stale=stale
            )

    async def _allocate(self, node: Node, start: int, length: int, *, stale: bool) -> None:
        end = start + length
        match self.spec.preallocation:
            case Preallocation.FULL:
                zeroes = memoryview(bytes(_PIECE))
                for at in range(start, end, _PIECE):
                    await access.write(node, at, zeroes[: end - at])
            case Preallocation.FALLOC:
                for at in range(start, end, _ALLOCATE_AT_ONCE):
                    await access.write_zeroes(node, at, min(_ALLOCATE_AT_ONCE, end - at), unmap=False)
            case Preallocation.OFF | Preallocation.METADATA if stale and length:
                await access.write_zeroes(node, start, length, unmap=True)
            case Preallocation.OFF | Preallocation.METADATA:
                pass
