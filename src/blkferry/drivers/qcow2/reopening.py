"""Other options for an image in use: above all, from writable to read-only and back (blockdev-reopen)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import opening
from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2
    from blkferry.graph.reopen import Reopening

log = logging.getLogger(__name__)

REOPENABLE = frozenset(
    {
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-clean-interval",
    }
)


async def prepare(node: Qcow2, reopening: Reopening) -> None:
    """A writer writes everything first, and leaves the image as if it were closed. Raises Error."""
    if not reopening.read_only:
        opening.check_writable(node, node.header, read_only=False)
    if not node.metadata.writable or node.corrupt:
        return
    try:
        await node.settle()
    except OSError as error:
        raise Error.from_oserror(f"Could not write the metadata of '{node.name}'", error, node=node.name) from error
    reopening.prepared = "settled"


async def commit(node: Qcow2, reopening: Reopening) -> None:
    """Begin anew from what is on disk, with the options that hold now."""
    del reopening
    await node.metadata.reclaiming.end()
    try:
        await opening.reload(node)
    except (OSError, Error) as error:  # it must not fail: whatever was wrong, nobody writes to the image any more
        log.error("%s: could not be opened anew: %s", node.filename(), error)  # noqa: TRY400
        node.corrupt = True
        node.update_mapper()


async def abort(node: Qcow2, reopening: Reopening) -> None:
    """Go on writing."""
    if reopening.prepared == "settled":
        await node.bitmaps.take_into_use(node)


async def change_backing_file(node: Qcow2, name: str | None, image_format: str | None) -> None:
    """Change what the header says of the backing file. Raises Error."""
    if node.raw_data is not None and name:
        raise Error(
            ErrorKind.UNSUPPORTED,
            "Cannot set a backing file for images with a raw external data file",
            hint="The raw data file has to be complete by itself.",
        )
    if name is not None and len(name.encode()) > 1023:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Backing file name too long", hint="At most 1023 bytes.")
    try:
        await node.metadata.rewrite_header(backing_file=name or None, backing_format=image_format if name else None)
    except OSError as error:
        raise Error.from_oserror(f"Could not change backing file to '{name or ''}'", error, node=node.name) from error
    node.header_changed()
