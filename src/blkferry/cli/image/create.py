"""`blkferry image create`."""

from __future__ import annotations

import click

from blkferry.cli.image.common import Common, fail, run, shared


@click.command("create", short_help="Make an image.", epilog="-o help lists the options of a format.")
@click.argument("image", required=False)
@click.argument("size", required=False)
@click.option(
    "-f", "--format", "image_format", metavar="FORMAT", help="raw or qcow2.  [default: by the name's end, else raw]"
)
@click.option("-o", "--options", "options", multiple=True, metavar="KEY=VALUE,...", help="Options of the format.")
@click.option("-b", "--backing", metavar="FILE", help="What shows where nothing is written: make an overlay.")
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of the backing file.")
@click.option("-u", "--unsafe", is_flag=True, help="Do not look at the backing file; it may come later.")
@shared(share=False, opts=False)
def command(
    common: Common,
    image: str | None,
    size: str | None,
    *,
    image_format: str | None,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
) -> None:
    """Make an image. SIZE is like 10G; an overlay is as large as its backing file.

    \b
    blkferry image create disk.qcow2 20G
    blkferry image create -o cluster_size=128k,lazy_refcounts=on disk.qcow2 20G
    blkferry image create -b base.qcow2 -F qcow2 vm.qcow2
    blkferry image create --object secret,id=key,file=pw -o encrypt.format=luks vault.qcow2 5G
    """  # noqa: D301
    from blkferry.daemon.imaging import creating
    from blkferry.errors import Error
    from blkferry.schema.keyval import Help
    from blkferry.units import format_size

    try:
        image_format = image_format or format_by_name(image or "")
        parsed = creating.parse_options(options, image_format)
        if isinstance(parsed, Help):
            click.echo(parsed.text)
            return
        if image is None:
            raise click.UsageError("Missing argument 'IMAGE'.")
        for name, value in (("backing_file", backing), ("backing_fmt", backing_format)):
            if value is not None:
                parsed[name] = value
                creating.parse_options([f"{name}=x"], image_format)
        length = creating.size_of(size) if size is not None else None
    except Error as error:
        fail(common, error)
    new = creating.NewImage(name=image, image_format=image_format, size=length, options=parsed)
    made = run(common, lambda daemon: creating.create(daemon, new, unsafe=unsafe))
    assert made.size is not None
    if common.as_json:
        common.answer({"filename": made.name, "format": made.image_format, "virtual-size": made.size})
    given = "".join(f", {name} {value}" for name, value in parsed.items() if name != "size")
    common.say(f"Made '{made.name}': {image_format}, {format_size(made.size)} ({made.size} bytes){given}")


def format_by_name(name: str) -> str:
    """The format that a new image of this name is meant to have."""
    return "qcow2" if name.lower().endswith((".qcow2", ".qcow", ".qc2")) else "raw"
