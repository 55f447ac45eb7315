"""From what a person calls an image to the options of a node: a path, a block device, or "memory:1G".

A container format is never served as raw bytes because nobody said what it is: its first bytes are looked at, and
what is not raw is refused with what to say instead.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from blkferry.errors import Error, ErrorKind
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.units import parse_size

MEMORY = "memory:"
FORMATS = ("raw",)

_MAGICS = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"LUKS\xba\xbe": "luks",
}


def options_for(
    image: str,
    node_name: str,
    *,
    writable: bool = False,
    image_format: str | None = None,
    direct: bool = False,
    discard: bool = True,
) -> BlockdevOptions:
    """The options of a node for `image`. Raises Error with what is wrong with it and what to do."""
    if image_format is not None and image_format not in FORMATS:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Format '{image_format}' is not supported",
            hint=f"Supported: {', '.join(FORMATS)}.",
        )
    options: dict[str, Any] = {"node-name": node_name, "read-only": not writable}
    if discard:
        options["discard"] = "unmap"
    if image.startswith(MEMORY):
        options |= {"driver": "memory", "size": _memory_size(image)}
    else:
        options |= {"driver": _driver_for(image, image_format), "filename": image, "cache": {"direct": direct}}
    return visit(BlockdevOptions, options)


def _memory_size(image: str) -> int:
    try:
        return parse_size(image.removeprefix(MEMORY))
    except ValueError as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{image}': {error}", hint="Like memory:1G.") from error


def _driver_for(path: str, image_format: str | None) -> str:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISBLK(mode):
            return "host_device"
        if stat.S_ISDIR(mode):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"'{path}' is a directory, not a disk image", path=path)
        if not stat.S_ISREG(mode):
            raise Error(ErrorKind.INVALID_ARGUMENT, f"'{path}' is neither a regular file nor a block device", path=path)
        if image_format is None:
            with open(path, "rb") as image:
                _refuse_container(path, image.read(8))
    except OSError as error:
        hint = f"The path was taken relative to {os.getcwd()}." if not os.path.isabs(path) else ""
        raise Error.from_oserror(f"Could not open '{path}'", error, hint=hint, path=path) from error
    return "file"


def _refuse_container(path: str, head: bytes) -> None:
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"'{path}' is a {name} image, which is not supported yet",
                hint="To serve the bytes of the container as they are, say format raw.",
                path=path,
            )
