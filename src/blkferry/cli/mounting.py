"""`blkferry mount` and `blkferry umount`: their options. What they do is imported when they run, so help is quick."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import click

from blkferry.cli.console import complain, log_to_stderr
from blkferry.errors import Error

PROGRAM = "blkferry"


@click.command(
    short_help="Show images as raw files, for any program.",
    epilog="It goes to the background when the files are there; `blkferry umount FILE` ends it, and so does umount(8).",
)
@click.argument("arguments", metavar="[IMAGE [FILE]]...", nargs=-1)
@click.option("-w", "--writable", is_flag=True, help="Let programs write. Without it the files are read-only.")
@click.option("--growable", is_flag=True, help="With --writable: writes behind the end make the image larger.")
@click.option(
    "-f",
    "--format",
    "image_format",
    metavar="FORMAT",
    help="What the images are: raw or qcow2.  [default: what they look like]",
)
@click.option(
    "--allow-other",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    help="Let other users in, as far as the file's mode does. It takes root, or user_allow_other in /etc/fuse.conf; "
    "auto does without where that is missing.  [default: auto]",
)
@click.option(
    "--passthrough",
    is_flag=True,
    help="Let the kernel read and write a raw image by itself, as fast as the image is; with --writable, also behind "
    "its end, so that takes --growable.",
)
@click.option("--over", is_flag=True, help="Mount also over a FILE that is not empty, which hides what is in it.")
@click.option("--direct", is_flag=True, help="Bypass the page cache (O_DIRECT) when reading and writing images.")
@click.option(
    "--discard/--no-discard",
    default=True,
    help="Give space back where holes are punched, or keep it.  [default: discard]",
)
@click.option(
    "--object",
    "objects",
    multiple=True,
    metavar="OBJECT",
    help="Make an object, above all the password of an encrypted image: secret,id=key,file=PATH.",
)
@click.option("--qmp", metavar="PATH", help="Take QMP commands on this unix socket meanwhile.")
@click.option("--foreground", is_flag=True, help="Stay; Ctrl-C ends it.")
@click.option("--json", "as_json", is_flag=True, help="Say what is where in one line of JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Say only where the files are, one a line.")
@click.option("-v", "--verbose", count=True, help="With --foreground: log what happens; twice for everything.")
def mount(
    arguments: tuple[str, ...],
    *,
    writable: bool,
    growable: bool,
    image_format: str | None,
    allow_other: str,
    passthrough: bool,
    over: bool,
    direct: bool,
    discard: bool,
    objects: tuple[str, ...],
    qmp: str | None,
    foreground: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Show each IMAGE as the raw FILE that losetup, fdisk, dd or any other program can work with.

    FILE is made if it is not there, and taken away again; in a directory, or without FILE here, it is called like the
    image. Several images need a FILE each. Without any it says what is mounted.

    \b
    blkferry mount disk.qcow2                     read-only, as disk.raw
    blkferry mount -w disk.qcow2 /mnt/disk        and programs may write
    blkferry mount a.qcow2 a.raw b.qcow2 b.raw    two
    blkferry mount                                what is mounted now
    """  # noqa: D301 - click's mark for lines to be left as they are
    if growable and not writable:
        raise click.UsageError("--growable needs --writable.")
    if passthrough and writable and not growable:
        raise click.UsageError("--passthrough with --writable needs --growable: the kernel writes behind the end, too.")
    if len(arguments) > 1 and len(arguments) % 2:
        raise click.UsageError(
            f"{len(arguments)} arguments are not pairs of IMAGE and FILE; several images need a FILE each."
        )
    from blkferry.cli.mount import Mounts, Speech, list_mounts, mount_images

    log_to_stderr(PROGRAM, verbose)
    speech = Speech.JSON if as_json else Speech.FILES if quiet else Speech.PROSE
    files = arguments[1::2] or (None,)
    request = Mounts(
        images=arguments[::2],
        files=files,
        writable=writable,
        growable=growable,
        image_format=image_format,
        allow_other=allow_other,
        passthrough=passthrough,
        over=over,
        direct=direct,
        discard=discard,
        objects=objects,
        qmp=qmp,
    )
    act = (
        functools.partial(mount_images, request, speech, foreground=foreground)
        if arguments
        else functools.partial(list_mounts, speech)
    )
    if not _done_or_complained(act):
        sys.exit(1)


@click.command(short_help="End what `blkferry mount` began.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Cut off programs that have it open, when what they wrote is safe.")
def umount(files: tuple[str, ...], *, force: bool) -> None:
    """Unmount each FILE. When this returns, everything written is in the image, and others may use that."""
    from blkferry.cli.umount import umount_file

    done = [_done_or_complained(functools.partial(umount_file, file, force=force)) for file in files]
    if not all(done):
        sys.exit(1)


def _done_or_complained(act: Callable[[], None]) -> bool:
    try:
        act()
    except Error as error:
        complain(PROGRAM, error)
        return False
    return True
