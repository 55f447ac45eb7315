r"""The life of exports: ids, the order of checks, removal, and the event that says an id is free again.

    (none) --add--> running --del safe, idle--------------------------> gone + event
                       |  \--del safe, in use--> error, stays running
                       \--del hard / server stop / quit --> shutting-down -> gone + event

An id stays taken until its export is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.exports.base import Export
from blkferry.graph import registry
from blkferry.graph.graph import well_formed
from blkferry.graph.root import Root
from blkferry.schema.export import BlockExportInfo, BlockExportOptions, BlockExportRemoveMode

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.node import Node

log = logging.getLogger(__name__)

STOP_SECONDS = 1.0
"""How long what is in flight may take to end by itself when an export is removed."""


@dataclass(eq=False)
class Entry:
    """One export that has an id. `removal` is the task that removes it, once there is one; then it is `gone`."""

    export: Export
    removal: asyncio.Task[None] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Exports:
    """All exports of a daemon, by id, in the order they were added. Lives on the main loop."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._entries: dict[str, Entry | None] = {}  # None while the export is being made
        self._ended_early: set[str] = set()  # those that ended while they were being made
        self._ending = asyncio.Event()

    async def add(self, options: BlockExportOptions) -> Export:
        """Create an export, with the contract's checks in their order. Leaves nothing behind on failure."""
        self._claim(options.id)
        try:
            async with self._daemon.graph.changing:
                export = await self._create(options)
        except BaseException:
            del self._entries[options.id]
            self._ended_early.discard(options.id)
            raise
        self._entries[options.id] = Entry(export)
        if options.id in self._ended_early:
            self._ended_early.discard(options.id)
            self.ended(options.id)
        return export

    def _claim(self, export_id: str) -> None:
        if not well_formed(export_id):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Invalid block export id",
                hint=f"'{export_id}' is not a letter followed by letters, digits, '-', '.' and '_'.",
            )
        if export_id in self._entries:
            raise Error(
                ErrorKind.EXISTS,
                f"Block export id '{export_id}' is already in use",
                hint="Choose another id.",
                id=export_id,
            )
        self._entries[export_id] = None

    async def _create(self, options: BlockExportOptions) -> Export:
        kind = registry.load("exports", options.type)
        if kind is None or not issubclass(kind, Export):
            raise Error(ErrorKind.NOT_FOUND, f"No driver found for export type '{options.type}'")
        graph = self._daemon.graph
        node = graph.find(options.node_name)
        if options.writable and node.read_only:
            raise Error(
                ErrorKind.DENIED,
                "Cannot export read-only node as writable",
                hint=f"Leave writable out, or add node '{node.name}' without read-only.",
                node=node.name,
            )
        await self._place(node, options)
        if options.allow_inactive:
            raise Error(ErrorKind.UNSUPPORTED, "Export type does not support inactive exports")
        export: Export

        def retired(start: int, end: int | None) -> None:
            export.retired(start, end)

        root = Root(node, f"export '{options.id}'", retired)
        root.writethrough = options.writethrough
        export = kind(self._daemon, options, root)
        await node.services.run(root.attach(*kind.permissions(options)))
        try:
            await export.start()
        except BaseException:
            export.withdraw()
            await node.services.run(root.detach())
            raise
        graph.users.append(export)
        return export

    async def _place(self, node: Node, options: BlockExportOptions) -> None:
        """Move the node to the iothread that the export names, unless it is pinned elsewhere."""
        graph = self._daemon.graph
        names = [options.iothread] if isinstance(options.iothread, str) else options.iothread or []
        if len(names) > 1:
            raise Error(ErrorKind.UNSUPPORTED, "An export runs in one iothread", hint="Give the name of one iothread.")
        if not names:
            return
        services = self._daemon.objects.iothread(names[0]).services
        if services is node.services:
            return
        pinned = [user for user in graph.users_of(graph.tree_of(node)) if user.pinned]
        if not pinned:
            await graph.move(node, services)
        elif options.fixed_iothread:
            raise Error(
                ErrorKind.BUSY,
                "Cannot change iothread of active block backend",
                hint=f"{pinned[0].root.describe().capitalize()} is fixed to another thread.",
            )

    def get(self, export_id: str) -> Export:
        """The export with this id; raises Error(NOT_FOUND)."""
        entry = self._entries.get(export_id)
        if entry is None:
            known = ", ".join(self._entries)
            raise Error(
                ErrorKind.NOT_FOUND,
                f"Export '{export_id}' is not found",
                hint=f"Known exports: {known}." if known else "There are no exports.",
                id=export_id,
            )
        return entry.export

    @property
    def ids(self) -> Container[str]:
        """Ids in use, also of exports that are being made or removed."""
        return self._entries.keys()

    async def remove(self, export_id: str, mode: BlockExportRemoveMode, *, wait: bool = False) -> None:
        """Begin to remove an export. A safe removal of an export in use is refused.

        A hard one goes on by itself, unless the caller wants to `wait` until the export is gone.
        """
        export = self.get(export_id)
        entry = self._entries[export_id]
        assert entry is not None
        if entry.removal is not None:
            raise Error(ErrorKind.BUSY, f"Export '{export_id}' is already shutting down", id=export_id)
        if mode is BlockExportRemoveMode.SAFE:
            await export.leave()
        removal = self._begin_removal(export_id, entry)
        if wait or mode is BlockExportRemoveMode.SAFE:
            await asyncio.shield(removal)

    def ended(self, export_id: str) -> None:
        """Remove an export that nobody can use any more, unless that is going on already."""
        if (entry := self._entries.get(export_id)) is not None:
            self._begin_removal(export_id, entry)
        elif export_id in self._entries:
            self._ended_early.add(export_id)

    def _begin_removal(self, export_id: str, entry: Entry) -> asyncio.Task[None]:
        if entry.removal is None:
            entry.export.withdraw()
            entry.removal = asyncio.create_task(self._remove(export_id, entry), name=f"remove {export_id}")
        return entry.removal

    async def _remove(self, export_id: str, entry: Entry) -> None:
        export, root = entry.export, entry.export.root
        try:
            await export.part()
            await _stop(export)
            async with self._daemon.graph.changing:
                await root.services.run(root.detach())
                self._daemon.graph.users.remove(export)
            await self._linger(export)
        except Exception:
            log.exception("export '%s': removal failed", export_id)
        del self._entries[export_id]
        entry.gone.set()
        self._daemon.emit("BLOCK_EXPORT_DELETED", {"id": export_id})

    def leaving(self, export_id: str) -> bool:
        """Whether this export is being removed, or gone."""
        entry = self._entries.get(export_id)
        return entry is None or entry.removal is not None

    async def wait_gone(self, export_id: str) -> None:
        """Return when there is no export of this id, or this one has gone."""
        if (entry := self._entries.get(export_id)) is not None:
            await entry.gone.wait()

    async def _linger(self, export: Export) -> None:
        """Let it stay as long as it has to, or until the daemon ends."""
        lingering = asyncio.create_task(export.linger())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([lingering, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        lingering.cancel()
        await asyncio.wait([lingering])
        if not lingering.cancelled():
            lingering.result()

    async def drain_all(self, patience: float, hurry: asyncio.Event) -> None:
        """Take no new clients, and give those there are `patience` seconds to be answered, or until `hurry` is set."""
        exports = [entry.export for entry in self._entries.values() if entry is not None]
        for export in exports:
            export.withdraw()
        waits = [asyncio.create_task(end) for end in (_drain(exports), hurry.wait())]
        await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def end(self) -> None:
        """The daemon ends: exports that are being removed do not linger."""
        self._ending.set()

    async def remove_all(self, only: Callable[[Export], bool] = lambda _: True) -> None:
        """Remove every export, or `only` some, newest first."""
        chosen = [
            (export_id, entry)
            for export_id, entry in reversed(self._entries.items())
            if entry is not None and only(entry.export)
        ]
        for export_id, entry in chosen:
            await asyncio.shield(self._begin_removal(export_id, entry))

    def query(self) -> list[BlockExportInfo]:
        """What query-block-exports says: newest first."""
        return [
            BlockExportInfo(
                id=export_id,
                type=entry.export.kind,
                node_name=entry.export.root.node.name,
                shutting_down=entry.removal is not None,
                clients=list(entry.export.connected()),
                **entry.export.details(),
            )
            for export_id, entry in reversed(self._entries.items())
            if entry is not None
        ]


async def _stop(export: Export) -> None:
    """Stop an export. Nobody is there any more to be answered, so what waits for something outside does so in vain."""
    root = export.root

    def give_up() -> None:
        log.warning("export '%s': giving up what waits for something outside", export.options.id)
        root.services.loop.call_soon_threadsafe(root.give_up)

    patience = asyncio.get_running_loop().call_later(STOP_SECONDS, give_up)
    try:
        await root.services.run(export.stop())
    finally:
        patience.cancel()


async def _drain(exports: Iterable[Export]) -> Literal[True]:
    await asyncio.gather(*(export.root.services.run(export.drain()) for export in exports))
    return True
