"""The ioctls of /dev/vduse/control and /dev/vduse/NAME, and what they carry (Linux include/uapi/linux/vduse.h).

Integers are in the machine's byte order. The numbers are those of the generic ABI, which all machines have that Linux
has grown on lately (x86, ARM, RISC-V, s390, LoongArch). What `parse` reads comes from the kernel and is as long as the
ioctl's number says.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

API_VERSION: Final = 0
"""The version that we speak. Version 1 adds address spaces for groups of virtqueues, of no use to a disk."""

NAME_SIZE: Final = 256
"""Bytes of a device's name with the NUL at its end (VDUSE_NAME_MAX)."""

ALIGNMENT: Final = 4096
"""Of the parts of virtqueues in memory; the kernel takes up to a page."""

_VERSION = struct.Struct("=Q")
_INDEX = struct.Struct("=I")
_DEVICE_CONFIG = struct.Struct("=256sIIQII52xI")
_IOTLB_ENTRY = struct.Struct("=QQQB7x")
_CONFIG_DATA = struct.Struct("=II")
_QUEUE_CONFIG = struct.Struct("=IH26x")
_QUEUE_INFO = struct.Struct("=IIQQQH6xB7x")
_QUEUE_EVENTFD = struct.Struct("=Ii")

_NONE, _WRITE, _READ = 0, 1, 2
_BASE = 0x81


def _number(direction: int, number: int, size: int) -> int:
    """The macros _IO, _IOR, _IOW and _IOWR of include/uapi/asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | _BASE << 8 | number


class Ioctl(enum.IntEnum):
    """Requests of ioctl(2): the first four are the control device's, the others a device's."""

    GET_API_VERSION = _number(_READ, 0x00, _VERSION.size)
    SET_API_VERSION = _number(_WRITE, 0x01, _VERSION.size)
    CREATE_DEV = _number(_WRITE, 0x02, _DEVICE_CONFIG.size)
    DESTROY_DEV = _number(_WRITE, 0x03, NAME_SIZE)

    IOTLB_GET_FD = _number(_READ | _WRITE, 0x10, _IOTLB_ENTRY.size)
    DEV_GET_FEATURES = _number(_READ, 0x11, _VERSION.size)
    DEV_SET_CONFIG = _number(_WRITE, 0x12, _CONFIG_DATA.size)
    DEV_INJECT_CONFIG_IRQ = _number(_NONE, 0x13, 0)
    VQ_SETUP = _number(_WRITE, 0x14, _QUEUE_CONFIG.size)
    VQ_GET_INFO = _number(_READ | _WRITE, 0x15, _QUEUE_INFO.size)
    VQ_SETUP_KICKFD = _number(_WRITE, 0x16, _QUEUE_EVENTFD.size)
    VQ_INJECT_IRQ = _number(_WRITE, 0x17, _INDEX.size)


class Access(enum.IntFlag):
    """What may be done with a region of memory."""

    READ = 1
    WRITE = 2


def build_version(version: int) -> bytes:
    """For SET_API_VERSION."""
    return _VERSION.pack(version)


def parse_features(data: bytes | bytearray) -> int:
    """Of DEV_GET_FEATURES: what the driver has accepted; 0 before it has."""
    (features,) = _VERSION.unpack(data)
    return int(features)


def build_name(name: str) -> bytes:
    """For DESTROY_DEV."""
    return name.encode().ljust(NAME_SIZE, b"\0")


def build_index(index: int) -> bytes:
    """For VQ_INJECT_IRQ."""
    return _INDEX.pack(index)


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What a device is made with (CREATE_DEV). `name` is at most 255 bytes, `config` the configuration space."""

    name: str
    vendor_id: int
    device_id: int
    features: int
    queues: int
    config: bytes

    def build(self) -> bytes:
        head = _DEVICE_CONFIG.pack(
            self.name.encode(),
            self.vendor_id,
            self.device_id,
            self.features,
            self.queues,
            ALIGNMENT,
            len(self.config),
        )
        return head + self.config


@dataclass(frozen=True, slots=True)
class IotlbEntry:
    """A region of the device's address space (IOTLB_GET_FD), both ends inclusive; it begins at `offset` of a file."""

    SIZE: ClassVar[int] = _IOTLB_ENTRY.size

    offset: int
    start: int
    last: int
    access: Access

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Self:
        offset, start, last, access = _IOTLB_ENTRY.unpack(data)
        return cls(offset, start, last, Access(access & (Access.READ | Access.WRITE)))

    @staticmethod
    def ask(address: int) -> bytearray:
        """What asks for the region with this address; the answer comes in its place."""
        return bytearray(_IOTLB_ENTRY.pack(0, address, address, 0))


def build_config_data(offset: int, data: bytes) -> bytes:
    """For DEV_SET_CONFIG: bytes of the configuration space from `offset`."""
    return _CONFIG_DATA.pack(offset, len(data)) + data


def build_queue_config(index: int, size: int) -> bytes:
    """For VQ_SETUP: a virtqueue may have up to `size` entries."""
    return _QUEUE_CONFIG.pack(index, size)


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A virtqueue as the driver has set it up (VQ_GET_INFO).

    `size` is in entries, addresses are the device's; `avail_index` is where a split ring begins.
    """

    index: int
    size: int
    descriptor_area: int
    driver_area: int
    device_area: int
    avail_index: int
    ready: bool

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Self:
        index, size, descriptors, driver, device, avail_index, ready = _QUEUE_INFO.unpack(data)
        return cls(index, size, descriptors, driver, device, avail_index, bool(ready))

    @staticmethod
    def ask(index: int) -> bytearray:
        """What asks for a virtqueue; the answer comes in its place."""
        return bytearray(_QUEUE_INFO.pack(index, 0, 0, 0, 0, 0, 0))


NO_EVENTFD: Final = -1


def build_queue_eventfd(index: int, fd: int) -> bytes:
    """For VQ_SETUP_KICKFD: where the driver's notifications go; NO_EVENTFD is nowhere."""
    return _QUEUE_EVENTFD.pack(index, fd)
