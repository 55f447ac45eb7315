"""The first cluster of a qcow2 image: the header's fields, its extensions and the name of the backing file.

`Header.parse` trusts nothing: what it returns has been checked and bounded, and what it refuses it refuses before
anything was allocated or written. `Header.build` applies the same checks, so that we write nothing that we would not
open. Specification: "Header" in QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from enum import KEEP, IntEnum, IntFlag
from typing import Final

from blkferry.drivers.qcow2.checks import (
    MAX_L1_SIZE,
    MAX_OFFSET,
    check_table,
    corrupt,
    decode,
    encode,
    unsupported,
)
from blkferry.drivers.qcow2.extensions import (
    KNOWN,
    BitmapsExtension,
    EncryptionPointer,
    Extensions,
    FeatureName,
    feature_names_in,
    unsupported_features,
)
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

MAGIC: Final = b"QFI\xfb"
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21  # QEMU's
MAX_REFCOUNT_ORDER: Final = 6
MAX_REFCOUNT_TABLE_SIZE: Final = 8 << 20  # bytes, QEMU's
MAX_SNAPSHOTS: Final = 65536
MAX_BACKING_FILE: Final = 1023  # bytes
SUBCLUSTERS: Final = 32
SNAPSHOT_ENTRY_SIZE: Final = 40  # bytes; what an entry of the snapshot table has at least

_STRUCTURE: Final = "header"
_COMMON: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # all of version 2
_VERSION_3: Final = struct.Struct(">QQQII")  # feature bits three times, refcount_order, header_length
_COMPRESSION_TYPE: Final = _COMMON.size + _VERSION_3.size  # offset of the only field that may be missing
_UNKNOWN: Final = _COMPRESSION_TYPE + 1  # offset; fields to come may fall into today's padding

# Fields that are changed in place. Those that must change together stand together, within one sector.
SIZE_AT: Final = 24
L1_TABLE_AT: Final = 36
REFCOUNT_TABLE_AT: Final = 48
SNAPSHOTS_AT: Final = 60
INCOMPATIBLE_AT: Final = 72
COMPATIBLE_AT: Final = 80
AUTOCLEAR_AT: Final = 88


class Incompatible(IntFlag, boundary=KEEP):
    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag, boundary=KEEP):
    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag, boundary=KEEP):
    BITMAPS = 1
    DATA_FILE_RAW = 2


class CryptMethod(IntEnum):
    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    ZLIB = 0
    ZSTD = 1


def pack_size(size: int) -> bytes:
    """What to write at SIZE_AT."""
    return struct.pack(">Q", size)


def pack_l1_table(l1_size: int, l1_table_offset: int) -> bytes:
    """What to write at L1_TABLE_AT."""
    return struct.pack(">IQ", l1_size, l1_table_offset)


def pack_refcount_table(offset: int, clusters: int) -> bytes:
    """What to write at REFCOUNT_TABLE_AT."""
    return struct.pack(">QI", offset, clusters)


def pack_snapshots(nb_snapshots: int, snapshots_offset: int) -> bytes:
    """What to write at SNAPSHOTS_AT."""
    return struct.pack(">IQ", nb_snapshots, snapshots_offset)


def pack_features(features: Incompatible | Compatible | Autoclear) -> bytes:
    """What to write at INCOMPATIBLE_AT, COMPATIBLE_AT or AUTOCLEAR_AT of a version 3 header."""
    return struct.pack(">Q", features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All that the first cluster says. New images want `feature_names=default_feature_names(version, cluster_bits)`.

    `bitmaps` may be there without Autoclear.BITMAPS: it is then stale and unchecked. `unknown_fields` are the bytes
    behind compression_type, without zeroes at their end: a zero field and one that is not there mean the same.
    """

    version: int = 3
    cluster_bits: int = 16
    size: int
    crypt_method: CryptMethod = CryptMethod.NONE
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible(0)  # noqa: RUF009 - flags are immutable
    compatible: Compatible = Compatible(0)  # noqa: RUF009
    autoclear: Autoclear = Autoclear(0)  # noqa: RUF009
    refcount_order: int = 4
    compression_type: CompressionType = CompressionType.ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    feature_names: tuple[FeatureName, ...] = ()
    bitmaps: BitmapsExtension | None = None
    encryption: EncryptionPointer | None = None
    unknown_fields: bytes = b""
    unknown_extensions: tuple[tuple[int, bytes], ...] = ()

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        return Incompatible.EXTENDED_L2 in self.incompatible

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries per L2 table, which is one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def subclusters(self) -> int:
        """Subclusters per cluster."""
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        return self.cluster_size // self.subclusters

    @property
    def l1_entries_needed(self) -> int:
        """Entries of the L1 table that describe `size` bytes. Those behind them describe VM state."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    @property
    def header_length(self) -> int:
        """What `build` writes; a header that was parsed may have been shorter or longer by fields that are zero."""
        return _COMMON.size if self.version == 2 else align_up(_UNKNOWN + len(self.unknown_fields), 8)

    @staticmethod
    def cluster_bits_of(head: bytes) -> int:
        """The cluster size that the first 24 bytes (or more) of an image speak of: so much must be read to parse it."""
        if len(head) < 24 or not head.startswith(MAGIC):
            raise corrupt("Image is not in qcow2 format", structure=_STRUCTURE, offset=0)
        version = int.from_bytes(head[4:8], "big")
        if version not in {2, 3}:
            raise unsupported(f"Unsupported qcow2 version {version}", structure=_STRUCTURE, offset=4)
        cluster_bits = int.from_bytes(head[20:24], "big")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise unsupported(f"Unsupported cluster size: 2^{cluster_bits}", structure=_STRUCTURE, offset=20)
        return cluster_bits

    @classmethod
    def parse(cls, data: bytes, *, file_size: int | None = None) -> Header:
        """The header in the first cluster of an image.

        What `data` is too short for reads as zeroes, as it does for QEMU. With `file_size`, tables must begin inside.
        """
        cluster_bits = cls.cluster_bits_of(data)
        cluster_size = 1 << cluster_bits
        data = data[:cluster_size].ljust(cluster_size, b"\0")
        fields = iter(_COMMON.unpack_from(data))
        _, version, backing_at, backing_length, _, size, crypt_method = itertools.islice(fields, 7)
        l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_at = fields
        incompatible, compatible, autoclear, refcount_order, length = 0, 0, 0, 4, _COMMON.size
        compression_type, unknown_fields = 0, b""
        if version == 3:
            incompatible, compatible, autoclear, refcount_order, length = _VERSION_3.unpack_from(data, _COMMON.size)
            _check_length(length, cluster_size)
            if length > _COMPRESSION_TYPE:
                compression_type = data[_COMPRESSION_TYPE]
                unknown_fields = data[_UNKNOWN:length].rstrip(b"\0")
        if backing_at and not length <= backing_at <= cluster_size:
            hint = f"it is {backing_at:#x}; the name must be between {length:#x} and {cluster_size:#x}"
            raise corrupt("Invalid backing file offset", structure=_STRUCTURE, offset=8, hint=hint)
        end = backing_at or cluster_size
        if unknown := incompatible & ~_SUPPORTED:
            raise unsupported_features(unknown, feature_names_in(data, length, end))
        extensions = Extensions.parse(data, length, end, bitmaps_consistent=bool(autoclear & Autoclear.BITMAPS))
        header = cls(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=_crypt_method(crypt_method),
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            nb_snapshots=nb_snapshots,
            snapshots_offset=snapshots_at,
            incompatible=Incompatible(incompatible),
            compatible=Compatible(compatible),
            autoclear=Autoclear(autoclear),
            refcount_order=refcount_order,
            compression_type=_compression_type(compression_type),
            backing_file=_backing_file(data, backing_at, backing_length) if backing_at else None,
            backing_format=extensions.backing_format,
            data_file=extensions.data_file,
            feature_names=extensions.feature_names,
            bitmaps=extensions.bitmaps,
            encryption=extensions.encryption,
            unknown_fields=unknown_fields,
            unknown_extensions=extensions.unknown,
        )
        header.check()
        if file_size is not None:
            header._check_inside(file_size)
        return header

    def build(self) -> bytes:
        """The first cluster up to the end of the backing file's name; zeroes follow.

        Raises Error with NO_SPACE if it does not fit into a cluster.
        """
        self.check()
        fields = self._build_version_3() if self.version == 3 else b""
        extensions = Extensions(
            backing_format=self.backing_format,
            data_file=self.data_file,
            encryption=self.encryption,
            feature_names=self.feature_names,
            bitmaps=self.bitmaps,
            unknown=self.unknown_extensions,
        ).build()
        name = encode(self.backing_file, "Backing file name") if self.backing_file is not None else b""
        if len(name) > MAX_BACKING_FILE:
            hint = f"it has {len(name)} bytes, at most {MAX_BACKING_FILE} are allowed"
            raise Error(ErrorKind.INVALID_ARGUMENT, "Backing file name too long", hint=hint)
        backing_at = self.header_length + len(extensions)
        if backing_at + len(name) > self.cluster_size:
            raise Error(
                ErrorKind.NO_SPACE,
                f"The header of {backing_at + len(name)} bytes does not fit into a cluster of {self.cluster_size}",
                hint="give the backing or data file a shorter name, or the image larger clusters",
                structure=_STRUCTURE,
                offset=0,
            )
        common = _COMMON.pack(
            *(MAGIC, self.version, backing_at if name else 0, len(name), self.cluster_bits, self.size),
            *(self.crypt_method, self.l1_size, self.l1_table_offset),
            *(self.refcount_table_offset, self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset),
        )
        return common + fields + extensions + name

    def _build_version_3(self) -> bytes:
        features = (self.incompatible, self.compatible, self.autoclear)
        known = _VERSION_3.pack(*features, self.refcount_order, self.header_length) + bytes([self.compression_type])
        return (known + self.unknown_fields).ljust(self.header_length - _COMMON.size, b"\0")

    def check(self) -> None:
        """Refuse what fields and extensions must not say, alone or together."""
        self._check_features()
        self._check_tables()
        self._check_data_file()
        if self.encryption is not None:
            if self.crypt_method != CryptMethod.LUKS:
                sentence = "CRYPTO header extension only expected with LUKS encryption method"
                raise corrupt(sentence, structure=_STRUCTURE, offset=32)
            self.encryption.check(self.cluster_size)
        elif self.crypt_method == CryptMethod.LUKS:
            sentence = f"Missing CRYPTO header for crypt method {self.crypt_method}"
            raise corrupt(sentence, structure=_STRUCTURE, offset=32)
        if Autoclear.BITMAPS in self.autoclear:
            if self.bitmaps is None:
                sentence = "Bitmaps extension is missing, although the autoclear feature bit says that it is consistent"
                raise corrupt(sentence, structure=_STRUCTURE, offset=AUTOCLEAR_AT)
            self.bitmaps.check(self.cluster_size)
        if self.unknown_fields.endswith(b"\0") or not KNOWN.isdisjoint(kind for kind, _ in self.unknown_extensions):
            raise Error(ErrorKind.INVALID_ARGUMENT, "What is kept of an unknown header is not in its normal form")

    def _check_features(self) -> None:
        if self.version == 2 and (
            self.incompatible or self.compatible or self.autoclear or self.unknown_fields or self.refcount_order != 4
        ):
            raise Error(ErrorKind.INVALID_ARGUMENT, "A qcow2 version 2 image has no features and 16 bit refcounts")
        if unknown := self.incompatible & ~_SUPPORTED:
            raise unsupported_features(unknown, self.feature_names)
        if (self.compression_type != CompressionType.ZLIB) != (Incompatible.COMPRESSION in self.incompatible):
            must = "must not" if self.compression_type == CompressionType.ZLIB else "must"
            sentence = f"qcow2: Compression type incompatible feature bit {must} be set"
            raise corrupt(sentence, structure=_STRUCTURE, offset=_COMPRESSION_TYPE)
        if self.subcluster_size < 1 << MIN_CLUSTER_BITS:
            hint = f"extended L2 entries need clusters of {SUBCLUSTERS << MIN_CLUSTER_BITS} bytes or more"
            sentence = f"Unsupported subcluster size: {self.subcluster_size}"
            raise unsupported(sentence, structure=_STRUCTURE, offset=20, hint=hint)
        if self.refcount_order > MAX_REFCOUNT_ORDER:
            sentence = "Reference count entry width too large; may not exceed 64 bits"
            raise unsupported(sentence, structure=_STRUCTURE, offset=96, hint=f"it is 2^{self.refcount_order}")

    def _check_tables(self) -> None:
        if self.refcount_table_clusters == 0:
            hint = "the field at 56 is zero"
            sentence = "Image does not contain a reference count table"
            raise corrupt(sentence, structure=_STRUCTURE, offset=REFCOUNT_TABLE_AT + 8, hint=hint)
        check_table(
            "Reference count table",
            offset=self.refcount_table_offset,
            entries=self.refcount_table_clusters,
            entry_size=self.cluster_size,
            limit=MAX_REFCOUNT_TABLE_SIZE,
            cluster_size=self.cluster_size,
        )
        check_table(
            "Snapshot table",
            offset=self.snapshots_offset,
            entries=self.nb_snapshots,
            entry_size=SNAPSHOT_ENTRY_SIZE,
            limit=SNAPSHOT_ENTRY_SIZE * MAX_SNAPSHOTS,
            cluster_size=self.cluster_size,
        )
        check_table(
            "Active L1 table",
            offset=self.l1_table_offset,
            entries=self.l1_size,
            entry_size=8,
            limit=MAX_L1_SIZE,
            cluster_size=self.cluster_size,
        )
        needed = self.l1_entries_needed
        if needed >= 1 << 31 or self.size > MAX_OFFSET:
            sentence = "Image is too big"
            raise unsupported(sentence, structure=_STRUCTURE, offset=SIZE_AT, hint=f"its size is {self.size} bytes")
        if self.l1_size < needed:
            hint = f"it has {self.l1_size} entries, {self.size} bytes need {needed}"
            raise corrupt("L1 table is too small", structure=_STRUCTURE, offset=L1_TABLE_AT, hint=hint)

    def _check_data_file(self) -> None:
        if Autoclear.DATA_FILE_RAW in self.autoclear:
            if Incompatible.DATA_FILE not in self.incompatible:
                raise corrupt("data-file-raw requires a data file", structure=_STRUCTURE, offset=AUTOCLEAR_AT)
            if self.backing_file is not None:
                sentence = "Backing file and data-file-raw cannot be used at the same time"
                raise corrupt(sentence, structure=_STRUCTURE, offset=AUTOCLEAR_AT)

    def _check_inside(self, file_size: int) -> None:
        for label, offset, entries in (
            ("Active L1 table", self.l1_table_offset, self.l1_size),
            ("Reference count table", self.refcount_table_offset, self.refcount_table_clusters),
        ):
            if entries and offset >= file_size:
                sentence = f"{label} at {offset:#x} begins behind the end of the image file ({file_size} bytes)"
                raise corrupt(sentence, structure=label.lower(), offset=offset, hint="the file may have been cut off")


_SUPPORTED: Final = sum(Incompatible)


def _check_length(length: int, cluster_size: int) -> None:
    if length < _COMPRESSION_TYPE:
        sentence, hint = "qcow2 header too short", f"it has {length} bytes, version 3 needs {_COMPRESSION_TYPE}"
    elif length > cluster_size:
        sentence, hint = "qcow2 header exceeds cluster size", f"it has {length} bytes"
    elif length % 8:
        sentence, hint = f"qcow2 header length {length} is not a multiple of 8", ""
    else:
        return
    raise corrupt(sentence, structure=_STRUCTURE, offset=100, hint=hint)


def _crypt_method(number: int) -> CryptMethod:
    try:
        return CryptMethod(number)
    except ValueError:
        sentence = f"Unsupported encryption method {number}"
        raise unsupported(sentence, structure=_STRUCTURE, offset=32) from None


def _compression_type(number: int) -> CompressionType:
    try:
        return CompressionType(number)
    except ValueError:
        sentence = f"qcow2: unknown compression type: {number}"
        raise unsupported(sentence, structure=_STRUCTURE, offset=_COMPRESSION_TYPE) from None


def _backing_file(data: bytes, offset: int, length: int) -> str | None:
    if length > min(MAX_BACKING_FILE, len(data) - offset):
        hint = f"it has {length} bytes at {offset:#x}; it may have {MAX_BACKING_FILE} and must end with the cluster"
        raise corrupt("Backing file name too long", structure=_STRUCTURE, offset=16, hint=hint)
    return decode(data[offset : offset + length]) or None
