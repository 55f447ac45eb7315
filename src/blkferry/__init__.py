"""blkferry carries blocks from disk images to whoever needs them.

async with blkferry.Daemon() as daemon:
    disk = await daemon.open("disk.img", writable=True)
    export = await daemon.export(disk, name="disk")
    await disk.write(0, b"hello")
    print(await disk.read(0, 5), "is also at", export.uri)
"""

from blkferry.daemon.daemon import Daemon
from blkferry.daemon.disk import Disk
from blkferry.daemon.mounts import FuseMount
from blkferry.daemon.offers import GuestOffer, NbdOffer
from blkferry.errors import Error, ErrorKind
from blkferry.extent import Status

__all__ = ["Daemon", "Disk", "Error", "ErrorKind", "FuseMount", "GuestOffer", "NbdOffer", "Status"]
