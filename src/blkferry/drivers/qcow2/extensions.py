"""Header extensions of qcow2: the typed records between the header's fields and the backing file's name.

What each record holds is checked here; what records and fields say about each other is checked in `header`, which puts
them together. Specification: "Header extensions" in QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from blkferry.drivers.qcow2.checks import MAX_OFFSET, corrupt, decode, encode, printable, unsupported
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

STRUCTURE: Final = "header extension"
MAX_BACKING_FORMAT: Final = 15  # bytes; QEMU keeps it in 16, one of them for the end
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_SIZE: Final = MAX_BITMAPS * 1024  # QEMU's: the longest name and its entry take about that much


class ExtensionType(IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


KNOWN: Final = frozenset(int(kind) for kind in ExtensionType)
_HEAD: Final = struct.Struct(">II")  # type, length of the data


class FeatureKind(IntEnum):
    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


@dataclass(frozen=True, slots=True)
class FeatureName:
    """What a feature bit is called, for programs that do not know it. `kind` may be more than FeatureKind has."""

    kind: int
    bit: int
    name: str

    @classmethod
    def parse(cls, data: bytes) -> FeatureName:
        kind, bit, name = _FEATURE.unpack(data)
        return cls(kind, bit, decode(name))

    def build(self) -> bytes:
        name = encode(self.name, "Feature name")
        if len(name) > _MAX_FEATURE_NAME or not 0 <= self.kind <= 255 or not 0 <= self.bit <= 255:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Feature name of bit {self.bit} does not fit into its table")
        return _FEATURE.pack(self.kind, self.bit, name)


_FEATURE: Final = struct.Struct(">BB46s")
_MAX_FEATURE_NAME: Final = 46

_QEMU_NAMES: Final = (
    FeatureName(FeatureKind.INCOMPATIBLE, 0, "dirty bit"),
    FeatureName(FeatureKind.INCOMPATIBLE, 1, "corrupt bit"),
    FeatureName(FeatureKind.INCOMPATIBLE, 2, "external data file"),
    FeatureName(FeatureKind.INCOMPATIBLE, 3, "compression type"),
    FeatureName(FeatureKind.INCOMPATIBLE, 4, "extended L2 entries"),
    FeatureName(FeatureKind.COMPATIBLE, 0, "lazy refcounts"),
    FeatureName(FeatureKind.AUTOCLEAR, 0, "bitmaps"),
    FeatureName(FeatureKind.AUTOCLEAR, 1, "raw external data"),
)


def default_feature_names(version: int, cluster_bits: int) -> tuple[FeatureName, ...]:
    """The table that QEMU puts into an image: none up to 4 KiB clusters, to leave room for the backing file's name."""
    return _QEMU_NAMES if version >= 3 and cluster_bits > 12 else ()


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is. Only checked, and only to be used, while Autoclear.BITMAPS is set."""

    count: int
    directory_size: int
    directory_offset: int

    def build(self) -> bytes:
        return _BITMAPS.pack(self.count, 0, self.directory_size, self.directory_offset)

    def check(self, cluster_size: int) -> None:
        """Refuse what QEMU refuses while the autoclear bit says that this is consistent."""
        where = self.directory_offset
        if self.count > MAX_BITMAPS:
            raise unsupported(
                f"bitmaps_ext: Image has {self.count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}",
                structure=STRUCTURE,
                offset=where,
            )
        if self.count == 0:
            raise corrupt("found bitmaps extension with zero bitmaps", structure=STRUCTURE, offset=where)
        if self.directory_size > MAX_BITMAP_DIRECTORY_SIZE:
            raise unsupported(
                f"bitmaps_ext: bitmap directory size ({self.directory_size}) exceeds the maximum supported size "
                f"({MAX_BITMAP_DIRECTORY_SIZE})",
                structure=STRUCTURE,
                offset=where,
            )
        if self.directory_size == 0:
            raise corrupt("Requested bitmap directory size is zero", structure=STRUCTURE, offset=where)
        if where % cluster_size or not where or where + self.directory_size > MAX_OFFSET:
            hint = f"it is {where:#x}; it must be a multiple of the cluster size ({cluster_size}) behind the header"
            sentence = "bitmaps_ext: invalid bitmap directory offset"
            raise corrupt(sentence, structure=STRUCTURE, offset=where, hint=hint)


_BITMAPS: Final = struct.Struct(">IIQQ")  # number of bitmaps, reserved, directory size, directory offset


@dataclass(frozen=True, slots=True)
class EncryptionPointer:
    """Where the LUKS header is."""

    offset: int
    length: int

    def build(self) -> bytes:
        return _ENCRYPTION.pack(self.offset, self.length)

    def check(self, cluster_size: int) -> None:
        if self.offset % cluster_size or not self.offset or self.offset + self.length > MAX_OFFSET:
            raise corrupt(
                f"Encryption header offset '{self.offset}' is not a multiple of cluster size '{cluster_size}'"
                if self.offset % cluster_size
                else f"Encryption header of {self.length} bytes at {self.offset:#x} cannot be there",
                structure=STRUCTURE,
                offset=self.offset,
            )


_ENCRYPTION: Final = struct.Struct(">QQ")  # offset, length


class Extension(NamedTuple):
    """One record; `offset` is where its data begins."""

    kind: int
    data: bytes
    offset: int


def split(data: bytes, start: int, end: int) -> Iterator[Extension]:
    """The records of the extension area. It ends with the end marker, or where the backing file's name begins."""
    while start < end:
        body = start + _HEAD.size
        if body > end:
            hint = f"the one at {start:#x} would begin behind {end:#x}, where the area ends"
            raise corrupt("Header extension too large", structure=STRUCTURE, offset=start, hint=hint)
        kind, length = _HEAD.unpack_from(data, start)
        if length > end - body:
            hint = f"the one at {start:#x} (type {kind:#x}) has {length} bytes, but the area ends at {end:#x}"
            raise corrupt("Header extension too large", structure=STRUCTURE, offset=start, hint=hint)
        if kind == ExtensionType.END:
            return
        yield Extension(kind, data[body : body + length], body)
        start = body + align_up(length, 8)


def join(kind: int, data: bytes) -> bytes:
    """One record as it is stored."""
    return _HEAD.pack(kind, len(data)) + data + bytes(-len(data) % 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """All that the extension area says."""

    backing_format: str | None = None
    data_file: str | None = None
    encryption: EncryptionPointer | None = None
    feature_names: tuple[FeatureName, ...] = ()
    bitmaps: BitmapsExtension | None = None
    unknown: tuple[tuple[int, bytes], ...] = ()

    @classmethod
    def parse(cls, data: bytes, start: int, end: int, *, bitmaps_consistent: bool) -> Extensions:
        known: dict[int, Extension] = {}
        unknown = []
        for extension in split(data, start, end):
            kind = extension.kind
            if kind not in KNOWN:
                unknown.append((kind, extension.data))
            elif known.setdefault(kind, extension) is not extension:
                sentence = f"Header extension {ExtensionType(kind).name} at {extension.offset:#x} is there twice"
                raise corrupt(sentence, structure=STRUCTURE, offset=extension.offset)
        return cls(
            backing_format=_backing_format(known.get(ExtensionType.BACKING_FORMAT)),
            data_file=decode(known[ExtensionType.DATA_FILE].data) or None if ExtensionType.DATA_FILE in known else None,
            encryption=_encryption(known.get(ExtensionType.ENCRYPTION)),
            feature_names=_feature_names(known.get(ExtensionType.FEATURE_NAMES)),
            bitmaps=_bitmaps(known.get(ExtensionType.BITMAPS), consistent=bitmaps_consistent),
            unknown=tuple(unknown),
        )

    def build(self) -> bytes:
        """The extension area up to and with its end marker, in QEMU's order."""
        parts = []
        if self.backing_format is not None:
            name = encode(self.backing_format, "Backing file format")
            if len(name) > MAX_BACKING_FORMAT:
                raise Error(ErrorKind.INVALID_ARGUMENT, f"Backing file format '{self.backing_format}' is too long")
            parts.append(join(ExtensionType.BACKING_FORMAT, name))
        if self.data_file is not None:
            parts.append(join(ExtensionType.DATA_FILE, encode(self.data_file, "Data file name")))
        if self.encryption is not None:
            parts.append(join(ExtensionType.ENCRYPTION, self.encryption.build()))
        if self.feature_names:
            parts.append(join(ExtensionType.FEATURE_NAMES, b"".join(name.build() for name in self.feature_names)))
        if self.bitmaps is not None:
            parts.append(join(ExtensionType.BITMAPS, self.bitmaps.build()))
        for kind, data in self.unknown:
            assert kind not in KNOWN
            parts.append(join(kind, data))
        parts.append(join(ExtensionType.END, b""))
        return b"".join(parts)


def feature_names_in(data: bytes, start: int, end: int) -> tuple[FeatureName, ...]:
    """The feature name table of an image that cannot be opened: as much of it as can be found."""
    try:
        for extension in split(data, start, end):
            if extension.kind == ExtensionType.FEATURE_NAMES:
                return _feature_names(extension)
    except Error:  # the sentence to tell is about the feature
        pass
    return ()


def unsupported_features(bits: int, names: tuple[FeatureName, ...]) -> Error:
    """The refusal of incompatible features that we do not have, by the names that the image gives them."""
    found = []
    for name in names:
        if name.kind == FeatureKind.INCOMPATIBLE and bits >> name.bit & 1:
            found.append(printable(name.name))
            bits &= ~(1 << name.bit)
    if bits:
        found.append(f"Unknown incompatible feature: {bits:x}")
    sentence = f"Unsupported qcow2 feature(s): {', '.join(found)}"
    return unsupported(sentence, structure="header", offset=72, hint="a newer program may know them")


def _feature_names(extension: Extension | None) -> tuple[FeatureName, ...]:
    if extension is None:
        return ()
    size = _FEATURE.size
    table = extension.data
    names = (FeatureName.parse(table[at : at + size]) for at in range(0, len(table) - size + 1, size))
    return tuple(name for name in names if name.name)


def _backing_format(extension: Extension | None) -> str | None:
    if extension is None:
        return None
    length = len(extension.data)
    if length > MAX_BACKING_FORMAT:
        sentence = f"ERROR: ext_backing_format: len={length} too large (>={MAX_BACKING_FORMAT + 1})"
        raise corrupt(sentence, structure=STRUCTURE, offset=extension.offset)
    return decode(extension.data) or None


def _encryption(extension: Extension | None) -> EncryptionPointer | None:
    if extension is None:
        return None
    length = len(extension.data)
    if length != _ENCRYPTION.size:
        sentence = f"CRYPTO header extension size {length}, but expected size {_ENCRYPTION.size}"
        raise corrupt(sentence, structure=STRUCTURE, offset=extension.offset)
    return EncryptionPointer(*_ENCRYPTION.unpack(extension.data))


def _bitmaps(extension: Extension | None, *, consistent: bool) -> BitmapsExtension | None:
    if extension is None:
        return None
    if len(extension.data) != _BITMAPS.size:
        hint = f"it has {len(extension.data)} bytes instead of {_BITMAPS.size}"
        sentence = "bitmaps_ext: Invalid extension length"
        raise corrupt(sentence, structure=STRUCTURE, offset=extension.offset, hint=hint)
    count, reserved, size, offset = _BITMAPS.unpack(extension.data)
    if consistent and reserved:
        raise corrupt("bitmaps_ext: Reserved field is not zero", structure=STRUCTURE, offset=extension.offset)
    return BitmapsExtension(count, size, offset)
