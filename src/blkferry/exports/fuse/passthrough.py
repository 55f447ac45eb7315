"""Passthrough: the kernel reads and writes a plain image by itself, and we see nothing of it.

What has been opened so cannot be called back: its reads and writes go to the image until it is closed, whatever becomes
of the export. So nothing that would have to see them, or that makes another file of the node, may begin meanwhile: the
graph is not let to rest (`FuseExport.pause`), and what needs that, be it a bitmap, a snapshot or a move to another
thread, is refused. Nor does the kernel stop writes at the end of the file, so a file that is written grows.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.wire.fuse.constants import DEV_IOC_BACKING_CLOSE, DEV_IOC_BACKING_OPEN
from blkferry.wire.fuse.replies import BACKING_ID, BACKING_MAP

_HINT = "Leave passthrough out."

if TYPE_CHECKING:
    from blkferry.exports.places import Places
    from blkferry.graph.root import Root
    from blkferry.plane.storage import Storage


class Passthrough:
    """What is open like that; owned by the loop of the export's node. All of it shares one registered descriptor."""

    def __init__(self, device: int, root: Root, places: Places) -> None:
        self._device = device
        self._root = root
        self._places = places
        self.opened = 0
        self._backing_id = 0

    def storage(self) -> Storage:
        """The file that is all of the export, if nobody has to see what is done with it. Raises Error otherwise."""
        whole = self._places.look()
        why = ""
        if whole is None or whole[0] is None or whole[1]:
            why = "the node is not a whole file, byte for byte"
        elif self._places.marking is not None:
            why = "a dirty bitmap records what is written"
        elif self._root.writethrough or self._root.detects_zeroes:
            why = "its options (writethrough, detect-zeroes) say what is to be done with each write"
        elif (storage := whole[0].storage).direct or storage.is_block_device:
            why = "the image is not a file in the page cache"
        elif storage.refresh_size() != self._places.size:
            why = f"the image has {storage.size} bytes, which is no multiple of 512"
        else:
            return storage
        raise Error(ErrorKind.UNSUPPORTED, f"The kernel cannot be let through to the image: {why}", hint=_HINT)

    def open(self) -> int:
        """Count one more that is open; returns the backing id for the kernel. Raises Error."""
        if not self.opened:
            self._backing_id = self._register(self.storage().fd)
        self.opened += 1
        return self._backing_id

    def release(self) -> None:
        """One that was open is closed."""
        self.opened -= 1
        if not self.opened:
            fcntl.ioctl(self._device, DEV_IOC_BACKING_CLOSE, BACKING_ID.pack(self._backing_id))

    def catch_up(self) -> None:
        """Find out what has been done meanwhile: the file may have grown, and all of it is yet to be flushed."""
        whole = self._places.look()
        if not self.opened or whole is None or whole[0] is None:
            return
        storage = whole[0].storage
        storage.dirty += 1
        if storage.refresh_size() > self._places.size and self._root.node.grow(storage.size):
            self._root.node.retire()

    def modified(self) -> int:
        """When the image was last written, in ns since 1970; 0 if nobody has it open like that."""
        whole = self._places.look()
        if not self.opened or whole is None or whole[0] is None:
            return 0
        return os.fstat(whole[0].storage.fd).st_mtime_ns

    def _register(self, fd: int) -> int:
        try:
            return int(fcntl.ioctl(self._device, DEV_IOC_BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0))))
        except OSError as error:
            hints = {
                errno.EPERM: "It takes CAP_SYS_ADMIN.",
                errno.ELOOP: "The image lies on a file system that lies on another one, such as overlay.",
                errno.ENOTTY: "It takes Linux 6.9 or newer.",
            }
            hint = hints.get(error.errno or 0, _HINT)
            raise Error.from_oserror("The kernel cannot be let through to the image", error, hint=hint) from error
