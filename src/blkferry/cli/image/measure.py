"""`blkferry image measure`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blkferry.cli.image.common import Common, fail, format_option, run, shared

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.drivers.qcow2.measuring import Measured


@click.command("measure", short_help="Say how large the file of an image will be.")
@click.argument("image", required=False)
@format_option
@click.option("-O", "--output-format", metavar="FORMAT", default="raw", help="Format of the file.  [default: raw]")
@click.option("-o", "--options", "options", multiple=True, metavar="KEY=VALUE,...", help="Options of that format.")
@click.option("--size", metavar="SIZE", help="Size of the disk, where there is no image yet.")
@click.option("-l", "--snapshot", metavar="NAME", help="Measure this internal snapshot.")
@shared()
def command(
    common: Common,
    image: str | None,
    *,
    image_format: str | None,
    output_format: str,
    options: tuple[str, ...],
    size: str | None,
    snapshot: str | None,
) -> None:
    """Say how large a file `convert` will write for IMAGE, and how large it can become.

    \b
    blkferry image measure -O qcow2 disk.img
    blkferry image measure -O qcow2 -o cluster_size=2M --size 1T
    """  # noqa: D301
    from blkferry.daemon.imaging import creating
    from blkferry.errors import Error
    from blkferry.schema.keyval import Help

    if (image is None) == (size is None):
        raise click.UsageError("Either --size N or one image must be specified.")
    try:
        parsed = creating.parse_options(options, output_format)
        length = None if size is None else creating.size_of(size)
    except Error as error:
        fail(common, error)
    if isinstance(parsed, Help):
        click.echo(parsed.text)
        return
    new = creating.NewImage(name="measured", image_format=output_format, options=parsed)

    async def work(daemon: Daemon) -> Measured:
        from blkferry.daemon.imaging.sizing import measure

        source = None if image is None else common.name(image, image_format, snapshot=snapshot)
        return await measure(daemon, new, source, size=length)

    measured = run(common, work)
    if common.as_json:
        members = {"required": measured.required, "fully-allocated": measured.fully_allocated}
        if measured.bitmaps is not None:
            members["bitmaps"] = measured.bitmaps
        common.answer(members)
        return
    common.say(f"required size: {measured.required}\nfully allocated size: {measured.fully_allocated}")
    if measured.bitmaps is not None:
        common.say(f"bitmaps size: {measured.bitmaps}")
