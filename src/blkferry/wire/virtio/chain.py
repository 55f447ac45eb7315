"""Descriptor chains: the buffers of one request, as both kinds of ring hand them out (virtio 1.3, section 2.6)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from blkferry.wire.virtio.memory import GuestMemory, MemoryFault

MAX_DESCRIPTORS: Final = 1024
"""Descriptors of one chain: what preadv takes at once, and what QEMU allows."""

MAX_SIZE: Final = 32768
"""Descriptors of one ring (sections 2.7 and 2.8.10.1)."""


class DescFlag(enum.IntFlag):
    """Flags of a descriptor (sections 2.7.5 and 2.8.1)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15


NEXT, WRITE, INDIRECT = int(DescFlag.NEXT), int(DescFlag.WRITE), int(DescFlag.INDIRECT)


OUT_OF_ORDER: Final = "a descriptor to read after one to write"
"""Section 2.7.4.2: what the device writes comes last."""


class RingError(Exception):
    """The ring makes no sense; nothing that follows can be trusted, so the device stops."""


Descriptor = tuple[int, int, int, int]
"""(address, length, id, flags) as a packed ring has it."""


class Chain(NamedTuple):
    """One request: bytes to read, then bytes to write, in the driver's memory.

    `head` is what the used ring names it by: the index of its first descriptor, or a packed ring's buffer id. `spans`
    are (guest address, length) of the bytes to write; `slots` is how many entries of the ring the chain takes, which
    are `descriptors` in a packed one.
    """

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    spans: list[tuple[int, int]]
    slots: int = 1
    descriptors: Sequence[Descriptor] = ()


class Inflight(Protocol):
    """What remembers, where it outlives this process, which requests have been taken and not given back.

    The order matters (vhost-user, "Inflight I/O tracking"): `begin` before anything of a request is executed; `end` for
    those of a batch when their used elements are written and before the driver can see them; `published` after that.
    In a packed ring, `chains` say what the descriptors were, since the driver may overwrite them.
    """

    def begin(self, heads: Sequence[int], chains: Sequence[Chain] = ()) -> None: ...

    def end(self, heads: Sequence[int]) -> None: ...

    def published(self, used_index: int) -> None:
        """The used ring's index is now `used_index` (of a packed ring: the position behind the last used one)."""

    def pending(self) -> Sequence[tuple[int, Sequence[Descriptor]]]:
        """What was in flight when somebody else had the ring, in the order it was begun; asked once, before all else.

        Descriptors are given for a packed ring only.
        """


class Ring(Protocol):
    """One virtqueue, seen from the device's side. `state` is what another process needs to go on, while idle."""

    size: int

    @property
    def next_used(self) -> int:
        """Where the next used element goes, as `Inflight.published` is told."""

    def take(self) -> Chain | None:
        """The next available chain. Raises RingError."""

    def again(self, head: int, descriptors: Sequence[Descriptor]) -> Chain:
        """A chain that was taken before (see `Inflight.pending`). Raises RingError."""

    def put(self, chain: Chain, written: int) -> None:
        """Give a chain back, `written` bytes of it written; the driver sees it after `publish`."""

    def publish(self, *, idle: bool = False) -> bool:
        """Show the driver what was put; whether it wants to be notified. `idle`: nothing is in flight any more."""

    def available(self) -> bool:
        """Whether `take` has something. Raises RingError."""

    def arm(self) -> bool:
        """Ask to be kicked for the next request; True if there is one already, whose kick may not come."""

    def disarm(self) -> None:
        """Ask not to be kicked, as we look for ourselves."""

    @property
    def state(self) -> tuple[int | None, ...]: ...


def add(chain: Chain, memory: GuestMemory, address: int, length: int, flags: int) -> None:
    """Add one buffer to a chain. Raises RingError where it may not be."""
    if not length:
        raise RingError("a descriptor of no length")
    try:
        if flags & WRITE:
            chain.writable.extend(memory.pieces(address, length, write=True))
            chain.spans.append((address, length))
        elif chain.writable:
            raise RingError(OUT_OF_ORDER)
        else:
            chain.readable.extend(memory.pieces(address, length))
    except MemoryFault as fault:
        raise RingError(str(fault)) from fault
    if len(chain.readable) + len(chain.writable) > MAX_DESCRIPTORS:
        raise RingError(f"a chain of more than {MAX_DESCRIPTORS} descriptors")
