"""`blkferry image resize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, format_option, run, shared

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@click.command("resize", short_help="Make a disk longer or shorter.", context_settings={"ignore_unknown_options": True})
@click.argument("image")
@click.argument("size")
@format_option
@click.option("--shrink", is_flag=True, help="Yes, delete what is behind the new end.")
@click.option(
    "--preallocation",
    type=click.Choice(["off", "falloc", "full"]),
    default="off",
    help="Take the space for what is new at once.  [default: off]",
)
@shared(share=False)
def command(
    common: Common, image: str, size: str, *, image_format: str | None, shrink: bool, preallocation: str
) -> None:
    """Make a disk longer or shorter: to SIZE, or by as much as +SIZE or -SIZE says.

    \b
    blkferry image resize vm.qcow2 +10G
    blkferry image resize --shrink disk.img 5G
    """  # noqa: D301

    async def work(daemon: Daemon) -> tuple[int, int]:
        from blkferry.daemon.imaging.sizing import resize
        from blkferry.schema.create import PreallocMode

        name = common.name(image, image_format)
        return await resize(daemon, name, size, shrink=shrink, preallocation=PreallocMode(preallocation))

    old, new = run(common, work)
    if common.as_json:
        common.answer({"filename": image, "old-size": old, "virtual-size": new})
    common.say("Image resized.")
