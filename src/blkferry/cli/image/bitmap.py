"""`blkferry image bitmap`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import Common, format_option, run, shared
from blkferry.units import parse_size

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

_ORDER = "bitmap actions"


def _note(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Remember the order in which actions are named: click calls this in the order of the command line."""
    if value:
        times = len(value) if isinstance(value, tuple) else 1
        ctx.meta.setdefault(_ORDER, []).extend([parameter.name] * times)
    return value


@click.command("bitmap", short_help="List and change the dirty bitmaps that an image keeps.")
@click.argument("image")
@click.argument("bitmap", required=False)
@format_option
@click.option("-l", "--list", "listing", is_flag=True, help="List them; so does no option at all.")
@click.option("--add", is_flag=True, callback=_note, expose_value=False, help="Add a bitmap.")
@click.option("--remove", is_flag=True, callback=_note, expose_value=False, help="Remove it.")
@click.option("--clear", is_flag=True, callback=_note, expose_value=False, help="Forget what it has recorded.")
@click.option("--enable", is_flag=True, callback=_note, expose_value=False, help="Record, when the image is used.")
@click.option("--disable", is_flag=True, callback=_note, expose_value=False, help="Record no more.")
@click.option("--merge", metavar="BITMAP", multiple=True, callback=_note, help="Add what another one has recorded.")
@click.option("-b", "--source-file", metavar="IMAGE", help="The image whose bitmaps are merged.")
@click.option("-F", "--source-format", metavar="FORMAT", help="The format of that image.")
@click.option("-g", "--granularity", metavar="SIZE", help="Bytes a bit, of a bitmap that is added.")
@shared()
def command(
    common: Common,
    image: str,
    bitmap: str | None,
    *,
    image_format: str | None,
    listing: bool,
    merge: tuple[str, ...],
    source_file: str | None,
    source_format: str | None,
    granularity: str | None,
) -> None:
    """List the persistent dirty bitmaps of an image that nobody uses meanwhile, or change one.

    Several changes are made in the order of the options; all that is to be merged is at the first --merge.

    \b
    blkferry image bitmap --add --disable vm.qcow2 monday
    blkferry image bitmap --merge tuesday -b overlay.qcow2 vm.qcow2 monday
    """  # noqa: D301
    actions: list[str] = click.get_current_context().meta.get(_ORDER, [])
    if listing and actions:
        raise click.UsageError("--list goes with no other action.")
    if bool(actions) != (bitmap is not None):
        raise click.UsageError("An action needs the name of a bitmap, and a bitmap an action such as --add.")
    if bitmap is None:
        _list(common, image, image_format)
        return
    name, source = bitmap, None if source_file is None else common.name(source_file, source_format)
    if "add" not in actions and granularity is not None:
        raise click.UsageError("--granularity goes with --add.")
    if not merge and source is not None:
        raise click.UsageError("--source-file goes with --merge.")
    try:
        size = None if granularity is None else parse_size(granularity)
    except ValueError as error:
        raise click.UsageError(str(error)) from error

    async def work(daemon: Daemon) -> None:
        from blkferry.daemon.imaging import bitmaps

        target = common.name(image, image_format)
        await bitmaps.change(daemon, target, name, actions, granularity=size, sources=list(merge), source_image=source)

    run(common, work)


def _list(common: Common, image: str, image_format: str | None) -> None:
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
