"""`blkferry image`: making, looking at, checking and changing disk images, with the words of qemu-img."""

from __future__ import annotations

import click

from blkferry.cli.groups import LazyCommands

_NAMES = (
    "create",
    "info",
    "convert",
    "resize",
    "check",
    "compare",
    "snapshot",
    "map",
    "measure",
    "rebase",
    "commit",
    "bitmap",
)


@click.group(
    cls=LazyCommands,
    modules={name: f"blkferry.cli.image.{name}" for name in _NAMES},
    exit_codes={"compare": 2},
    short_help="Make, look at, check and change disk images.",
    epilog="The options are those of qemu-img; every command has --json. `blkferry image COMMAND --help` tells more.",
)
def image() -> None:
    """Make, look at, check and change disk images.

    \b
    blkferry image create disk.qcow2 20G
    blkferry image create -b base.qcow2 -F qcow2 vm.qcow2
    blkferry image convert -c disk.img small.qcow2
    blkferry image snapshot --create before-upgrade vm.qcow2
    """  # noqa: D301 - click's mark for lines to be left as they are
