"""What happens when a structure turns out to be impossible: everybody is told, and the image takes no more writes."""

from __future__ import annotations

import errno
import logging
from types import TracebackType
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.words import CorruptError
from blkferry.errors import Error

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

log = logging.getLogger(__name__)


class Marking:
    """Within this, a CorruptError takes the node offline for writing; what comes out is an OSError."""

    def __init__(self, node: Qcow2) -> None:
        self._node = node

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        if isinstance(error, CorruptError):
            self._node.found_corruption(error)
        elif isinstance(error, Error):  # from a child that was to be made longer
            raise OSError(errno.EIO, error.message) from error


def report(node: Qcow2, error: CorruptError) -> None:
    """Log it, and emit BLOCK_IMAGE_CORRUPTED."""
    fatal = node.metadata.writable
    text = "image is corrupt, and takes no more writes" if fatal else "image is corrupt"
    log.error("%s: %s: %s", node.filename(), text, error.strerror)
    node.emit(
        "BLOCK_IMAGE_CORRUPTED",
        {
            "device": "",
            "node-name": node.name,
            "msg": str(error.strerror),
            "offset": error.offset,
            "fatal": fatal,
        },
    )


async def mark(node: Qcow2) -> None:
    """Set the corrupt bit, so that nobody writes to the image until it is repaired. Version 2 has no such bit."""
    metadata = node.metadata
    if node.header.version < 3:
        return
    try:
        await metadata.set_corrupt()
        node.header_changed()
    except OSError as error:
        log.error("%s: could not mark the image as corrupt: %s", node.filename(), error.strerror)  # noqa: TRY400
