"""`blkferry image commit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, format_option, run, shared
from blkferry.cli.image.progress import showing

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@click.command("commit", short_help="Write what an overlay holds into its backing file.")
@click.argument("image")
@format_option
@click.option("-b", "--base", metavar="FILE", help="Go down to this image of the chain; then nothing is emptied.")
@click.option("-d", "--keep", is_flag=True, help="Do not empty the image afterwards.")
@shared(share=False, progress=True, caches=("-t",))
def command(common: Common, image: str, *, image_format: str | None, base: str | None, keep: bool) -> None:
    """Write what an overlay holds into its backing file, and empty the overlay.

    Other overlays of that backing file are no longer good afterwards, nor are images between it and this one.
    """
    with showing(common, "Committing") as progress:

        async def work(daemon: Daemon) -> int:
            from blkferry.daemon.imaging.commit import commit

            return await commit(daemon, common.name(image, image_format), base=base, keep=keep, progress=progress)

        written = run(common, work)
    if common.as_json:
        common.answer({"filename": image, "written": written})
    common.say("Image committed.")
