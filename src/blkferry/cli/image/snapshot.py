"""`blkferry image snapshot`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import Common, format_option, run, shared
from blkferry.cli.image.text import snapshot_lines

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.schema.image import SnapshotInfo


@click.command("snapshot", short_help="Take, list, apply and delete internal snapshots.")
@click.argument("image")
@format_option
@click.option("-l", "--list", "listing", is_flag=True, help="List the snapshots; so does no option at all.")
@click.option("-c", "--create", metavar="NAME", help="Take a snapshot.")
@click.option("-a", "--apply", metavar="SNAPSHOT", help="Make the disk what it was then. What it is now is lost.")
@click.option("-d", "--delete", metavar="SNAPSHOT", help="Delete a snapshot.")
@shared()
def command(
    common: Common,
    image: str,
    *,
    image_format: str | None,
    listing: bool,
    create: str | None,
    apply: str | None,
    delete: str | None,
) -> None:
    """Take, list, apply and delete snapshots inside a qcow2 image that nobody uses meanwhile.

    A SNAPSHOT is named by its id or its name.

    \b
    blkferry image snapshot --create before-upgrade vm.qcow2
    blkferry image snapshot --apply before-upgrade vm.qcow2
    """  # noqa: D301
    wanted = {key: value for key, value in (("create", create), ("apply", apply), ("delete", delete)) if value}
    if len(wanted) + listing > 1:
        raise click.UsageError("One of --list, --create, --apply and --delete at a time.")
    name = common.name(image, image_format)

    async def one(daemon: Daemon) -> SnapshotInfo:
        from blkferry.daemon.imaging import snapshots

        does: dict[str, Callable[..., Awaitable[SnapshotInfo]]] = {
            "create": snapshots.create,
            "apply": snapshots.apply,
            "delete": snapshots.delete,
        }
        ((what, which),) = wanted.items()
        return await does[what](daemon, name, which)

    async def every(daemon: Daemon) -> list[SnapshotInfo]:
        from blkferry.daemon.imaging import snapshots

        return await snapshots.list_snapshots(daemon, name)

    from blkferry.daemon.imaging.snapshots import to_json

    if wanted:
        found = run(common, one)
        if common.as_json:
            common.answer(to_json(found))
        return
    listed: list[dict[str, Any]] = [to_json(each) for each in run(common, every)]
    if common.as_json:
        common.answer(listed)
    elif listed:
        common.say("Snapshot list:")
        common.say("\n".join(snapshot_lines(listed)))
