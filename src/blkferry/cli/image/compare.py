"""`blkferry image compare`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, run, shared
from blkferry.cli.image.progress import showing

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.imaging.compare import Comparison

SAME, DIFFERENT, FAILED = 0, 1, 2


@click.command(
    "compare",
    short_help="Say whether two images have the same content.",
    epilog="Exit codes: 0 they are the same, 1 they differ, 2 they could not be compared.",
)
@click.argument("one")
@click.argument("other")
@click.option("-f", "--format", "image_format", metavar="FORMAT", help="Format of the first image.")
@click.option("-F", "--other-format", metavar="FORMAT", help="Format of the second image.")
@click.option("-s", "--strict", is_flag=True, help="Let sizes and what is allocated count too.")
@shared(progress=True, caches=("-T",))
def command(
    common: Common,
    one: str,
    other: str,
    *,
    image_format: str | None,
    other_format: str | None,
    strict: bool,
) -> None:
    """Say whether two images have the same content, whatever their formats. One may be longer, with zeroes."""
    common.failure = FAILED
    with showing(common, "Comparing") as progress:

        async def work(daemon: Daemon) -> Comparison:
            from blkferry.daemon.imaging.compare import compare

            first = common.name(one, image_format)
            second = common.name(other, other_format)
            return await compare(daemon, first, second, strict=strict, progress=progress)

        found = run(common, work)
    if common.as_json:
        members: dict[str, object] = {"identical": found.difference is None, "sizes-differ": found.sizes_differ}
        if found.difference is not None:
            members |= {"difference": found.difference.value, "offset": found.offset}
        common.answer(members)
    else:
        _tell(common, found)
    sys.exit(SAME if found.difference is None else DIFFERENT)


def _tell(common: Common, found: Comparison) -> None:
    from blkferry.daemon.imaging.compare import Difference

    if found.sizes_differ and found.difference is not Difference.SIZE:
        common.say("Warning: Image size mismatch!")
    match found.difference:
        case None:
            common.say("Images are identical.")
        case Difference.SIZE:
            common.say("Strict mode: Image size mismatch!")
        case Difference.ALLOCATION:
            common.say(f"Strict mode: Offset {found.offset} block status mismatch!")
        case Difference.CONTENT:
            common.say(f"Content mismatch at offset {found.offset}!")
