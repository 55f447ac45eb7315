"""Nodes as files, for people and Python programs: an export, and the file that it is mounted over."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec

from blkferry.daemon.mountpoints import Mountpoint
from blkferry.errors import Error
from blkferry.exports.base import Export
from blkferry.schema.export import BlockExportOptionsFuse, BlockExportRemoveMode

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


class FuseMount:
    """A node that is mounted as the file `path`, by `Daemon.mount` say. Others may unmount it, too, with umount(8).

    `allow_other` tells whether other users are let in, which for anybody but root depends on /etc/fuse.conf.
    """

    def __init__(self, daemon: Daemon, export: Export, claimed: Mountpoint, *, owns_node: bool) -> None:
        self.id = export.options.id
        self.path = claimed.path
        self.allow_other: bool = export.details()["allow_other"]
        self._daemon = daemon
        self._claimed = claimed
        self._node = export.options.node_name if owns_node else None
        self._ended = asyncio.create_task(self._tidy())

    async def unmount(self, *, force: bool = False) -> None:
        """End it, if that has not happened yet; `force` cuts off who has the file open.

        A file that was made for this is gone when it returns. Raises Error(BUSY) if it is open, unless forced.
        """
        if not self._daemon.exports.leaving(self.id):
            mode = BlockExportRemoveMode.HARD if force else BlockExportRemoveMode.SAFE
            await self._daemon.exports.remove(self.id, mode, wait=True)
        await self.unmounted()

    async def unmounted(self) -> None:
        """Return when it has ended, whoever ended it."""
        await asyncio.shield(self._ended)

    async def _tidy(self) -> None:
        await self._daemon.exports.wait_gone(self.id)
        if self._daemon.ending:  # which closes all nodes, and gives up what is claimed when that is done
            return
        if self._node is not None:
            with contextlib.suppress(Error):  # it has another user by now
                await self._daemon.graph.remove(self._node)
        await self._daemon.mountpoints.release(self._claimed)


async def mount(
    daemon: Daemon, options: BlockExportOptionsFuse, *, over: bool = False, owns_node: bool = False
) -> FuseMount:
    """Mount a node over the file that `options` name, which is made if it is not there and else must be empty.

    `over` allows it to hold something, which then is not seen for the time; an image may always be mounted over itself.
    With `owns_node` the node goes with the mount. Raises Error.
    """
    image = daemon.graph.find(options.node_name).filename()
    claimed = await daemon.mountpoints.claim(options.mountpoint, image=image, over=over)
    try:
        export = await daemon.exports.add(msgspec.structs.replace(options, mountpoint=claimed.path))
    except BaseException:
        await daemon.mountpoints.release(claimed)
        raise
    return FuseMount(daemon, export, claimed, owns_node=owns_node)
