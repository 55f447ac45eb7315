"""Transactions: bitmaps and snapshots of several nodes at one moment, all of them or none.

Each command that can be part of one is a transaction of one action. While one runs, nothing is in flight on the nodes
concerned: no write is half on either side of it. Every action is done at once and leaves on the stack what undoes it;
when one is refused, those before it are undone in reverse order.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from blkferry.daemon.commands import bitmap, command, snapshot
from blkferry.daemon.commands.bitmap import Undo
from blkferry.errors import Error, ErrorKind
from blkferry.graph.node import Node
from blkferry.schema.bitmap import (
    Abort,
    ActionCompletionMode,
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    Transaction,
    TransactionAction,
)
from blkferry.schema.snapshot import BlockdevSnapshot, BlockdevSnapshotInternal, BlockdevSnapshotSync

if TYPE_CHECKING:
    from types import TracebackType

    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.graph import Graph


async def execute(daemon: Daemon, actions: list[tuple[str, Any]]) -> None:
    """Do these, each a command's name and arguments. Raises Error."""
    graph = daemon.graph
    async with graph.changing:
        nodes = set().union(*(_concerned(graph, data) for _, data in actions))
        trees: set[Node] = set().union(*(graph.tree_of(node) for node in nodes))
        bitmaps = {node: dict(node.dirty_bitmaps) for node in nodes}
        only_read: list[Node] = []
        async with graph.drained(trees):
            try:
                async with AsyncExitStack() as stack:
                    for name, data in actions:
                        if name in bitmap.ACTIONS:
                            stack.push(_OnFailure(bitmap.ACTIONS[name](graph, data)))
                        elif isinstance(data, BlockdevSnapshot):
                            only_read.append(await snapshot.put_on(graph, data, stack))
                        elif isinstance(data, BlockdevSnapshotSync):
                            only_read.append(await snapshot.put_made_on(graph, data, stack))
                        elif isinstance(data, BlockdevSnapshotInternal):
                            await snapshot.make_internal(graph, data, stack)
                        else:
                            raise Error(ErrorKind.INVALID_ARGUMENT, "Transaction aborted using Abort action")
            finally:
                for node in trees:
                    await node.services.run(_looked_at_anew(node))
            for node in only_read:
                await snapshot.let_only_read(graph, node)
            await _remove_stored(bitmaps)


class _OnFailure:
    """Undoes something when the block that it ends fails."""

    def __init__(self, undo: Undo) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        """Nothing: what may be undone has been done."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._undo()


def _concerned(graph: Graph, data: object) -> set[Node]:
    names: set[str | None] = set()
    if isinstance(data, BlockDirtyBitmap | BlockDirtyBitmapAdd | BlockDirtyBitmapMerge | BlockdevSnapshot):
        names.add(data.node)
    if isinstance(data, BlockDirtyBitmapMerge):
        names |= {each.node for each in data.bitmaps if not isinstance(each, str)}
    elif isinstance(data, BlockdevSnapshot):
        names.add(data.overlay)
    elif isinstance(data, BlockdevSnapshotSync):
        names |= {data.device, data.node_name}
    elif isinstance(data, BlockdevSnapshotInternal):
        names.add(data.device)
    return {graph.nodes[name] for name in names if name in graph.nodes}


async def _looked_at_anew(node: Node) -> None:
    node.retire()


async def _remove_stored(before: dict[Node, dict[str, Any]]) -> None:
    """Take persistent bitmaps that have been removed out of their images."""
    for node, had in before.items():
        for name, was in had.items():
            if was.persistent and node.dirty_bitmaps.get(name) is not was:
                try:
                    await node.services.run(node.remove_stored_bitmap(name))
                except OSError as error:
                    raise Error.from_oserror(f"Failed to remove bitmap '{name}'", error, node=node.name) from error


_ALONE: Final = (
    *bitmap.ACTIONS,
    "blockdev-snapshot",
    "blockdev-snapshot-sync",
    "blockdev-snapshot-internal-sync",
)
"""The actions that are commands too."""


def _command(name: str) -> None:
    @command(name)
    async def alone(daemon: Daemon, arguments: object) -> None:
        await execute(daemon, [(name, arguments)])


for _name in _ALONE:
    _command(_name)


@command("transaction")
async def transaction(daemon: Daemon, arguments: Transaction) -> None:
    grouped = arguments.properties and arguments.properties.completion_mode is ActionCompletionMode.GROUPED
    if grouped and arguments.actions:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Action '{arguments.actions[0].type}' does not support transaction property completion-mode = grouped",
        )
    await execute(daemon, [(action.type, _data(action)) for action in arguments.actions])


def _data(action: TransactionAction) -> object:
    return getattr(action, "data", Abort())
