"""Adding an export for the command line."""

from __future__ import annotations

from blkferry.daemon.daemon import Daemon
from blkferry.errors import Error, ErrorKind
from blkferry.schema.export import BlockExportOptions


async def export(daemon: Daemon, image: str, options: BlockExportOptions) -> None:
    """Export the node of an image, by whose name errors call it. Raises Error."""
    try:
        await daemon.exports.add(options)
    except Error as error:
        if image in error.message:
            raise
        # Somebody else has the image: the locks do not know what we call it.
        hint = "Stop it first, or serve a copy of the image." if error.kind is ErrorKind.BUSY else error.hint
        raise Error(error.kind, f"Cannot serve '{image}': {error.message}", hint=hint) from error
