"""`blkferry mount`: from images and files to a daemon that shows the ones as the others, until all are unmounted."""

from __future__ import annotations

import asyncio
import enum
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blkferry.cli.ready import LABEL_WIDTH, Line, write, write_lines
from blkferry.cli.serve import add_objects, add_qmp, default_name, open_image
from blkferry.daemon.daemon import Daemon
from blkferry.daemon.mounts import FuseMount, mount
from blkferry.daemon.run import go_to_background, run
from blkferry.exports.fuse import mountinfo, mountpoint
from blkferry.exports.fuse.mounting import does_not_answer
from blkferry.plane.patience import within
from blkferry.schema.export import BlockExportOptionsFuse, FuseExportAllowOther
from blkferry.units import format_size

LOOK_SECONDS = 5.0
"""How long to wait for what a path leads to."""


class Speech(enum.Enum):
    """How to say where the files are."""

    PROSE = enum.auto()
    FILES = enum.auto()
    JSON = enum.auto()


@dataclass(frozen=True, slots=True)
class Mounts:
    """What was asked for: for each image a file, or a directory for it, or None."""

    images: tuple[str, ...]
    files: tuple[str | None, ...]
    writable: bool
    growable: bool
    image_format: str | None
    allow_other: str
    passthrough: bool
    over: bool
    direct: bool
    discard: bool
    objects: tuple[str, ...]
    qmp: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """An image that is a file now."""

    image: str
    mount: FuseMount
    size: int
    writable: bool

    def describe(self) -> Iterator[Line]:
        file = shlex.quote(self.mount.path)
        how = "writable" if self.writable else "read-only"
        yield [(self.image, "bold"), (f": {format_size(self.size)}, {how}, is", "")]
        yield [("  ", ""), (self.mount.path, "bold green")]
        read_only = "" if self.writable else "--read-only "
        attach = f"sudo losetup --find --show --partscan {read_only}{file}"
        for label, text in (
            ("look", f"fdisk -l {file}"),
            ("attach", attach)
            if self.mount.allow_other
            else ("private", "only you can open it, which --allow-other changes"),
            ("unmount", f"blkferry umount {file}"),
        ):
            yield [(f"  {label + ':':<{LABEL_WIDTH}} ", "dim"), (text, "")]


def mount_images(request: Mounts, speech: Speech, *, foreground: bool) -> None:
    """Mount, say so, and stay or go to the background until the last one is unmounted. Raises Error."""
    shown: list[Shown] = []
    watching: list[asyncio.Task[None]] = []
    detach = None if foreground else go_to_background()

    async def fill(daemon: Daemon) -> None:
        await add_objects(daemon, request.objects)
        for number, (image, file) in enumerate(zip(request.images, request.files, strict=True)):
            shown.append(await _show(daemon, request, number, image, file))
        if request.qmp is not None:
            await add_qmp(daemon, request.qmp)

    def ready(daemon: Daemon) -> None:
        _say(shown, request, speech)
        watching.append(asyncio.create_task(_until_all_unmounted(daemon, shown)))
        if detach is not None:
            sys.stdout.flush()
            detach()

    run(fill, on_ready=ready)


async def _until_all_unmounted(daemon: Daemon, shown: Sequence[Shown]) -> None:
    for each in shown:
        await each.mount.unmounted()
    daemon.finished.set()


async def _show(daemon: Daemon, request: Mounts, number: int, image: str, file: str | None) -> Shown:
    try:
        target = await within(LOOK_SECONDS, _target, image, file)
    except TimeoutError as error:
        raise does_not_answer(file or os.curdir) from error
    node = await open_image(
        daemon,
        image,
        f"disk{number}",
        writable=request.writable,
        image_format=request.image_format,
        direct=request.direct,
        discard=request.discard,
    )
    options = BlockExportOptionsFuse(
        id=node.name,
        node_name=node.name,
        mountpoint=target,
        writable=not node.read_only,
        growable=request.growable,
        allow_other=FuseExportAllowOther(request.allow_other),
        passthrough=request.passthrough,
    )
    made = await mount(daemon, options, over=request.over, owns_node=True)
    return Shown(image, made, node.length, options.writable)


def _target(image: str, file: str | None) -> str:
    """The file that is to show an image. Blocks."""
    name = f"{os.path.splitext(default_name(image))[0]}.raw"
    if file is None:
        return name
    return os.path.join(file, name) if os.path.isdir(file) else file


def _say(shown: Sequence[Shown], request: Mounts, speech: Speech) -> None:
    match speech:
        case Speech.PROSE:
            write_lines([line for each in shown for line in each.describe()])
        case Speech.FILES:
            write("".join(f"{each.mount.path}\n" for each in shown))
        case Speech.JSON:
            mounts = [
                {
                    "image": each.image,
                    "file": each.mount.path,
                    "size": each.size,
                    "writable": each.writable,
                    "allow-other": each.mount.allow_other,
                }
                for each in shown
            ]
            qmp = request.qmp and os.path.abspath(request.qmp)
            write(json.dumps({"pid": os.getpid(), "qmp": qmp, "mounts": mounts}) + "\n")


def list_mounts(speech: Speech) -> None:
    """Say what is mounted, by this or another process."""
    mounts = [mounted for mounted in mountinfo.mounts() if mounted.ours]
    match speech:
        case Speech.PROSE if not mounts:
            sys.stderr.write("Nothing is mounted by blkferry.\n")
        case Speech.PROSE:
            write_lines(
                [
                    [(each.path, "bold green"), (f": {each.source}{'' if served else ', no longer served'}", "")]
                    for each, served in _served(mounts)
                ]
            )
        case Speech.FILES:
            write("".join(f"{each.path}\n" for each in mounts))
        case Speech.JSON:
            entries = [{"image": each.source, "file": each.path, "served": served} for each, served in _served(mounts)]
            write(json.dumps({"mounts": entries}) + "\n")


def _served(mounts: Sequence[mountinfo.Mounted]) -> Iterator[tuple[mountinfo.Mounted, bool]]:
    """Tell of each whether there is still a daemon behind it; one that does not answer is one."""
    for mounted in mounts:
        try:
            yield mounted, not asyncio.run(within(LOOK_SECONDS, mountpoint.dead, mounted.path))
        except TimeoutError:
            yield mounted, True
