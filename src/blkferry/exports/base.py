"""What every export type has in common: a root on a node, clients to count, and a life from start to stop.

An export runs on the loop of its node. The daemon owns ids, the order of checks and events; an export type knows only
how to offer a node to its kind of client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from blkferry.errors import Error
from blkferry.graph.graph import Graph
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.root import Root
from blkferry.schema.export import BlockExportClient, BlockExportOptions


class Host(Protocol):
    """What an export may ask of the daemon it lives in."""

    graph: Graph

    def service(self, kind: str, name: str | None = None) -> Any:
        """A shared service ("nbd-server"), the one without a name by default. Raises Error when it does not run."""

    def export_ended(self, export_id: str) -> None:
        """The outside has ended this export, by an unmount say: remove it. May be called on any loop."""


class Export:
    """An offer of one node. Subclasses are found by their entry point (group `blkferry.exports`)."""

    kind: ClassVar[str]
    options_type: ClassVar[type[BlockExportOptions]]

    def __init__(self, host: Host, options: BlockExportOptions, root: Root) -> None:
        self.host = host
        self.options = options
        self.root = root

    @classmethod
    def permissions(cls, options: BlockExportOptions) -> tuple[Permission, Permission]:
        """What this export needs of its node, and what it lets others do."""
        used = Permission.CONSISTENT_READ
        if options.writable:
            used |= Permission.WRITE
        return used, ALL

    async def start(self) -> None:
        """Begin to serve; raise Error, with nothing left behind, when that is impossible. Called on the main loop."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Take no new clients. Called on the main loop."""

    def retired(self, start: int, end: int | None) -> None:
        """The node says that earlier lookups are void. Called on the node's loop."""

    async def drain(self) -> None:
        """Let clients finish what they have asked for; cancelled when patience ends. Called on the node's loop."""

    async def stop(self) -> None:
        """Cut the clients off and return when nothing is in flight. Called on the node's loop."""
        raise NotImplementedError

    @property
    def in_use(self) -> Error | None:
        """Why a safe removal must wait, None when nobody uses the export."""
        raise NotImplementedError

    async def leave(self) -> None:
        """Be used by nobody, before a safe removal, or raise Error(BUSY) and go on. Called on the main loop."""
        if (refusal := self.in_use) is not None:
            raise refusal

    def connected(self) -> Sequence[BlockExportClient]:
        """Who uses the export now. Called on the main loop."""
        return ()

    def details(self) -> dict[str, Any]:
        """What else query-block-exports says of it: members of BlockExportInfo. Called on the main loop."""
        return {}

    @property
    def pinned(self) -> bool:
        return self.options.fixed_iothread

    async def pause(self) -> None:
        """Let go of the node's loop, keeping the clients; return when nothing is in flight. Called on the main loop."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Go on with the clients, on the loop where the node lives now. Called on the main loop."""
        raise NotImplementedError
