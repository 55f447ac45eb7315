"""What Python programs get for an export that they made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkferry.schema.export import BlockExportRemoveMode

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@dataclass(frozen=True)
class Offer:
    """An export that a program made."""

    daemon: Daemon
    id: str

    async def remove(self, *, force: bool = False) -> None:
        """Stop offering it; `force` disconnects clients. Raises Error(BUSY) when there are some and it does not."""
        mode = BlockExportRemoveMode.HARD if force else BlockExportRemoveMode.SAFE
        await self.daemon.exports.remove(self.id, mode, wait=True)


@dataclass(frozen=True)
class NbdOffer(Offer):
    """An NBD export. `uris` say where clients find it, `uri` is the first of them."""

    uris: list[str]

    @property
    def uri(self) -> str:
        return self.uris[0]


@dataclass(frozen=True)
class GuestOffer(Offer):
    """A vhost-user-blk export: a virtual machine's front end connects to the socket at `path`."""

    path: str
