"""`blkferry image bitmap`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import Common, format_option, run, shared

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@click.command("bitmap", short_help="List the dirty bitmaps that an image keeps.")
@click.argument("image")
@format_option
@click.option("-l", "--list", "listing", is_flag=True, help="List them; there is nothing else to do yet.")
@shared()
def command(common: Common, image: str, *, image_format: str | None, listing: bool) -> None:
    """List the persistent dirty bitmaps of an image."""
    del listing

    async def work(daemon: Daemon) -> list[dict[str, Any]]:
        from blkferry.daemon.imaging.information import info_json

        facts = await info_json(daemon, common.name(image, image_format))
        found: list[dict[str, Any]] = facts.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        return found

    bitmaps = run(common, work)
    if common.as_json:
        common.answer(bitmaps)
        return
    for bitmap in bitmaps:
        flags = ", ".join(bitmap["flags"]) or "off"
        common.say(f"{bitmap['name']}: {bitmap['granularity']} bytes a bit, {flags}")
