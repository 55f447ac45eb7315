"""Making images: from "cluster_size=4k,..." to an image file, and what those options are.

A new image that could not be finished is removed again, if the file was not there before.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blkferry.daemon.imaging.names import QCOW2, RAW, ImageName, check_format, opened, secret_ids
from blkferry.errors import Error, ErrorKind
from blkferry.graph import filename, registry
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.keyval import Help, Keyval, parse
from blkferry.schema.visit import visit
from blkferry.units import SECTOR, align_up, parse_size
from blkferry.wire.nbd.uri import is_uri

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

_COMPAT = {"0.10": "v2", "1.1": "v3", "v2": "v2", "v3": "v3"}
_PREALLOCATION = "off, metadata, falloc or full"

OPTIONS: dict[str, dict[str, str]] = {
    RAW: {
        "size": "size of the disk",
        "preallocation": "space for it: off, falloc or full",
        "nocow": "turn copy-on-write off where the file system has it (btrfs): on or off",
    },
    QCOW2: {
        "size": "size of the disk",
        "backing_file": "name of the image that shows where nothing is written (as -b)",
        "backing_fmt": "its format (as -F)",
        "cluster_size": "512 to 2M, a power of two (64k)",
        "compat": "version of the format: v3 (1.1) or v2 (0.10)",
        "compression_type": "what clusters are compressed with: zlib or zstd",
        "preallocation": f"{_PREALLOCATION}",
        "lazy_refcounts": "let reference counts be out of date until the image is closed: on or off",
        "refcount_bits": "width of a reference count: 1, 2, 4, ... 64 (16)",
        "extended_l2": "divide clusters into 32 subclusters: on or off",
        "data_file": "name of a file that the data is put in",
        "data_file_raw": "let that be a raw image by itself: on or off",
        "encrypt.format": "encrypt the disk: luks",
        "encrypt.key-secret": "id of the secret with the password (see --object)",
        "encrypt.cipher-alg": "the cipher: aes-256, aes-192 or aes-128",
        "encrypt.cipher-mode": "its mode: xts, cbc or ecb",
        "encrypt.ivgen-alg": "initialization vectors: plain64, plain or essiv",
        "encrypt.ivgen-hash-alg": "the hash for essiv",
        "encrypt.hash-alg": "the hash of the password",
        "encrypt.iter-time": "milliseconds that trying a password takes (2000)",
        "nocow": "turn copy-on-write off where the file system has it (btrfs): on or off",
    },
}
"""What `-o` takes, per format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """An image that shall be made. `options` are those of `-o`; `size` in bytes may be there instead."""

    name: str
    image_format: str = RAW
    size: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def option(self, name: str) -> str | None:
        return self.options.get(name)


def parse_options(texts: tuple[str, ...] | list[str], image_format: str) -> dict[str, str] | Help:
    """The options of `-o`, which may be given several times; or what to answer to `-o help`. Raises Error."""
    known = OPTIONS.get(check_format(image_format), {})
    found: dict[str, str] = {}
    for text in texts:
        parsed = parse(text)
        if parsed.help:
            return Help(options_help(image_format))
        found |= _flat(parsed)
    for name in found:
        if name not in known:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Invalid parameter '{name}' for format '{image_format}'",
                hint=f"There is: {', '.join(known)}. -o help tells more." if known else "It has no options.",
            )
    return found


def _flat(parsed: Keyval) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in parsed.values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": str(each) for inner, each in value.items()}
        else:
            flat[key] = str(value)
    return flat


def options_help(image_format: str) -> str:
    known = OPTIONS.get(image_format, {})
    width = max(map(len, known), default=0) + 2
    lines = [f"  {name + '=':<{width}} {what}" for name, what in known.items()]
    return "\n".join([f"Options of format {image_format}:", *lines])


def size_of(text: str, what: str = "image size") -> int:
    """Bytes. Raises Error."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Invalid {what} specified: '{text}'", hint=f"{error}.") from error


async def create(daemon: Daemon, new: NewImage, *, unsafe: bool = False) -> NewImage:
    """Make an image; what the file held before is lost. Returns what was made, with its size. Raises Error.

    With `unsafe` the backing file is not looked at.
    """
    new = await _with_size(daemon, new, unsafe=unsafe)
    async with making(daemon, new):
        pass
    return new


@asynccontextmanager
async def making(daemon: Daemon, new: NewImage) -> AsyncIterator[None]:
    """Make an image with a size; what goes wrong in here removes it again if it was not there before."""
    created = [path for path in _files(new) if not os.path.exists(path)]
    try:
        await _create(daemon, new)
        yield
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


def _files(new: NewImage) -> list[str]:
    data = new.option("data_file")
    return [_path(new), *([data] if data is not None else [])]


def _path(new: NewImage) -> str:
    return new.name.removeprefix("file:")


async def _with_size(daemon: Daemon, new: NewImage, *, unsafe: bool) -> NewImage:
    """The same with a size, and with a backing file that has been looked at."""
    check_creator(new.image_format)
    size = new.size
    if (text := new.option("size")) is not None:
        size = size_of(text)
    backing, backing_format = new.option("backing_file"), new.option("backing_fmt")
    if backing and not unsafe:
        found = await backing_length(daemon, new.name, backing, backing_format)
        size = found if size is None else size
    if size is None:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"{new.name}: Image creation needs a size parameter",
            hint="Like: blkferry image create disk.qcow2 10G",
        )
    return NewImage(name=new.name, image_format=new.image_format, size=align_up(size, SECTOR), options=new.options)


async def backing_length(daemon: Daemon, overlay: str, name: str, image_format: str | None) -> int:
    """The length of a backing file, found as the overlay will find it. Raises Error."""
    path = filename.full_path(name, overlay)
    backing = ImageName(name=path, image_format=image_format)
    if image_format is None:
        guess = f" (It looks like {filename.probe(path)}.)" if os.path.isfile(path) else ""
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Backing file specified without backing format",
            hint=f"Say which it is, with -F or backing_fmt=.{guess}",
        )
    async with opened(daemon, backing, "a new overlay") as loan:
        return loan.node.length


def check_creator(image_format: str) -> None:
    """Raise Error unless images of this format can be made."""
    check_format(image_format)
    if registry.driver(image_format).create_options is None and image_format != RAW:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Format driver '{image_format}' does not support image creation",
            hint=f"Images can be made of: {', '.join(OPTIONS)}.",
        )


def is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def is_fixed(path: str) -> bool:
    """Whether a raw image there is as large as it is, and is not made: a block device, or another server's export."""
    return is_uri(path) or is_device(path)


async def _create(daemon: Daemon, new: NewImage) -> None:
    assert new.size is not None
    path = _path(new)
    if new.image_format != QCOW2:
        await _create_raw(daemon, new, path)
        return
    if is_uri(path):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"{path}: Another server's export cannot grow, as a {new.image_format} image has to",
            hint="Make the image in a file.",
        )
    options = await create_options(daemon, new)
    await _create_file(daemon, path, 0, nocow=new.option("nocow"))
    if (data := new.option("data_file")) is not None:
        preallocated = new.option("preallocation") in (None, "off")
        if not (os.path.exists(data) and preallocated):
            await _create_file(daemon, data, 0, nocow=new.option("nocow"))
    await registry.driver(QCOW2).create(daemon.graph, options)


async def _create_raw(daemon: Daemon, new: NewImage, path: str) -> None:
    assert new.size is not None
    if not is_fixed(path):
        await _create_file(daemon, path, new.size, new.option("preallocation"), nocow=new.option("nocow"))
        return
    async with opened(daemon, ImageName(name=path, image_format=RAW), "a new image", writable=True) as loan:
        if loan.node.length < new.size:
            raise Error(
                ErrorKind.NO_SPACE, f"'{path}' has {loan.node.length} bytes, but the image needs {new.size}", path=path
            )


async def _create_file(
    daemon: Daemon, path: str, size: int, preallocation: str | None = None, *, nocow: str | None = None
) -> None:
    if is_device(path):
        return
    made: dict[str, Any] = {"driver": "file", "filename": path, "size": str(size)}
    if preallocation is not None:
        made["preallocation"] = preallocation
    if nocow is not None:
        made["nocow"] = nocow
    options = visit(BlockdevCreateOptions, made, keyval=True)
    await registry.driver("file").create(daemon.graph, options)


async def create_options(daemon: Daemon, new: NewImage) -> BlockdevCreateOptions:
    """The options of blockdev-create for a qcow2 image. Raises Error."""
    given = dict(new.options)
    path = _path(new)
    made: dict[str, Any] = {
        "driver": QCOW2,
        "size": str(new.size or 0),
        "file": {"driver": "host_device" if is_device(path) else "file", "filename": path},
    }
    compat = given.pop("compat", None)
    if compat is not None:
        if compat not in _COMPAT:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Invalid compatibility level '{compat}'",
                hint="There is v3 (or 1.1), and v2 (or 0.10).",
            )
        made["version"] = _COMPAT[compat]
    for name in ("cluster_size", "refcount_bits"):
        if (text := given.pop(name, None)) is not None:
            made[name.replace("_", "-")] = str(size_of(text, name.replace("_", " ")))
    if (data := given.pop("data_file", None)) is not None:
        made["data-file"] = {"driver": "host_device" if is_device(data) else "file", "filename": data}
    encrypt = {key.removeprefix("encrypt."): given.pop(key) for key in list(given) if key.startswith("encrypt.")}
    if encrypt:
        encrypt.setdefault("format", "luks")
        secrets = secret_ids(daemon)
        if len(secrets) == 1:
            encrypt.setdefault("key-secret", secrets[0])
        made["encrypt"] = encrypt
    for name in ("size", "nocow"):
        given.pop(name, None)
    if not given.get("backing_file"):
        given.pop("backing_file", None)
    made |= {name.replace("_", "-"): value for name, value in given.items()}
    return visit(BlockdevCreateOptions, made, keyval=True)
