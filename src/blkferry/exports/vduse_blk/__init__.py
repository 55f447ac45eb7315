"""The `vduse-blk` export type: a node as a virtio-blk device of the kernel's vDPA bus, by VDUSE."""

from blkferry.exports.vduse_blk.export import VduseBlkExport
from blkferry.exports.vduse_blk.options import BlockExportOptionsVduseBlk

__all__ = ["BlockExportOptionsVduseBlk", "VduseBlkExport"]
