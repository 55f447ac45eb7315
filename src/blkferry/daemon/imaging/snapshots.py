"""Internal snapshots of an image that nobody uses meanwhile."""

from __future__ import annotations

import msgspec

from blkferry.daemon.daemon import Daemon
from blkferry.daemon.imaging.information import info
from blkferry.daemon.imaging.names import ImageName, opened
from blkferry.drivers.qcow2 import snapshots
from blkferry.drivers.qcow2.node import Qcow2
from blkferry.errors import Error, ErrorKind
from blkferry.graph.node import Node
from blkferry.schema.image import SnapshotInfo


async def list_snapshots(daemon: Daemon, image: ImageName) -> list[SnapshotInfo]:
    """The snapshots of an image. Raises Error."""
    return (await info(daemon, image)).snapshots or []


async def create(daemon: Daemon, image: ImageName, name: str) -> SnapshotInfo:
    """Take a snapshot. Raises Error."""
    async with opened(daemon, image, "snapshot", writable=True) as loan:
        node = _with_snapshots(loan.node)
        return snapshots.info(await loan.run(snapshots.create(node, name)))


async def apply(daemon: Daemon, image: ImageName, wanted: str) -> SnapshotInfo:
    """Make the disk what it was when the snapshot with this id or name was taken. Raises Error."""
    async with opened(daemon, image, "snapshot", writable=True) as loan:
        node = _with_snapshots(loan.node)
        return snapshots.info(await loan.run(snapshots.apply(node, wanted)))


async def delete(daemon: Daemon, image: ImageName, wanted: str) -> SnapshotInfo:
    """Delete the snapshot with this id or name. Raises Error."""
    async with opened(daemon, image, "snapshot", writable=True) as loan:
        node = _with_snapshots(loan.node)
        known = [each for each in node.snapshots if each.id == wanted] or [
            each for each in node.snapshots if each.name == wanted
        ]
        if not known:
            from blkferry.drivers.qcow2.opening import find_snapshot

            find_snapshot(node.snapshots, wanted)
        return snapshots.info(await loan.run(snapshots.delete(node, known[0].id, None)))


def _with_snapshots(node: Node) -> Qcow2:
    if not isinstance(node, Qcow2):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Images of format '{node.driver}' have no internal snapshots",
            hint="Convert it first: blkferry image convert -O qcow2.",
        )
    return node


def to_json(found: SnapshotInfo) -> dict[str, object]:
    return {key.replace("_", "-"): value for key, value in msgspec.structs.asdict(found).items() if value is not None}
