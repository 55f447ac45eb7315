"""What queries tell of an image: the parts of ImageInfo that only the format knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blkferry.drivers.qcow2 import snapshots
from blkferry.drivers.qcow2.bitmap_directory import BitmapEntry, BitmapFlags
from blkferry.drivers.qcow2.header import Autoclear, Compatible, CompressionType, CryptMethod, Header, Incompatible
from blkferry.graph.filename import full_path
from blkferry.schema.crypto import (
    ImageInfoSpecificQCow2Encryption,
    ImageInfoSpecificQCow2EncryptionAes,
    ImageInfoSpecificQCow2EncryptionLuks,
    QCryptoBlockInfoLUKSSlot,
    QCryptoCipherAlgo,
    QCryptoCipherMode,
    QCryptoHashAlgo,
    QCryptoIVGenAlgo,
)
from blkferry.schema.image import (
    ImageInfo,
    ImageInfoSpecificQCow2,
    Qcow2BitmapInfo,
    Qcow2BitmapInfoFlags,
    Qcow2CompressionType,
)

if TYPE_CHECKING:
    from blkferry.crypt.luks_layout import Header as LuksHeader
    from blkferry.drivers.qcow2.snapshot_table import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What has been read of an image, opened or not. `data_file` is the name of the file that is used as that."""

    filename: str
    header: Header
    actual_size: int | None
    snapshots: Sequence[Snapshot] = ()
    bitmaps: Sequence[BitmapEntry] = ()
    luks: LuksHeader | None = None
    data_file: str | None = None
    corrupt: bool = False


def image_info(known: Known) -> ImageInfo:
    """All of it as queries tell it, without the backing image."""
    header = known.header
    encrypted = header.crypt_method is not CryptMethod.NONE
    named = header.backing_file
    return ImageInfo(
        filename=known.filename,
        format="qcow2",
        virtual_size=header.size // 512 * 512,
        actual_size=known.actual_size,
        dirty_flag=bool(header.incompatible & Incompatible.DIRTY),
        cluster_size=header.cluster_size,
        encrypted=True if encrypted else None,
        backing_filename=named,
        full_backing_filename=None if named is None else full_path(named, known.filename),
        backing_filename_format=header.backing_format,
        snapshots=[snapshots.info(snapshot) for snapshot in known.snapshots] or None,
        format_specific=_specific(known),
    )


def _specific(known: Known) -> ImageInfoSpecificQCow2:
    header = known.header
    zstd = header.compression_type is CompressionType.ZSTD
    facts: dict[str, Any] = {}
    if header.version >= 3:
        facts = {
            "lazy_refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible & Incompatible.CORRUPT) or known.corrupt,
            "extended_l2": header.extended_l2,
            "bitmaps": _bitmaps(known),
        }
        if header.incompatible & Incompatible.DATA_FILE:
            facts["data_file"] = header.data_file or known.data_file
            facts["data_file_raw"] = bool(header.autoclear & Autoclear.DATA_FILE_RAW)
    return ImageInfoSpecificQCow2(
        compat="1.1" if header.version >= 3 else "0.10",
        refcount_bits=header.refcount_bits,
        encrypt=_encryption(known),
        compression_type=Qcow2CompressionType.ZSTD if zstd else Qcow2CompressionType.ZLIB,
        **facts,
    )


def _bitmaps(known: Known) -> list[Qcow2BitmapInfo] | None:
    return [
        Qcow2BitmapInfo(
            name=entry.name,
            granularity=1 << entry.granularity_bits,
            flags=[
                name
                for flag, name in (
                    (BitmapFlags.IN_USE, Qcow2BitmapInfoFlags.IN_USE),
                    (BitmapFlags.AUTO, Qcow2BitmapInfoFlags.AUTO),
                )
                if entry.flags & flag
            ],
        )
        for entry in known.bitmaps
    ] or None


def _encryption(known: Known) -> ImageInfoSpecificQCow2Encryption | None:
    if known.header.crypt_method is CryptMethod.NONE:
        return None
    return ImageInfoSpecificQCow2EncryptionAes() if known.luks is None else _luks(known.luks)


def _luks(volume: LuksHeader) -> ImageInfoSpecificQCow2EncryptionLuks:
    scheme = volume.scheme
    mode = str(scheme.mode.value)
    bits = volume.key_bytes * (4 if mode == "xts" else 8)
    return ImageInfoSpecificQCow2EncryptionLuks(
        cipher_alg=QCryptoCipherAlgo(f"aes-{bits}"),
        cipher_mode=QCryptoCipherMode(mode),
        ivgen_alg=QCryptoIVGenAlgo(str(scheme.ivgen.value)),
        ivgen_hash_alg=QCryptoHashAlgo(scheme.ivgen_hash) if scheme.ivgen_hash else None,
        hash_alg=QCryptoHashAlgo(volume.hash),
        detached_header=False,
        payload_offset=volume.payload_offset,
        master_key_iters=volume.iterations,
        uuid=volume.uuid,
        slots=[
            QCryptoBlockInfoLUKSSlot(
                active=slot.active,
                iters=slot.iterations if slot.active else None,
                stripes=4000 if slot.active else None,
                key_offset=slot.offset,
            )
            for slot in volume.slots
        ],
    )
