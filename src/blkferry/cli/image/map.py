"""`blkferry image map`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, fail, format_option, run, shared

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.imaging.mapping import Stretch


@click.command("map", short_help="Say where the bytes of a disk are.")
@click.argument("image")
@format_option
@click.option("-s", "--start-offset", metavar="OFFSET", default="0", help="Begin there.")
@click.option("-l", "--max-length", metavar="LENGTH", help="Tell of so many bytes at most.")
@shared()
def command(common: Common, image: str, *, image_format: str | None, start_offset: str, max_length: str | None) -> None:
    """Say where the bytes of a disk are, which of its backing files holds them, and what is zero.

    Without --json only what is stored is listed: offsets on the disk, lengths, offsets in the file.
    """
    from blkferry.daemon.imaging.creating import size_of
    from blkferry.errors import Error

    try:
        start = size_of(start_offset, "start offset")
        end = None if max_length is None else start + size_of(max_length, "maximum length")
    except Error as error:
        fail(common, error)

    async def work(daemon: Daemon) -> list[Stretch]:
        from blkferry.daemon.imaging.mapping import stretches
        from blkferry.daemon.imaging.names import opened

        async with opened(daemon, common.name(image, image_format), "map") as loan:
            if start > loan.node.length:
                raise _beyond(start, loan.node.length)
            return [each async for each in stretches(loan.node, start, end)]

    found = run(common, work)
    if common.as_json:
        click.echo(_json(found))
    else:
        click.echo("".join(_lines(common, found)), nl=False)


def _beyond(start: int, length: int) -> Exception:
    from blkferry.errors import Error, ErrorKind

    return Error(ErrorKind.INVALID_ARGUMENT, f"The disk ends at {length}, before offset {start}")


def _json(found: list[Stretch]) -> str:
    """One line per stretch, as qemu-img writes it: there may be many."""
    import json

    lines = []
    for each in found:
        members = {
            "start": each.start,
            "length": each.length,
            "depth": each.depth,
            "present": each.present,
            "zero": each.zero,
            "data": each.data,
            "compressed": each.compressed,
        }
        if each.offset is not None:
            members["offset"] = each.offset
        lines.append(json.dumps(members))
    return "[" + ",\n".join(lines) + "]"


def _lines(common: Common, found: list[Stretch]) -> list[str]:
    from blkferry.errors import Error, ErrorKind

    lines = [f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"]
    for each in found:
        if each.data and not each.zero:
            if each.offset is None:
                hint = "They have no place of their own. --json tells of them too."
                message = "File contains external, encrypted or compressed clusters."
                fail(common, Error(ErrorKind.UNSUPPORTED, message, hint=hint))
            lines.append(f"{each.start:<#16x}{each.length:<#16x}{each.offset:<#16x}{each.filename or ''}\n")
    return lines
