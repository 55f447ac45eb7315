"""A block node: the base class of every driver, with everything a driver may leave out.

The verbs are those of the design's extent contract. `lookup` says where bytes live; everything else has a default that
follows from it: a node whose data lives in a child at some offset needs nothing but a `lookup`. Data-path verbs raise
OSError, control verbs raise Error. All of a node runs on the loop of its `services`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.extent import Content, Effort, Extent
from blkferry.graph.bitmaps import DirtyBitmaps
from blkferry.graph.permissions import Edge, Permission
from blkferry.plane.drain import Uses
from blkferry.schema.block import (
    BlockdevCacheOptions,
    BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions,
    BlockdevOptions,
)
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import ImageInfo, SnapshotInfo

if TYPE_CHECKING:
    from blkferry.graph.graph import Graph, Opening
    from blkferry.graph.reopen import Reopening
    from blkferry.graph.root import Root
    from blkferry.plane.engine import Done
    from blkferry.plane.services import Services
    from blkferry.plane.storage import Storage

MAX_TRANSFER = 32 << 20
"""The longest read or write that a node is ever asked for, in bytes. Splitting is the caller's part."""

EventSink = Callable[[str, dict[str, object]], None]
"""Takes the name and the data of an event."""


def ignore_event(name: str, data: dict[str, object]) -> None:
    """The sink of those whom nobody listens to."""
    del name, data


class Node:
    """One node of the graph.

    `length` is in bytes; `alignment` is what requests should be multiples of, in bytes (a power of two; other
    requests cost a read first), `remap_alignment` the same for zeroes and discards. `storage` is set on
    nodes that own a descriptor. `readers` counts who reads what has no storage (OPAQUE content). `emit` tells the
    daemon of an event, from any thread.

    `create_options` is what the driver needs to know to make an image, None if it makes none. `reopenable` names the
    options of its own that blockdev-reopen may change. `supports_backing`: it may have a backing child;
    `supports_snapshots`: it keeps snapshots inside the image. `writes_now`: `write_now` takes writes of any range, also
    of places that lookups name. `is_filter`: it shows its `file` child as it is.

    `dirty_bitmaps` are those of this node, by name. They change only while nothing is in flight.
    """

    driver: ClassVar[str]
    options_type: ClassVar[type[BlockdevOptions]]
    create_options: ClassVar[type[BlockdevCreateOptions] | None] = None
    reopenable: ClassVar[frozenset[str]] = frozenset()
    supports_backing: ClassVar[bool] = False
    writes_now: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    supports_snapshots: ClassVar[bool] = False
    storage: Storage | None = None

    def __init__(self, name: str, options: BlockdevOptions, services: Services, *, read_only: bool) -> None:
        self.name = name
        self.options = options
        self.services = services
        self.read_only = read_only
        self.implicit = False  # a parent's inline child: it goes when its last user goes
        self.unmaps = options.discard is BlockdevDiscardOptions.UNMAP
        self.cache = BlockdevCacheOptions()
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.emit: EventSink = ignore_event
        self.readers = Uses()
        self.dirty_bitmaps = DirtyBitmaps()
        self.length = 0
        self.alignment = 1
        self.remap_alignment = 1

    @property
    def reuses_places(self) -> bool:
        """Whether a place that a lookup has named may come to hold other bytes of the node later."""
        return False

    # Where bytes live ------------------------------------------------------------------------------------------

    def lookup(self, start: int, length: int, effort: Effort) -> list[Extent] | None:
        """Extents from `start`, in order and without gaps, over `length` bytes at most (see `extent`).

        None (a MISS) when metadata must be loaded before even the first can be told.
        """
        raise NotImplementedError

    async def load(self, start: int, length: int) -> None:
        """Bring in the metadata that a MISS for this range asked for. Raises OSError."""

    def retire(self, start: int = 0, end: int | None = None) -> None:
        """Tell everybody above that what lookups said before about a range (all of the node) is no longer so."""
        if end is None:
            self.fit_bitmaps()
        for parent in self.parents:
            parent.user.child_retired(parent.role, start, end)

    def child_retired(self, role: str, start: int, end: int | None) -> None:
        """A child's `retire`; what that means for this node is for its driver to know."""
        del role, start, end
        self.retire()

    # What was written -------------------------------------------------------------------------------------------

    def fit_bitmaps(self) -> None:
        """The node may have another length: its bitmaps are as long as that."""
        self.dirty_bitmaps.fit(self.length)

    def check_bitmap_storable(self, name: str, granularity_bits: int) -> None:
        """Raise Error unless the image can keep another persistent bitmap like this."""
        del granularity_bits
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Can't store persistent bitmaps to {self.name}: Operation not supported",
            hint="Leave out persistent, or use a qcow2 node.",
            node=self.name,
            bitmap=name,
        )

    async def remove_stored_bitmap(self, name: str) -> None:
        """Take a persistent bitmap out of the image. Raises Error or OSError."""

    def mark_dirty_bitmaps(self, start: int, end: int) -> None:
        """Note, before it begins, that a range is being written, zeroed or discarded."""
        written = self.dirty_bitmaps.written
        if written is None:
            return
        length = self.length
        if written.size != length:
            self.fit_bitmaps()
        written.mark(start, end if end < length else length)  # noqa: FURB136 - a call of min is a fifth of this

    # Bytes only the driver can produce -------------------------------------------------------------------------

    async def read(self, start: int, view: memoryview) -> None:
        """Fill `view` for OPAQUE content."""
        del start, view
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    async def write(self, start: int, view: memoryview) -> None:
        """Take `view` where lookups name no place for it."""
        del start, view
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def write_now(self, start: int, view: memoryview) -> bool:
        """`write`, if it can be done within a turn of the loop; tells whether it was. Raises OSError."""
        del start, view
        return False

    # The same begun within a turn of the loop and ended in a later one, by a call of `done` with 0 or a negated errno.
    # Each tells whether it was begun; where it was not, the coroutine does it. The memory is the driver's until `done`.

    def read_later(self, start: int, view: memoryview, done: Done) -> bool:
        """`read` like that. `view` is not empty."""
        del start, view, done
        return False

    def write_later(self, start: int, view: memoryview, done: Done) -> bool:
        """`write` like that. `view` is not empty."""
        del start, view, done
        return False

    def flush_later(self, done: Done) -> bool:
        """`flush` like that."""
        del done
        return False

    @property
    def detects_zeroes(self) -> BlockdevDetectZeroesOptions:
        """What this node, or else one below, wants done with writes that are all zero."""
        wanted = self.options.detect_zeroes
        for edge in self.children.values():
            if wanted is not BlockdevDetectZeroesOptions.OFF:
                break
            wanted = edge.node.detects_zeroes
        return wanted

    # Changing what is there ------------------------------------------------------------------------------------

    async def remap(self, start: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Make the range read as zeroes. `unmap` allows giving space back; `fast` forbids doing it by writing.

        Raises OSError(ENOTSUP) when it cannot be done, or not fast.
        """
        unmap = unmap and self.unmaps

        def act(node: Node, at: int, n: int) -> Coroutine[Any, Any, None]:
            node.mark_dirty_bitmaps(at, at + n)
            return node.remap(at, n, unmap=unmap, fast=fast)

        await self._on_children(start, length, act)

    async def discard(self, start: int, length: int) -> None:
        """Give space back where the `discard` option wants it; the range then reads as before or as zeroes."""
        if not self.unmaps:
            return

        def act(node: Node, at: int, n: int) -> Coroutine[Any, Any, None]:
            if node.unmaps:
                node.mark_dirty_bitmaps(at, at + n)
            return node.discard(at, n)

        await self._on_children(start, length, act)

    def cancel_in_flight(self, user: Root | None = None) -> None:
        """Have requests that wait for something outside (a server that is gone, say) fail soon, or those of one user.

        Called on the node's loop. A user is `given_up` then, which is for the driver to look at before it waits anew.
        """

    async def prefetch(self, start: int, length: int) -> None:
        """Bring the range into the page cache."""
        await self._on_children(start, length, lambda node, at, n: node.prefetch(at, n))

    async def _on_children(self, start: int, length: int, act: Callable[[Node, int, int], Any]) -> None:
        end = start + length
        while start < end:
            extents = self.lookup(start, end - start, Effort.PLACE)
            if extents is None:
                await self.load(start, end - start)
                continue
            for extent in extents:
                if extent.content is Content.DATA and extent.child is not None:
                    await act(self.children[extent.child].node, extent.offset, extent.length)
                start += extent.length

    async def flush(self) -> None:
        """Make everything written so far durable."""
        for edge in self.children.values():
            await edge.node.flush()

    def grow(self, length: int) -> bool:
        """Become at least `length` bytes long at once, if that is all it takes for new bytes to read as zeroes.

        False when it cannot be done like that. Raises OSError.
        """
        del length
        return False

    async def resize(self, length: int) -> None:
        """Change `length` (bytes)."""
        del length
        raise Error(ErrorKind.UNSUPPORTED, "Image format driver does not support resize", node=self.name)

    # Images and snapshots --------------------------------------------------------------------------------------

    @classmethod
    async def create(cls, graph: Graph, options: BlockdevCreateOptions) -> None:
        """Make an image; called on the main loop, by a task that may hold `Graph.changing`. Raises Error."""
        del graph, options
        raise Error(ErrorKind.UNSUPPORTED, "Driver does not support blockdev-create", driver=cls.driver)

    async def snapshot_create(self, name: str) -> None:
        """Make a snapshot inside the image; nothing is in flight, and no other snapshot has this name."""
        del name
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Block format '{self.driver}' used by device '{self.name}' does not support internal snapshots",
            node=self.name,
        )

    async def snapshot_delete(self, snapshot_id: str | None, name: str | None) -> SnapshotInfo:
        """Delete the snapshot that has this id or name, or both, which there is; return what it was."""
        del snapshot_id, name
        raise Error(ErrorKind.UNSUPPORTED, "Failed to get a snapshot list: Operation not supported", node=self.name)

    async def change_backing_file(self, backing_file: str | None, backing_format: str | None) -> None:
        """Change what the image says of its backing file; the backing child stays what it is."""
        del backing_format
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Could not change backing file to '{backing_file or ''}': Operation not supported",
            node=self.name,
        )

    def image_info(self) -> ImageInfo:
        """What queries tell of the image, without its backing image."""
        return ImageInfo(
            filename=self.filename(),
            format=self.driver,
            virtual_size=self.length,
            actual_size=self.allocated_size(),
        )

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self, opening: Opening) -> None:
        """Make the node usable; raise Error when it cannot be. `close` follows in either case."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Write what `close` would, which can only log a failure. Nothing may be in flight. Raises OSError or Error."""
        await self.flush()

    def describe(self) -> str:
        return f"node '{self.name}'"

    # Other options while in use (see graph.reopen). Nothing is in flight then, from the first of these to the last.

    async def reopen_prepare(self, reopening: Reopening) -> None:
        """See whether the node can become what `reopening` says, and get what that takes. Raises Error.

        Generic code has checked what the schema tells; `self.options` are still the old ones.
        """

    async def reopen_commit(self, reopening: Reopening) -> None:
        """Become that; options, children, cache and read-only have been changed. Must not fail."""

    async def reopen_abort(self, reopening: Reopening) -> None:
        """Give up what `reopen_prepare` got, which may have failed half-way."""

    def child_permissions(self, role: str, used: Permission, shared: Permission) -> tuple[Permission, Permission]:
        """What this node needs of a child, and shares of it, when its own users need and share that."""
        from blkferry.graph.access import BACKING

        if role != BACKING:
            return used, shared
        others = Permission.WRITE | Permission.RESIZE if shared & Permission.WRITE else Permission(0)
        return (
            used & Permission.CONSISTENT_READ,
            Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED | others,
        )

    async def permissions_changed(self, used: Permission, shared: Permission) -> None:
        """The users of this node now need and share that; raise Error when it cannot be had."""

    def filename(self) -> str:
        """What query commands show as the node's file."""
        for edge in self.children.values():
            return edge.node.filename()
        return ""

    def allocated_size(self) -> int | None:
        """Host bytes in use, where that is known."""
        for edge in self.children.values():
            return edge.node.allocated_size()
        return None

    def flush_target(self) -> Storage | None:
        """The storage whose own flush is all that `flush` does, if there is one: FUA needs no more then."""
        return None

    async def pause(self) -> None:
        """Finish what the node does on its own account; called when no user has anything in flight."""

    def move(self, services: Services) -> None:
        """Live on another loop. Nothing may be in flight, and `pause` has been awaited."""
        self.services = services
        if self.storage is not None:
            self.storage.move(services)

    async def close(self) -> None:
        """Give up what the node holds. Nothing may be in flight and nobody may use it."""


def depends_on(node: Node) -> set[Node]:
    """The node and everything below it."""
    found: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in found:
            found.add(current)
            queue.extend(edge.node for edge in current.children.values())
    return found
