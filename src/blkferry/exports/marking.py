"""What has to hear of writes that go straight to their place, and which of them it need not hear of any more.

Nodes on the way may have dirty bitmaps. One byte for each stretch of the export tells whether all that record have it
marked: then a turn overwrites there as if there were none. Bits are only taken back while the nodes are drained, and
all places are looked up anew after that.
"""

from __future__ import annotations

from typing import Final

from blkferry.graph.node import Node

MAX_FLAGS: Final = 1 << 24
"""16 MiB: a tebibyte at the default granularity."""


class Marking:
    """`marked[offset >> bits]` is 1 where all bitmaps of `nodes` that record have that stretch of the export marked.

    Each node comes with the offset in it that is the export's 0. Stretches lie within one granule of every bitmap.
    `busy` while `mark` makes nodes say that they were changed, which concerns everybody but this export.
    """

    __slots__ = ("_nodes", "bits", "busy", "marked")

    def __init__(self, nodes: list[tuple[Node, int]], size: int) -> None:
        self._nodes = nodes
        self.bits = min(bitmap.granularity_bits for node, _ in nodes for bitmap in node.recording)
        for _, start in nodes:
            while start & ((1 << self.bits) - 1):
                self.bits -= 1
        count = (size + (1 << self.bits) - 1) >> self.bits
        self.marked: bytearray | None = bytearray(count) if count <= MAX_FLAGS else None
        self.busy = False

    def mark(self, offset: int, length: int) -> None:
        """The range, which lies in the export and is not empty, is about to be written."""
        marked = self.marked
        assert marked is not None
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if marked.find(0, first, last + 1) < 0:
            return
        self.busy = True
        for node, start in self._nodes:
            node.mark_dirty_bitmaps(start + offset, start + offset + length)
        self.busy = False
        marked[first : last + 1] = b"\1" * (last - first + 1)
