"""`blkferry image convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import CACHES, Common, fail, run, shared
from blkferry.cli.image.create import format_by_name
from blkferry.cli.image.progress import showing

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.imaging.convert import Conversion, Copied


@click.command(
    "convert",
    short_help="Copy an image into another one, of any format.",
    epilog="-o help lists the options of the output format.",
)
@click.argument("images", metavar="SOURCE... TARGET", nargs=-1)
@click.option("-f", "--format", "image_format", metavar="FORMAT", help="Format of the source.")
@click.option(
    "-O",
    "--output-format",
    metavar="FORMAT",
    help="Format of the target: raw or qcow2.  [default: by the name's end, else raw]",
)
@click.option("-o", "--options", "options", multiple=True, metavar="KEY=VALUE,...", help="Options of the target.")
@click.option("-c", "--compress", is_flag=True, help="Compress what is written (qcow2).")
@click.option("-B", "-b", "--backing", metavar="FILE", help="Let the target be an overlay of this image.")
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of that backing file.")
@click.option("-l", "--snapshot", metavar="NAME", help="Copy this internal snapshot, by id or name.")
@click.option(
    "-S", "--sparse-size", metavar="SIZE", default="4k", help="So many zeroes become a hole; 0: none.  [default: 4k]"
)
@click.option("-n", "--no-create", is_flag=True, help="Write into a target that is there.")
@click.option("--target-is-zero", is_flag=True, help="With -n: it reads as zeroes, so that only data is written.")
@click.option("-t", "--cache", type=click.Choice(CACHES), default="unsafe", help="Host cache of the target.")
@click.option("-T", "--source-cache", type=click.Choice(CACHES), default="writeback", help="Host cache of sources.")
@click.option("-r", "--rate-limit", metavar="RATE", help="Write so many bytes a second at most.")
@click.option("-m", "--threads", type=click.IntRange(1, 16), help="Threads that compress.  [default: by processors]")
@click.option("-W", "--out-of-order", is_flag=True, hidden=True)
@click.option("-C", "--copy-offloading", is_flag=True, hidden=True)
@click.option("--bitmaps", is_flag=True, help="Copy the dirty bitmaps that the source keeps, too (qcow2).")
@click.option("--skip-broken-bitmaps", is_flag=True, help="Without those that were not stored in order.")
@click.option("--salvage", is_flag=True, help="Copy zeroes for what cannot be read.")
@shared(progress=True)
def command(
    common: Common,
    images: tuple[str, ...],
    *,
    image_format: str | None,
    output_format: str | None,
    options: tuple[str, ...],
    out_of_order: bool,
    copy_offloading: bool,
    **how: Any,
) -> None:
    """Copy an image into another one, of any format. Several sources are put one behind the other.

    \b
    blkferry image convert disk.img disk.qcow2
    blkferry image convert -c -o compression_type=zstd vm.qcow2 archive.qcow2
    blkferry image convert -O raw vm.qcow2 /dev/vg/vm
    blkferry image convert --snapshot before-upgrade vm.qcow2 old.qcow2
    """  # noqa: D301
    del out_of_order, copy_offloading  # they are about speed alone
    from blkferry.errors import Error
    from blkferry.schema.keyval import Help
    from blkferry.units import format_size

    try:
        work = _work(common, images, image_format, output_format, options, how)
    except Error as error:
        fail(common, error)
    if isinstance(work, Help):
        click.echo(work.text)
        return
    with showing(common, "Copying") as progress:

        async def convert(daemon: Daemon) -> Copied:
            from blkferry.daemon.imaging.convert import convert

            return await convert(daemon, work, progress)

        copied = run(common, convert)
    if common.as_json:
        common.answer(
            {
                "filename": work.target.name,
                "format": work.target.image_format,
                "virtual-size": copied.length,
                "written": copied.written,
                "unreadable": copied.unreadable,
            }
        )
    if copied.unreadable:
        common.say(f"{format_size(copied.unreadable)} could not be read, and are zeroes in '{work.target.name}'.")


def _work(
    common: Common,
    images: tuple[str, ...],
    image_format: str | None,
    output_format: str | None,
    options: tuple[str, ...],
    how: dict[str, Any],
) -> Conversion | Any:
    from blkferry.daemon.imaging.convert import Conversion
    from blkferry.daemon.imaging.creating import NewImage, parse_options, size_of
    from blkferry.schema.keyval import Help

    target = images[-1] if images else ""
    created = output_format or format_by_name(target)
    parsed = parse_options(options, created)
    if isinstance(parsed, Help):
        return parsed
    if len(images) < 2:
        raise click.UsageError("Name what to copy, and what to copy it to.")
    for name, option in (("backing_file", "backing"), ("backing_fmt", "backing_format")):
        if how[option] is not None:
            parse_options([f"{name}=x"], created)
            parsed[name] = how[option]
    names = [
        common.name(each, image_format, cache=how["source_cache"], snapshot=_snapshot(how["snapshot"]))
        for each in images[:-1]
    ]
    create = not how["no_create"]
    return Conversion(
        sources=names,
        target=NewImage(name=target, image_format=created if create or output_format else "", options=parsed),
        cache=how["cache"],
        compress=how["compress"],
        create=create,
        target_is_zero=how["target_is_zero"],
        sparse_size=size_of(how["sparse_size"], "sparse size"),
        salvage=how["salvage"],
        rate=size_of(how["rate_limit"], "rate limit") if how["rate_limit"] else 0,
        threads=how["threads"] or 0,
        bitmaps=how["bitmaps"],
        skip_broken_bitmaps=how["skip_broken_bitmaps"],
    )


def _snapshot(text: str | None) -> str | None:
    """A snapshot as qemu-img has it too: "snapshot.name=x"."""
    for prefix in ("snapshot.id=", "snapshot.name="):
        if text is not None and text.startswith(prefix):
            return text.removeprefix(prefix)
    return text
