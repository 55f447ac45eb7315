"""What messages carry: layouts, and values that are checked as far as they can be without knowing the device.

All numbers are in the machine's own byte order ("Message Specification").
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, Self

from blkferry.errors import Error, ErrorKind
from blkferry.wire.vhost_user.constants import MAX_TABLE_REGIONS, MAX_VRINGS, VringFlag

END: Final = 1 << 64
"""Addresses are below this."""

NUMBER: Final = struct.Struct("=Q")
STATE: Final = struct.Struct("=II")
ADDRESSES: Final = struct.Struct("=IIQQQQ")
REGION: Final = struct.Struct("=QQQQ")
TABLE: Final = struct.Struct("=II")
SINGLE: Final = struct.Struct("=QQQQQ")  # padding first
LOG: Final = struct.Struct("=QQ")
CONFIG: Final = struct.Struct("=III")
INFLIGHT: Final = struct.Struct("=QQHH")
INFLIGHT_PADDED: Final = INFLIGHT.size + 4  # as compilers have it; the specification has 20 bytes
NO_FD: Final = 1 << 8


class ProtocolError(Error):
    """The peer sent what no vhost-user front end may send: its connection must end."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.CORRUPT, message)


class U64(NamedTuple):
    """A single 64-bit integer."""

    value: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*NUMBER.unpack(data))

    def build(self) -> bytes:
        return NUMBER.pack(*self)


class VringFd(NamedTuple):
    """The u64 of SET_VRING_KICK, _CALL and _ERR: which vring, and whether a descriptor comes with it."""

    vring: int
    has_fd: bool

    @classmethod
    def parse(cls, data: bytes) -> Self:
        (value,) = NUMBER.unpack(data)
        if value & ~(NO_FD | (MAX_VRINGS - 1)):
            raise ProtocolError(f"{value:#x} is no vring's index and flag")
        return cls(value & (MAX_VRINGS - 1), not value & NO_FD)

    def build(self) -> bytes:
        return NUMBER.pack(self.vring | (0 if self.has_fd else NO_FD))


class VringState(NamedTuple):
    """A vring state description: the number is a size, an index or a switch, as the message has it."""

    vring: int
    num: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*STATE.unpack(data))

    def build(self) -> bytes:
        return STATE.pack(*self)


class VringAddr(NamedTuple):
    """A vring address description: user addresses, and the guest address under which the used ring is logged."""

    vring: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        found = cls(*ADDRESSES.unpack(data))
        if found.flags & ~int(VringFlag.LOG):
            raise ProtocolError(f"vring {found.vring} has flags {found.flags:#x}")
        return found

    def build(self) -> bytes:
        return ADDRESSES.pack(*self)


class MemoryRegion(NamedTuple):
    """One region: where the guest has it, where the front end has it, and where it is in its descriptor. In bytes."""

    guest_start: int
    length: int
    user_start: int
    mmap_offset: int

    def check(self) -> Self:
        """Raises ProtocolError when it is empty, or ends beyond what an address can say."""
        if not self.length:
            raise ProtocolError(f"the memory region at {self.guest_start:#x} is empty")
        if max(self.guest_start, self.user_start, self.mmap_offset) + self.length > END:
            raise ProtocolError(f"the memory region at {self.guest_start:#x} of {self.length:#x} bytes overflows")
        return self


class MemoryTable(NamedTuple):
    """Memory regions description: all regions there are. One descriptor comes for each."""

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < TABLE.size:
            raise ProtocolError(f"a memory table has {len(data)} bytes")
        count, _padding = TABLE.unpack_from(data)
        if count > MAX_TABLE_REGIONS:
            raise ProtocolError(f"a memory table has {count} regions, more than {MAX_TABLE_REGIONS}")
        size = REGION.size
        if len(data) != TABLE.size + count * size:
            raise ProtocolError(f"a memory table of {count} regions has {len(data)} bytes")
        rest = data[TABLE.size :]
        return cls(tuple(MemoryRegion(*fields).check() for fields in REGION.iter_unpack(rest)))

    def build(self) -> bytes:
        regions = b"".join(REGION.pack(*region) for region in self.regions)
        return TABLE.pack(len(self.regions), 0) + regions


class SingleRegion(NamedTuple):
    """Single memory region description."""

    region: MemoryRegion

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _padding, *fields = SINGLE.unpack(data)
        return cls(MemoryRegion(*fields).check())

    def build(self) -> bytes:
        return SINGLE.pack(0, *self.region)


class Log(NamedTuple):
    """Log description: bytes of the log, and where it begins in its descriptor."""

    size: int
    offset: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        found = cls(*LOG.unpack(data))
        if found.size + found.offset > END:
            raise ProtocolError(f"a log of {found.size:#x} bytes at {found.offset:#x} overflows")
        return found

    def build(self) -> bytes:
        return LOG.pack(*self)


class Config(NamedTuple):
    """Virtio device config space: a part of it. `data` is as long as that part, also in a request to read it."""

    offset: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < CONFIG.size:
            raise ProtocolError(f"a request about the configuration space has {len(data)} bytes")
        offset, size, flags = CONFIG.unpack_from(data)
        if len(data) != CONFIG.size + size:
            raise ProtocolError(f"{len(data) - CONFIG.size} bytes come for {size} of the configuration space")
        return cls(offset, flags, data[CONFIG.size :])

    def build(self) -> bytes:
        return CONFIG.pack(self.offset, len(self.data), self.flags) + self.data


class Inflight(NamedTuple):
    """Inflight description: the shared buffer that remembers what is in flight, and for how many rings of what size."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) not in {INFLIGHT.size, INFLIGHT_PADDED}:
            raise ProtocolError(f"a description of what is in flight has {len(data)} bytes")
        found = cls(*INFLIGHT.unpack_from(data))
        if found.mmap_size + found.mmap_offset > END:
            raise ProtocolError(f"a buffer of {found.mmap_size:#x} bytes at {found.mmap_offset:#x} overflows")
        return found

    def build(self) -> bytes:
        return INFLIGHT.pack(*self).ljust(INFLIGHT_PADDED, b"\0")


Payload = U64 | VringFd | VringState | VringAddr | MemoryTable | SingleRegion | Log | Config | Inflight | None
