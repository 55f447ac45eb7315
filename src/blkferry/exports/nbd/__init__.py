"""NBD: the server, its exports and their clients."""

from blkferry.exports.nbd.export import NbdExport
from blkferry.exports.nbd.server import NbdServer

__all__ = ["NbdExport", "NbdServer"]
