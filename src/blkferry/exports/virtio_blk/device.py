"""A node seen as a virtio block device: what it offers, what its driver accepted, and its configuration space.

Transports make one for every export, tell it what the driver wants, and make queues for it. It knows nothing of how the
driver reaches it.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

from blkferry.errors import Error, ErrorKind
from blkferry.exports.complaints import Complaints
from blkferry.exports.places import Places
from blkferry.exports.virtio_blk.limits import BLOCK_SIZES, MAX_QUEUES, MAX_REMAP_SECTORS
from blkferry.graph.root import Root
from blkferry.units import SECTOR, align_down
from blkferry.wire.virtio import features as virtio
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import ID_BYTES, Config
from blkferry.wire.virtio_blk import Feature as Blk

log = logging.getLogger(__name__)

_ALWAYS: Final = Blk.SEG_MAX | Blk.BLK_SIZE | Blk.FLUSH | Blk.TOPOLOGY | Blk.DISCARD | Blk.WRITE_ZEROES


class Device:
    """One virtio block device; owned by the loop of its node, except that `config` may be asked anywhere.

    `name` is what log lines call it. `serial` is what GET_ID answers (at most 20 bytes count). `seg_max` is how many
    segments the data of a request may have. `also` are features of the transport's own, which it takes care of; MQ,
    SIZE_MAX and CONFIG_WCE are among them. `features` are the accepted ones: none, until `accept`.

    Make it before the root is attached, which makes the node say `retired`, and ask `resized` afterwards. Raises Error
    where an option is out of range.
    """

    def __init__(
        self,
        root: Root,
        *,
        name: str,
        writable: bool,
        serial: str = "",
        logical_block_size: int = 512,
        queues: int = 1,
        seg_max: int = 126,
        also: int = 0,
    ) -> None:
        check_queues(queues)
        check_block_size(logical_block_size)
        if sys.byteorder != "little":
            raise Error(ErrorKind.UNSUPPORTED, "virtio devices are served on little-endian machines only")
        self.root = root
        self.name = name
        self.writable = writable
        self.serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.block_size = logical_block_size
        self.queues = queues
        self.seg_max = seg_max
        self.size = align_down(root.node.length, SECTOR)
        self.places = Places(root, writable=writable)
        self.places.size = self.size
        # No IntFlag: that inverts known bits only.
        self.offered = int(_ALWAYS | virtio.RING | Feature.VERSION_1) | int(also)
        if not writable:
            self.offered |= int(Blk.RO)
        self.features = 0
        self.lost_writes = False
        """Whether writes may be lost that were answered and not flushed, which the next flush has to tell."""
        self._writethrough = root.writethrough  # what the export was told, for as long as the driver says nothing
        self._complaints = Complaints(log)

    # What the driver sees --------------------------------------------------------------------------------------

    def accept(self, features: int) -> None:
        """The driver takes these features. Raises Error when it may not.

        A driver that cannot flush gets a write-through cache (section 5.2.5).
        """
        if unknown := features & ~self.offered:
            raise Error(ErrorKind.UNSUPPORTED, f"the driver accepts features that are not offered: {unknown:#x}")
        if not features & Feature.VERSION_1:
            raise Error(ErrorKind.UNSUPPORTED, "the driver is older than virtio 1.0", hint="Use a modern driver.")
        self.features = features
        self.root.writethrough = self._writethrough or not features & Blk.FLUSH

    def reset(self) -> None:
        """The driver is gone, or begins anew: what it chose no longer holds."""
        self.features = 0
        self.root.writethrough = self._writethrough

    @property
    def writeback(self) -> bool:
        """Whether what was written is durable only after a flush."""
        return not self.root.writethrough

    def set_writeback(self, on: bool) -> None:
        """The driver writes the field `writeback` of the configuration."""
        self.root.writethrough = not on

    def config(self) -> bytes:
        """The configuration space as it is now."""
        alignment = self.block_size // SECTOR
        return Config(
            capacity=self.size // SECTOR,
            seg_max=self.seg_max,
            blk_size=self.block_size,
            writeback=self.writeback,
            num_queues=self.queues,
            max_discard_sectors=MAX_REMAP_SECTORS,
            max_discard_seg=1,
            discard_sector_alignment=alignment,
            max_write_zeroes_sectors=MAX_REMAP_SECTORS,
            max_write_zeroes_seg=1,
            write_zeroes_may_unmap=self.root.node.unmaps,
        ).build()

    # What the node does ----------------------------------------------------------------------------------------

    def retired(self, start: int, end: int | None) -> None:
        """The node says that earlier lookups are void. Tells nothing of a new size: see `resized`."""
        self.places.retired(start, end)

    def resized(self) -> bool:
        """See whether the node has another length; then the driver is to be told of another configuration."""
        size = align_down(self.root.node.length, SECTOR)
        if size == self.size:
            return False
        self.size = self.places.size = size
        self.places.drop()
        return True

    def drop(self) -> None:
        """Let go of what belongs to the node's loop; nothing is in flight."""
        self.places.drop()

    def complain(self, text: str) -> None:
        """A request failed: say so in the log, unless there is too much of it."""
        self._complaints.add(self.name, text)


def check_queues(queues: int) -> None:
    """Raise Error unless a device may have so many queues."""
    if queues < 1:
        raise Error(ErrorKind.INVALID_ARGUMENT, "num-queues must be greater than 0", hint="The default is 1.")
    if queues > MAX_QUEUES:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"num-queues must be at most {MAX_QUEUES}",
            hint="One for each processor is best.",
        )


def check_block_size(size: int) -> None:
    """Raise Error unless this can be a logical block size."""
    smallest, largest = BLOCK_SIZES
    if not smallest <= size <= largest or size & (size - 1):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"parameter logical-block-size must be a power of 2 between {smallest} and {largest}",
            hint=f"It was {size}; the default is {smallest}.",
        )
