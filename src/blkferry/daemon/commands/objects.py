"""Commands about objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import command
from blkferry.schema.qom import ObjectDel, ObjectOptions

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("object-add")
async def object_add(daemon: Daemon, options: ObjectOptions) -> None:
    await daemon.objects.add(options)


@command("object-del")
async def object_del(daemon: Daemon, arguments: ObjectDel) -> None:
    await daemon.objects.remove(arguments.id)
