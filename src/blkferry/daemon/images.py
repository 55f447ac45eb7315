"""From what a person calls an image to the options of a node: a path, a block device, "json:{...}",
"memory:1G", or the NBD URI of an export.

What a file holds is looked for in its first bytes where nobody says it, so that a container is never served by mistake
as the bytes it consists of. An image with backing files is opened with all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blkferry.daemon.imaging.names import RAW, ImageName, check_format, options_of, with_key
from blkferry.errors import Error, ErrorKind
from blkferry.graph import filename
from blkferry.graph.remote import remote_options
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.units import parse_size
from blkferry.wire.nbd.uri import is_uri

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

MEMORY = "memory:"


def options_for(
    image: str,
    node_name: str,
    *,
    writable: bool = False,
    image_format: str | None = None,
    direct: bool = False,
    discard: bool = True,
    secrets_of: Daemon | None = None,
) -> BlockdevOptions:
    """The options of a node for `image`. Raises Error with what is wrong with it and what to do.

    An encrypted image is opened with the secret of the daemon `secrets_of`, if that has just one. The credentials of a
    URI with TLS are expected to be there (`names.add_credentials`).
    """
    options: dict[str, Any]
    if image.startswith(MEMORY):
        options = {"driver": "memory", "size": _memory_size(image), "read-only": not writable}
    elif is_uri(image):
        options = _remote_options(image, image_format, writable=writable)
    else:
        options = _file_options(image, image_format, writable=writable, secrets_of=secrets_of)
        options["cache"] = {"direct": direct}
    options["node-name"] = node_name
    if discard:
        options["discard"] = "unmap"
    else:
        options.pop("discard", None)
    return visit(BlockdevOptions, options)


def _file_options(image: str, image_format: str | None, *, writable: bool, secrets_of: Daemon | None) -> dict[str, Any]:
    if image_format is not None:
        check_format(image_format)
    options = options_of(ImageName(name=image, image_format=image_format), writable=writable)
    file = options.get("file")
    if options["driver"] == RAW and isinstance(file, dict) and not image.startswith(filename.JSON):
        return {**file, "read-only": not writable}  # nothing has to stand between the file and its users
    return options if secrets_of is None else with_key(options, secrets_of)


def _remote_options(image: str, image_format: str | None, *, writable: bool) -> dict[str, Any]:
    """What an NBD URI means: raw, unless a format is asked for, for nothing is read to find out."""
    options = {**remote_options(image), "read-only": not writable}
    if image_format in (None, RAW):
        return options
    check_format(image_format)
    return {"driver": image_format, "file": options, "read-only": not writable}


def _memory_size(image: str) -> int:
    try:
        return parse_size(image.removeprefix(MEMORY))
    except ValueError as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{image}': {error}", hint="Like memory:1G.") from error
