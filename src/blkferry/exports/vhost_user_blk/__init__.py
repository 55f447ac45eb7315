"""Vhost-user-blk: a node as the disk of a virtual machine, straight from and to the guest's memory."""

from blkferry.exports.vhost_user_blk.export import VhostUserBlkExport

__all__ = ["VhostUserBlkExport"]
