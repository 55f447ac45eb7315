"""From what an image (or a person) calls another image to the options of a node: a path, "file:path", an NBD URI or
"json:{...}".

What an image names is opened only as what it says it is, from plain paths: an image that connects whoever opens it to
a server would be a way into their network, so only people may name servers. A format that is not named is probed, and
said to be a guess: a raw disk whose guest wrote the header of a container into it would be opened as that container.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
from typing import Any

from blkferry.errors import Error, ErrorKind
from blkferry.graph import registry
from blkferry.graph.remote import credentials_for, remote_options
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.visit import visit
from blkferry.wire.nbd.uri import is_uri

log = logging.getLogger(__name__)

JSON = "json:"
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*:", re.ASCII)

MAGICS = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"LUKS\xba\xbe": "luks",
}


def probe(path: str) -> str:
    """The format that the first bytes of a file look like; "raw" for everything else. Raises OSError."""
    with open(path, "rb") as image:
        head = image.read(8)
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), "raw")


def protocol_of(path: str) -> str:
    """The driver that opens this path: "file" or "host_device". Raises Error for what is neither."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        hint = f"The path was taken relative to {os.getcwd()}." if not os.path.isabs(path) else ""
        raise Error.from_oserror(f"Could not open '{path}'", error, hint=hint, path=path) from error
    if stat.S_ISBLK(mode):
        return "host_device"
    if stat.S_ISDIR(mode):
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{path}' is a directory, not a disk image", path=path)
    if not stat.S_ISREG(mode):
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{path}' is neither a regular file nor a block device", path=path)
    return "file"


def full_path(name: str, named_by: str) -> str:
    """What `name` means within an image at `named_by`: relative paths begin in that image's directory."""
    if name.startswith(JSON) or is_uri(name):
        return name
    plain = name.removeprefix("file:")
    if os.path.isabs(plain) or not os.path.dirname(named_by):
        return plain
    return os.path.join(os.path.dirname(named_by), plain)


def options_for(name: str, image_format: str | None, *, named_by: str = "", read_only: bool = True) -> BlockdevOptions:
    """The options of the node for an image that is called `name` in the image at `named_by`.

    Without a format, what a URI names is raw: nothing is read from the server to find out. Blocking: call it in a
    thread. Raises Error.
    """
    if named_by:
        refuse_remote(name, image_format, named_by)
    if name.startswith(JSON) or is_uri(name):
        options = _from_json(name) if name.startswith(JSON) else remote_options(name)
        if image_format is None and is_uri(name):
            image_format = "raw"
        if image_format is not None and options.get("driver") != image_format:
            options = {"driver": image_format, "file": options}
        return visit(BlockdevOptions, {**options, "read-only": read_only})
    if (protocol := _PROTOCOL.match(name)) is not None and protocol[0] != "file:" and not os.path.exists(name):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Unknown protocol '{protocol[0][:-1]}'",
            hint=f"'{name}' was named by '{named_by}'; supported are paths, file: and json:." if named_by else "",
        )
    path = full_path(name, named_by)
    driver = protocol_of(path)
    if image_format is None:
        image_format = _guess(path, named_by)
    if image_format in registry.plugins("drivers") and image_format in {"file", "host_device"}:
        return visit(BlockdevOptions, {"driver": image_format, "filename": path, "read-only": read_only})
    return visit(
        BlockdevOptions,
        {"driver": image_format, "read-only": read_only, "file": {"driver": driver, "filename": path}},
    )


def refuse_remote(name: str, image_format: str | None, named_by: str) -> None:
    """Raise Error(DENIED) if `name`, which the image at `named_by` gives its backing file, is a server's export."""
    options = _from_json(name) if name.startswith(JSON) else remote_options(name) if is_uri(name) else {}
    if not _connects(options):
        return
    if image_format is not None and options.get("driver") != image_format:
        options = {"driver": image_format, "file": options}
    wanted = f'"backing": {json.dumps(options)}'
    with contextlib.suppress(OSError):
        top = {"driver": probe(named_by), "file": {"driver": "file", "filename": named_by}, "backing": options}
        wanted = JSON + json.dumps(top)
    if is_uri(name) and (credentials := credentials_for(name)) is not None:
        wanted += ", with --object " + ",".join(f"{key}={value}" for key, value in credentials.items())
    raise Error(
        ErrorKind.DENIED,
        f"The image '{named_by}' names a server: '{name}'",
        hint=f"Images may not connect us to servers. If you want this one, name it yourself: {wanted}",
    )


def _connects(options: object) -> bool:
    """Whether these options, or any within them, are of a node that is a client."""
    found = [options]
    while found:
        match found.pop():
            case {"driver": "nbd"}:
                return True
            case dict() as inner:
                found += inner.values()
    return False


def _from_json(name: str) -> dict[str, Any]:
    try:
        options = json.loads(name.removeprefix(JSON))
    except (ValueError, RecursionError) as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Could not parse the JSON options: {error}", path=name) from error
    if not isinstance(options, dict):
        raise Error(ErrorKind.INVALID_ARGUMENT, "Could not parse the JSON options: not an object", path=name)
    return options


def _guess(path: str, named_by: str) -> str:
    try:
        found = probe(path)
    except OSError as error:
        raise Error.from_oserror(f"Could not open '{path}'", error, path=path) from error
    log.warning(
        "'%s' does not say what format its backing file '%s' has; taking it for %s, which its guest may have forged",
        named_by,
        path,
        found,
    )
    return found
