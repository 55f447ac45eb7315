"""`blkferry image rebase`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, format_option, run, shared
from blkferry.cli.image.progress import showing

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@click.command("rebase", short_help="Give an image another backing file.")
@click.argument("image")
@format_option
@click.option("-b", "--backing", metavar="FILE", required=True, help="The new backing file; '' for none.")
@click.option("-F", "-B", "--backing-format", metavar="FORMAT", help="Its format.")
@click.option(
    "-u", "--unsafe", is_flag=True, help="Copy nothing: the file was only moved or renamed. Content may change."
)
@shared(share=False, progress=True, caches=("-t", "-T"))
def command(
    common: Common, image: str, *, image_format: str | None, backing: str, backing_format: str | None, unsafe: bool
) -> None:
    """Give an image another backing file, with the same content as before: what differs is copied into it first.

    The backing file is named as the image shall name it: a relative path begins in the image's directory.

    \b
    blkferry image rebase -b base2.qcow2 -F qcow2 vm.qcow2
    blkferry image rebase -b '' vm.qcow2                       it stands on its own
    blkferry image rebase -u -b /new/place/base.qcow2 -F qcow2 vm.qcow2
    """  # noqa: D301
    with showing(common, "Copying") as progress:

        async def work(daemon: Daemon) -> int:
            from blkferry.daemon.imaging.rebase import rebase

            name = common.name(image, image_format)
            return await rebase(daemon, name, backing or None, backing_format, unsafe=unsafe, progress=progress)

        copied = run(common, work)
    if common.as_json:
        common.answer({"filename": image, "backing-filename": backing or None, "copied": copied})
