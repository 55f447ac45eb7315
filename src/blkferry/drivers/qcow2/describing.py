"""What queries tell of an image: the parts of ImageInfo that only the format knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blkferry.drivers.qcow2 import snapshots
from blkferry.drivers.qcow2.bitmap_directory import BitmapFlags
from blkferry.drivers.qcow2.header import Autoclear, Compatible, CompressionType, CryptMethod, Incompatible
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
    from blkferry.drivers.qcow2.node import Qcow2


def image_info(node: Qcow2) -> ImageInfo:
    """All that is known of the image, without its backing image."""
    header = node.header
    encrypted = header.crypt_method is not CryptMethod.NONE
    named = header.backing_file
    return ImageInfo(
        filename=node.filename(),
        format=node.driver,
        virtual_size=node.length,
        actual_size=node.allocated_size(),
        dirty_flag=bool(header.incompatible & Incompatible.DIRTY),
        cluster_size=header.cluster_size,
        encrypted=True if encrypted else None,
        backing_filename=named,
        full_backing_filename=None if named is None else full_path(named, node.filename()),
        backing_filename_format=header.backing_format,
        snapshots=[snapshots.info(snapshot) for snapshot in node.snapshots] or None,
        format_specific=_specific(node),
    )


def _specific(node: Qcow2) -> ImageInfoSpecificQCow2:
    header = node.header
    zstd = header.compression_type is CompressionType.ZSTD
    facts: dict[str, Any] = {}
    if header.version >= 3:
        facts = {
            "lazy_refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible & Incompatible.CORRUPT) or node.corrupt,
            "extended_l2": header.extended_l2,
            "bitmaps": _bitmaps(node),
        }
        if node.data_file is not None:
            facts["data_file"] = header.data_file or node.data_file.node.filename()
            facts["data_file_raw"] = bool(header.autoclear & Autoclear.DATA_FILE_RAW)
    return ImageInfoSpecificQCow2(
        compat="1.1" if header.version >= 3 else "0.10",
        refcount_bits=header.refcount_bits,
        encrypt=_encryption(node),
        compression_type=Qcow2CompressionType.ZSTD if zstd else Qcow2CompressionType.ZLIB,
        **facts,
    )


def _bitmaps(node: Qcow2) -> list[Qcow2BitmapInfo] | None:
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
        for entry in node.bitmaps.entries
    ] or None


def _encryption(node: Qcow2) -> ImageInfoSpecificQCow2Encryption | None:
    if node.header.crypt_method is CryptMethod.NONE:
        return None
    return ImageInfoSpecificQCow2EncryptionAes() if node.luks is None else _luks(node.luks)


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
