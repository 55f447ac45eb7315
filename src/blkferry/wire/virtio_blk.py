"""virtio-blk: features, configuration space and requests (virtio 1.3, section 5.2)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

DEVICE_ID: Final = 2

SECTOR: Final = 512
"""The unit of the protocol, whatever the logical block size."""

ID_BYTES: Final = 20
"""Length of the identity that GET_ID asks for; NUL-padded if shorter."""


class Feature(enum.IntFlag):
    """Feature bits of block devices (section 5.2.3)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16
    ZONED = 1 << 17


class Type(enum.IntEnum):
    """Types of request (section 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


BARRIER: Final = 1 << 31
"""An obsolete bit of the type, which means nothing."""


class Status(enum.IntEnum):
    """The last byte of every request (section 5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


HEADER: Final = struct.Struct("<IIQ")
"""struct virtio_blk_req up to its data: type, reserved, sector."""


class Segment(NamedTuple):
    """struct virtio_blk_discard_write_zeroes (section 5.2.6): what DISCARD and WRITE_ZEROES are about."""

    sector: int
    sectors: int
    flags: int


SEGMENT: Final = struct.Struct("<QII")

UNMAP: Final = 1
"""The one flag of a WRITE_ZEROES segment: the space may be given back."""


_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3xIII20x4x")
CONFIG_SIZE: Final = _CONFIG.size

CONFIG_WRITEBACK: Final = 32
"""Offset of the one field that a driver may write, one byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """struct virtio_blk_config (section 5.2.4). Geometry and zones, which nobody offers, are left out."""

    SIZE: ClassVar[int] = CONFIG_SIZE

    capacity: int
    """In sectors, as all that is called so."""
    size_max: int = 0
    seg_max: int
    blk_size: int
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 1
    opt_io_size: int = 1
    writeback: bool
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: bool
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0

    def build(self) -> bytes:
        return _CONFIG.pack(
            self.capacity,
            self.size_max,
            self.seg_max,
            *(0, 0, 0),
            self.blk_size,
            self.physical_block_exp,
            self.alignment_offset,
            self.min_io_size,
            self.opt_io_size,
            self.writeback,
            self.num_queues,
            self.max_discard_sectors,
            self.max_discard_seg,
            self.discard_sector_alignment,
            self.max_write_zeroes_sectors,
            self.max_write_zeroes_seg,
            self.write_zeroes_may_unmap,
            self.max_secure_erase_sectors,
            self.max_secure_erase_seg,
            self.secure_erase_sector_alignment,
        )
