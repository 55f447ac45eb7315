"""What a person calls an image, and the node options that this means.

A name is a path, "file:PATH", an NBD URI or "json:{...}", or with `as_options` key=value options. A format that
nobody says is probed.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from blkferry.errors import Error, ErrorKind
from blkferry.graph import filename, registry
from blkferry.graph.graph import MAX_DEPTH
from blkferry.graph.loan import Loan, lend
from blkferry.graph.permissions import ALL, Permission
from blkferry.graph.remote import credentials_for
from blkferry.objects.secret import Secret
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.keyval import parse
from blkferry.schema.qom import ObjectOptions
from blkferry.schema.visit import dump, visit
from blkferry.wire.nbd.uri import is_uri

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.drivers.qcow2.header import Header

RAW, QCOW2 = "raw", "qcow2"
READ = Permission.CONSISTENT_READ
WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
CACHES: dict[str, dict[str, bool]] = {
    "writeback": {},
    "writethrough": {},
    "none": {"direct": True},
    "directsync": {"direct": True},
    "unsafe": {"no-flush": True},
}
"""Cache modes by QEMU's names. Everything is flushed at the end, so that writing through makes no difference."""

More: TypeAlias = Mapping[str, object] | None
"""Further options of a node."""

_PROTOCOLS = frozenset({"file", "host_device"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageName:
    """An image and how to open it. `snapshot` is an internal snapshot that is read instead of the disk."""

    name: str
    image_format: str | None = None
    as_options: bool = False
    force_share: bool = False
    cache: str = "writeback"
    snapshot: str | None = None
    shown: str = ""
    """What messages call it, where that is not the name."""

    def __str__(self) -> str:
        return self.shown or self.name

    @property
    def path(self) -> str | None:
        """The path, where the name is one."""
        if self.as_options or self.name.startswith(filename.JSON) or is_uri(self.name):
            return None
        return self.name if os.path.exists(self.name) else self.name.removeprefix("file:")


def formats() -> list[str]:
    """What `image_format` may be, without drivers that hold no image."""
    return sorted(name for name in registry.plugins("drivers") if name in _PROTOCOLS or _is_format(name))


def _is_format(name: str) -> bool:
    return any(field == "file" for field in registry.driver(name).options_type.__struct_fields__)


def check_format(name: str) -> str:
    """The same name, if there is such a format. Raises Error."""
    if name not in registry.plugins("drivers"):
        raise Error(
            ErrorKind.UNSUPPORTED, f"Unknown file format '{name}'", hint=f"Supported formats: {', '.join(formats())}."
        )
    return name


def probed(image: ImageName) -> ImageName:
    """The same image with its format, looked for in the first bytes where nobody said it. Blocking. Raises Error.

    Other servers' exports are raw then: what they hold was written by those who use them.
    """
    path = image.path
    if image.image_format is not None or path is None:
        if image.image_format is not None:
            check_format(image.image_format)
        elif is_uri(image.name) and not image.as_options:
            return replace(image, image_format=RAW)
        return image
    filename.options_for(image.name, RAW)  # says what is wrong with the path
    try:
        found = filename.probe(path)
    except OSError as error:
        raise Error.from_oserror(f"Could not open '{path}'", error, path=path) from error
    if found not in registry.plugins("drivers"):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"'{path}' is a {found} image, which is not supported",
            hint=f"Supported formats: {', '.join(formats())}. To use its bytes as they are, say --format raw.",
        )
    return replace(image, image_format=found)


def options_of(image: ImageName, *, writable: bool = False, chain: bool = True) -> dict[str, Any]:
    """The node options for an image; without `chain` its backing file stays closed. Blocking. Raises Error."""
    image = probed(image)
    if image.as_options:
        options = _from_keyval(image)
    else:
        options = dump(filename.options_for(image.name, image.image_format, read_only=not writable))
    options["read-only"] = not writable
    if cache := CACHES[image.cache]:
        options["cache"] = {**options.get("cache", {}), **cache}
    if writable:
        options.setdefault("discard", "unmap")
    if image.force_share and not writable:
        _share(options)
    driver = registry.driver(options["driver"])
    if not chain and driver.supports_backing:
        options["backing"] = None
    if image.snapshot is not None:
        if "snapshot" not in driver.options_type.__struct_fields__:
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"Failed to load snapshot: '{image}' is a {options['driver']} image, which has no snapshots",
            )
        options["snapshot"] = image.snapshot
    return options


def _from_keyval(image: ImageName) -> dict[str, Any]:
    values = dump(visit(BlockdevOptions, _with_file(parse(image.name).values, image), keyval=True))
    assert isinstance(values, dict)
    return values


def _with_file(values: dict[str, Any], image: ImageName) -> dict[str, Any]:
    """Let 'driver=qcow2,file.filename=x' and 'file.filename=x' do, as they do in QEMU."""
    file = values.get("file")
    if isinstance(file, dict) and "driver" not in file and "filename" in file:
        file = {"driver": filename.protocol_of(file["filename"]), **file}
        values = {**values, "file": file}
    if "driver" in values:
        return values
    if not isinstance(file, dict) or "filename" not in file:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Could not open '{image}': it says neither driver nor file",
            hint="Like driver=qcow2,file.driver=file,file.filename=disk.qcow2.",
        )
    found = probed(ImageName(name=file["filename"], image_format=image.image_format))
    return {**values, "driver": found.image_format}


def _share(options: dict[str, Any]) -> None:
    options["force-share"] = True
    for role in ("file", "data-file"):
        if isinstance(child := options.get(role), dict):
            child["read-only"] = True
            _share(child)


def file_of(image: ImageName, options: dict[str, Any]) -> ImageName:
    """The file that an image with these options is in, as an image of its own."""
    name = filename.JSON + json.dumps(options["file"])
    return replace(image, name=name, image_format=None, as_options=False, snapshot=None, shown=str(image))


def secret_ids(daemon: Daemon) -> list[str]:
    return [name for name, thing in daemon.objects.items() if isinstance(thing, Secret)]


def with_key(options: dict[str, Any], daemon: Daemon) -> dict[str, Any]:
    """Add the key to the options of an encrypted image, and of those below it, where nothing says which it is.

    It is the daemon's only secret; with more of them somebody has to say. Blocking.
    """
    secrets = secret_ids(daemon)
    return _with_key(options, secrets[0], MAX_DEPTH) if len(secrets) == 1 else options


def _with_key(options: dict[str, Any], secret: str, depth: int) -> dict[str, Any]:
    file = options.get("file")
    if options["driver"] != QCOW2 or not isinstance(file, dict) or not depth:
        return options
    path = str(file.get("filename", ""))
    header = _header(path)
    if header is None:
        return options
    more: dict[str, Any] = {}
    if header.crypt_method and "encrypt" not in options:
        more["encrypt"] = {"format": header.crypt_method.name.lower(), "key-secret": secret}
    if header.backing_file is not None and "backing" not in options:
        try:
            below = dump(filename.options_for(header.backing_file, header.backing_format, named_by=path))
        except Error:
            return {**options, **more}  # whoever opens it will say what is wrong
        keyed = _with_key(below, secret, depth - 1)
        if keyed != below:
            more["backing"] = keyed
    return {**options, **more}


def _header(path: str) -> Header | None:
    """The header of the qcow2 image at a path."""
    from blkferry.drivers.qcow2.header import Header

    try:
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(0)
            return Header.parse(file.read(1 << Header.cluster_bits_of(head)))
    except (OSError, Error):
        return None  # whoever opens it will say what is wrong


async def add_credentials(daemon: Daemon, name: str) -> None:
    """Add the object that a URI with TLS needs, if it is not there already. Raises Error."""
    credentials = credentials_for(name) if is_uri(name) else None
    if credentials is not None and credentials["id"] not in daemon.objects:
        await daemon.objects.add(visit(ObjectOptions, credentials, keyval=True))


async def full_options(
    daemon: Daemon,
    image: ImageName,
    *,
    writable: bool = False,
    chain: bool = True,
    more: More = None,
) -> BlockdevOptions:
    """The options to open an image with, key included. Raises Error."""

    def find() -> dict[str, Any]:
        return with_key(options_of(image, writable=writable, chain=chain), daemon)

    if not image.as_options:
        await add_credentials(daemon, image.name)
    options = await daemon.services.in_thread(find)
    return visit(BlockdevOptions, {**options, **(more or {})})


@asynccontextmanager
async def opened(
    daemon: Daemon,
    image: ImageName,
    description: str,
    *,
    writable: bool = False,
    chain: bool = True,
    shared: Permission = ALL,
    more: More = None,
) -> AsyncIterator[Loan]:
    """Open an image, use its node, and close it again. `more` are further node options. Raises Error."""
    options = await full_options(daemon, image, writable=writable, chain=chain, more=more)
    async with AsyncExitStack() as stack:
        used = WRITE if writable else READ
        try:
            loan = await stack.enter_async_context(lend(daemon.graph, options, description, used, shared))
        except Error as error:
            raise about(image, error) from error
        yield loan
        if writable:
            try:
                await loan.run(loan.node.settle())
            except OSError as error:
                raise Error.from_oserror(f"Could not write all of '{image}'", error) from error


def about(image: ImageName, error: Error) -> Error:
    """The error with the image's name in it, and with what this command line calls things."""
    message, hint = error.message, error.hint
    message = message.replace(image.name, str(image))
    if str(image) not in message:
        message = f"Could not open '{image}': {message}"
    if hint == "Add read-only=on if the image is only to be read.":
        hint = ""
    elif "encrypt.key-secret" in message:
        hint = "The image is encrypted: name a file with its password, --object secret,id=key,file=PATH."
    elif error.kind is ErrorKind.BUSY and not image.force_share:
        hint = "Another process has it open. To look at it all the same, say --force-share."
    elif hint == "To open the image without it, say backing=null.":
        hint = ""
    return Error(error.kind, message, hint=hint, **error.facts)
