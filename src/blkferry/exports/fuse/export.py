"""The `fuse` export type: one node as the regular file that is mounted over `mountpoint`."""

from __future__ import annotations

from typing import ClassVar

from blkferry.exports.base import Export, Host
from blkferry.graph.permissions import Permission
from blkferry.graph.root import Root
from blkferry.schema.export import BlockExportOptions, BlockExportOptionsFuse


class FuseExport(Export):
    """An export by FUSE."""

    kind: ClassVar[str] = "fuse"
    options_type: ClassVar[type[BlockExportOptions]] = BlockExportOptionsFuse
    options: BlockExportOptionsFuse

    def __init__(self, host: Host, options: BlockExportOptions, root: Root) -> None:
        super().__init__(host, options, root)
        assert isinstance(options, BlockExportOptionsFuse)

    @classmethod
    def permissions(cls, options: BlockExportOptions) -> tuple[Permission, Permission]:
        assert isinstance(options, BlockExportOptionsFuse)
        used, shared = super().permissions(options)
        if options.writable or options.growable:  # truncate(2) changes the size, even where writes do not
            used |= Permission.RESIZE
        return used, shared
