"""Nodes as block devices of this host, for people and Python programs: `vduse-blk` exports on the vDPA bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.exports.vduse_blk import BlockExportOptionsVduseBlk, VduseBlkExport
from blkferry.schema.export import BlockExportRemoveMode

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


class BlockDevice:
    """A node that is the VDUSE device `name`, and what its driver makes of it. It ends with the daemon."""

    def __init__(self, daemon: Daemon, export: VduseBlkExport) -> None:
        self.id = export.options.id
        self.name = export.name
        self.taken_over = export.taken_over
        """Whether it was there already, since a daemon before us did not end as it should."""
        self._daemon = daemon
        self._export = export

    @property
    def path(self) -> str | None:
        """/dev/vdX, or /dev/vhost-vdpa-N where it is for guests; None while no driver has taken it."""
        return self._export.endpoint

    async def attach(self) -> str | None:
        """Put it on the vDPA bus, until it or the daemon ends; return `path`. Raises Error where we may not."""
        return await self._export.attach()

    async def remove(self, *, force: bool = False) -> None:
        """Take it away, by `force` from the vDPA bus too. Raises Error(BUSY) when it is there and `force` is not."""
        mode = BlockExportRemoveMode.HARD if force else BlockExportRemoveMode.SAFE
        await self._daemon.exports.remove(self.id, mode, wait=True)


async def make_device(daemon: Daemon, options: BlockExportOptionsVduseBlk) -> BlockDevice:
    """Make a VDUSE device that is not on the bus yet, or take over one that is. Raises Error."""
    export = await daemon.exports.add(options)
    assert isinstance(export, VduseBlkExport)
    return BlockDevice(daemon, export)
