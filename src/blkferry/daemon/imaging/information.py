"""What is known of an image: the facts and JSON members of `qemu-img info`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blkferry.daemon.imaging.names import QCOW2, ImageName, file_of, opened, options_of, probed
from blkferry.drivers.qcow2.peeking import peek
from blkferry.errors import Error, ErrorKind
from blkferry.graph.filename import refuse_remote
from blkferry.schema.image import ImageInfo
from blkferry.schema.visit import dump

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.node import Node

MAX_CHAIN = 200


async def info(daemon: Daemon, image: ImageName) -> ImageInfo:
    """The facts about one image; its backing file is not opened. Raises Error."""
    return (await _examine(daemon, image))[0]


async def info_json(daemon: Daemon, image: ImageName) -> dict[str, Any]:
    """The same as qemu-img writes it. Raises Error."""
    return (await _examine(daemon, image))[1]


async def chain(daemon: Daemon, image: ImageName) -> list[tuple[ImageInfo, dict[str, Any]]]:
    """An image, its backing file, the backing file of that, and so on. Raises Error."""
    found: list[tuple[ImageInfo, dict[str, Any]]] = []
    seen: set[str] = set()
    while True:
        if image.name in seen or len(found) >= MAX_CHAIN:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Backing file '{image.name}' creates an infinite loop.",
                hint="An image of the chain names one above it; set it right with: blkferry image rebase -u.",
            )
        seen.add(image.name)
        facts, written = await _examine(daemon, image)
        found.append((facts, written))
        if facts.full_backing_filename is None:
            return found
        refuse_remote(facts.full_backing_filename, facts.backing_filename_format, facts.filename)
        image = replace(
            image, name=facts.full_backing_filename, image_format=facts.backing_filename_format, as_options=False
        )


async def _examine(daemon: Daemon, image: ImageName) -> tuple[ImageInfo, dict[str, Any]]:
    image = await daemon.services.in_thread(probed, image)
    options = await daemon.services.in_thread(options_of, image)
    if options["driver"] == QCOW2 and isinstance(options.get("file"), dict):
        return await _peek(daemon, image, options)
    async with opened(daemon, image, "info", chain=False) as loan:
        return await loan.run(_described(loan.node, loan.node.image_info))


async def _peek(daemon: Daemon, image: ImageName, options: dict[str, Any]) -> tuple[ImageInfo, dict[str, Any]]:
    """Look into a qcow2 image without opening it: that takes neither key nor data file."""
    file = file_of(image, options)
    async with opened(daemon, file, "info") as loan:
        try:
            found = await loan.run(peek(loan.node))
        except (Error, OSError) as error:
            raise _unreadable(image, error) from error
        return await loan.run(_described_as(found, {"file": loan.node}))


def _unreadable(image: ImageName, error: Error | OSError) -> Error:
    doing = f"Could not open '{image}'"
    if isinstance(error, OSError):
        return Error.from_oserror(doing, error)
    return Error(error.kind, f"{doing}: {error.message}", hint=error.hint, **error.facts)


async def _described(node: Node, found: Callable[[], ImageInfo]) -> tuple[ImageInfo, dict[str, Any]]:
    return await _described_as(found(), {role: edge.node for role, edge in node.children.items()})


async def _described_as(found: ImageInfo, children: dict[str, Node]) -> tuple[ImageInfo, dict[str, Any]]:
    written = dump(found)
    written.setdefault("dirty-flag", False)
    written["children"] = [
        {"name": role, "info": {**_plain(dump(child.image_info())), "children": []}} for role, child in children.items()
    ]
    return found, written


def _plain(written: dict[str, Any]) -> dict[str, Any]:
    written.setdefault("dirty-flag", False)
    return written
