"""`blkferry image info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import Common, format_option, run, shared
from blkferry.cli.image.text import info_text

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@click.command("info", short_help="Say what is known of an image.")
@click.argument("image")
@format_option
@click.option("--backing-chain", is_flag=True, help="Tell of its backing files too.")
@shared()
def command(common: Common, image: str, *, image_format: str | None, backing_chain: bool) -> None:
    """Say what is known of an image: format, sizes, backing file, snapshots, bitmaps.

    This needs no password, and no backing file to be there.
    """

    async def work(daemon: Daemon) -> list[dict[str, Any]]:
        from blkferry.daemon.imaging import information

        name = common.name(image, image_format)
        if backing_chain:
            return [written for _, written in await information.chain(daemon, name)]
        return [await information.info_json(daemon, name)]

    found = run(common, work)
    if common.as_json:
        common.answer(found if backing_chain else found[0])
    else:
        click.echo("\n".join(info_text(each) for each in found), nl=False)
