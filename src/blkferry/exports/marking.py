"""What has to hear of writes that go straight to their place: the records of dirty bitmaps of nodes on the way there.

Which these are only changes while the nodes are drained, and all places are looked up anew after that.
"""

from __future__ import annotations

from blkferry.extent import Effort
from blkferry.graph.access import Run
from blkferry.graph.node import Node


class Marking:
    """The nodes that record what is written to an export, each with the offset in it that is the export's 0.

    Where that is a single node, as long as the export at least and at 0, `marked` is its record: who writes within one
    of its granules, `1 << bits` bytes, sets the bit himself. Everybody else calls `mark`.
    """

    __slots__ = ("_nodes", "bits", "marked")

    def __init__(self, nodes: list[tuple[Node, int]], size: int) -> None:
        self._nodes = nodes
        self.marked: bytearray | None = None
        self.bits = 0
        node, start = nodes[0]
        written = node.dirty_bitmaps.written
        if written is not None and len(nodes) == 1 and not start and size <= written.size:
            self.marked, self.bits = written.array, written.granularity_bits

    def mark(self, offset: int, length: int) -> None:
        """A range of the export is about to be written."""
        for node, start in self._nodes:
            node.mark_dirty_bitmaps(start + offset, start + offset + length)

    def suffices(self, run: Run) -> bool:
        """Whether these are all that have to hear of what is written to a run of the export."""
        nodes, marks = self._nodes, run.marks
        if len(nodes) != len(marks):
            return False
        for (node, start), (recorder, at) in zip(nodes, marks, strict=True):
            if node is not recorder or at - run.start != start:
                return False
        return True


def find_marking(node: Node, size: int) -> Marking | None:
    """The marking of an export of `node`, None if nobody records.

    It goes from node to node as long as each is a window of the next. What is below that, the file that an image is in,
    is not among them: where it records, writes go through the graph.
    """
    nodes: list[tuple[Node, int]] = []
    start = 0
    while True:
        if node.dirty_bitmaps.written is not None:
            nodes.append((node, start))
        extents = node.lookup(start, size, Effort.PLACE)
        if not extents or extents[0].length < size or extents[0].child is None:
            return Marking(nodes, size) if nodes else None
        node, start = node.children[extents[0].child].node, extents[0].offset
