"""Commands about overlays, snapshots inside images, and what an image says of its backing file."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.graph import changes, registry
from blkferry.graph.access import BACKING
from blkferry.graph.graph import refuse_backing
from blkferry.graph.node import Node, depends_on
from blkferry.graph.permissions import ALL, Permission, cumulative
from blkferry.graph.reopen import set_read_only
from blkferry.graph.root import Root
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import SnapshotInfo
from blkferry.schema.snapshot import (
    BlockdevSnapshot,
    BlockdevSnapshotDeleteInternal,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
    ChangeBackingFile,
    NewImageMode,
)
from blkferry.schema.visit import dump, visit

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.graph import Graph

log = logging.getLogger(__name__)

# Overlays ------------------------------------------------------------------------------------------------------


async def put_on(graph: Graph, wanted: BlockdevSnapshot, stack: AsyncExitStack) -> Node:
    """Put an overlay on the node that is returned; taken back when `stack` ends with an exception."""
    base = graph.find(wanted.node, device=wanted.node)
    refuse_backing(base)
    overlay = graph.find(wanted.overlay, device=wanted.overlay)
    await _append(graph, overlay, base, stack)
    return base


async def put_made_on(graph: Graph, wanted: BlockdevSnapshotSync, stack: AsyncExitStack) -> Node:
    """Make the file of an overlay, if it is to be made, and put that on the node that is returned.

    The overlay is taken back when `stack` ends with an exception; a file that was made stays.
    """
    base = graph.find(wanted.node_name or "", device=wanted.device or "")
    refuse_backing(base)
    _check_overlay(graph, wanted)
    if wanted.mode is not NewImageMode.EXISTING:
        await _create_overlay(graph, base, wanted)
    overlay = await graph.open(_overlay_options(base, wanted), None)
    await stack.enter_async_context(_closed_on_failure(graph, overlay))
    await _append(graph, overlay, base, stack)
    return base


@asynccontextmanager
async def _closed_on_failure(graph: Graph, node: Node) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await graph.close_node(node)
        raise


def _check_overlay(graph: Graph, arguments: BlockdevSnapshotSync) -> None:
    if arguments.snapshot_node_name is None:
        raise Error(ErrorKind.INVALID_ARGUMENT, "New overlay node-name missing", hint="Give snapshot-node-name.")
    if arguments.snapshot_node_name in graph.nodes:
        raise Error(ErrorKind.EXISTS, "New overlay node-name already in use", node=arguments.snapshot_node_name)
    graph.check_name(arguments.snapshot_node_name)
    if arguments.format not in registry.plugins("drivers"):
        raise Error(ErrorKind.NOT_FOUND, f"Unknown file format '{arguments.format}'", hint="Like qcow2.")
    if not registry.driver(arguments.format).supports_backing:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Backing file not supported for file format '{arguments.format}'",
            hint="Use format qcow2.",
        )


async def _create_overlay(graph: Graph, base: Node, arguments: BlockdevSnapshotSync) -> None:
    """Make the file and, in it, an image that names its backing file by an absolute path."""
    name = base.filename()
    image = {
        "driver": arguments.format,
        "file": {"driver": "file", "filename": arguments.snapshot_file},
        "size": base.length,
        "backing-file": os.path.abspath(name) if os.path.exists(name) else name,
        "backing-fmt": base.driver,
    }
    for options in ({"driver": "file", "filename": arguments.snapshot_file, "size": 0}, image):
        await registry.driver(str(options["driver"])).create(graph, visit(BlockdevCreateOptions, options))


def _overlay_options(base: Node, arguments: BlockdevSnapshotSync) -> BlockdevOptions:
    """How the overlay is opened: like its base."""
    options: dict[str, Any] = {
        "driver": arguments.format,
        "node-name": arguments.snapshot_node_name,
        "file": {"driver": "file", "filename": arguments.snapshot_file},
        "backing": None,
        "read-only": base.read_only,
        "cache": dump(base.cache),
        "discard": "unmap" if base.unmaps else "ignore",
    }
    return visit(BlockdevOptions, options)


async def _append(graph: Graph, overlay: Node, base: Node, stack: AsyncExitStack) -> None:
    """Append an overlay, with QEMU's checks in their order."""
    used, _ = cumulative(overlay)
    if used & Permission.CONSISTENT_READ:
        raise Error(
            ErrorKind.BUSY,
            "The overlay is already in use",
            hint=f"It is used by {', '.join(edge.user.describe() for edge in overlay.parents)}.",
            node=overlay.name,
        )
    if BACKING in overlay.children:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "The overlay already has a backing image",
            hint="Add it with backing=null.",
            node=overlay.name,
        )
    if not overlay.supports_backing:
        raise Error(ErrorKind.UNSUPPORTED, "The overlay does not support backing images", hint="Use a qcow2 node.")
    await stack.enter_async_context(changes.undone_on_failure(graph.tree_of(base) | graph.tree_of(overlay)))
    await changes.append(graph, overlay, base)


async def let_only_read(graph: Graph, base: Node) -> None:
    """Open an image that has got an overlay read-only, where that can be."""
    if not base.read_only:
        with suppress(Error):  # somebody else may still write to it, as before
            await set_read_only(graph, base, read_only=True)


# Snapshots inside images ---------------------------------------------------------------------------------------


async def make_internal(graph: Graph, wanted: BlockdevSnapshotInternal, stack: AsyncExitStack) -> None:
    """Make a snapshot inside an image; deleted again when `stack` ends with an exception."""
    node = _top(graph, wanted.device)
    if node.read_only:
        raise Error(ErrorKind.DENIED, f"Device '{wanted.device}' is read only", node=node.name)
    if node.supports_snapshots:
        if not wanted.name:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Name is empty")
        if any(snapshot.name == wanted.name for snapshot in node.image_info().snapshots or []):
            raise Error(
                ErrorKind.EXISTS,
                f"Snapshot with name '{wanted.name}' already exists on device '{wanted.device}'",
            )
    async with _writing(graph, node, "blockdev-snapshot-internal-sync"):
        await node.services.run(node.snapshot_create(wanted.name))
    await stack.enter_async_context(_deleted_on_failure(graph, node, wanted.name))


@asynccontextmanager
async def _deleted_on_failure(graph: Graph, node: Node, name: str) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        try:
            async with _writing(graph, node, "blockdev-snapshot-internal-sync"):
                await node.services.run(node.snapshot_delete(None, name))
        except (Error, OSError):
            log.exception("snapshot '%s' of node '%s' could not be deleted again", name, node.name)
        raise


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    daemon: Daemon, arguments: BlockdevSnapshotDeleteInternal
) -> SnapshotInfo:
    wanted_id, wanted_name = arguments.id, arguments.name
    async with daemon.graph.changing:
        node = _top(daemon.graph, arguments.device)
        if wanted_id is None and wanted_name is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Name or id must be provided")
        if node.supports_snapshots:
            there = node.image_info().snapshots or []
            if not any(wanted_id in (None, each.id) and wanted_name in (None, each.name) for each in there):
                known = ", ".join(f"{each.name} ({each.id})" for each in there)
                raise Error(
                    ErrorKind.NOT_FOUND,
                    f"Snapshot with id '{_or_null(wanted_id)}' and name '{_or_null(wanted_name)}' does not exist on "
                    f"device '{arguments.device}'",
                    hint=f"There are: {known}." if known else "There are no snapshots.",
                )
        async with _writing(daemon.graph, node, "blockdev-snapshot-delete-internal-sync"):
            return await node.services.run(node.snapshot_delete(wanted_id, wanted_name))


def _or_null(text: str | None) -> str:
    return "null" if text is None else text


def _top(graph: Graph, name: str) -> Node:
    """A node that is no other node's child."""
    node = graph.find(name, device=name)
    for parent in node.parents:
        if isinstance(parent.user, Node):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Need a root block node",
                hint=f"It is used by {parent.user.describe()}.",
                node=name,
            )
    return node


@asynccontextmanager
async def _writing(graph: Graph, node: Node, description: str) -> AsyncIterator[None]:
    """Nothing is in flight on a node, and its metadata may be written."""
    root = Root(node, description)
    async with graph.drained(graph.tree_of(node)):
        used = Permission.CONSISTENT_READ if node.read_only else Permission.CONSISTENT_READ | Permission.WRITE
        await node.services.run(root.attach(used, ALL))
        try:
            yield
        finally:
            await node.services.run(root.detach())


# The name of the backing file ----------------------------------------------------------------------------------


@command("change-backing-file")
async def change_backing_file(daemon: Daemon, arguments: ChangeBackingFile) -> None:
    graph = daemon.graph
    async with graph.changing:
        top = _top(graph, arguments.device)
        image = graph.find(arguments.image_node_name)
        backing = image.children.get(BACKING)
        if backing is None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "not allowing backing file change on an image without a backing file",
                node=image.name,
            )
        if image not in depends_on(top):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"'{arguments.device}' and image file are not in the same chain")
        was_read_only = image.read_only
        if was_read_only:
            await set_read_only(graph, image, read_only=False)
        try:
            async with _writing(graph, image, "change-backing-file"):
                backing_format = backing.node.driver if arguments.backing_file else None
                work = image.change_backing_file(arguments.backing_file or None, backing_format)
                await image.services.run(work)
        finally:
            if was_read_only:
                await set_read_only(graph, image, read_only=True)
