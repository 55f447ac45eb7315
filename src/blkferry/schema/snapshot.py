"""Snapshots: overlays that take over an image's place, and those inside an image."""

import enum
from typing import Annotated

from blkferry.schema.image import SnapshotInfo
from blkferry.schema.qapi import Command, Doc, Struct

ALLOW_WRITE_ONLY_OVERLAY = "allow-write-only-overlay"
"""The feature by which blockdev-snapshot says that the overlay may have users who only write."""


class NewImageMode(enum.StrEnum):
    """Whether an image is made."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


class BlockdevSnapshot(Struct):
    """Arguments of blockdev-snapshot."""

    node: Annotated[str, Doc("the node to put the overlay on", since="2.5")]
    overlay: Annotated[str, Doc("the overlay, a node without a backing file", since="2.5")]


class BlockdevSnapshotSync(Struct):
    """Arguments of blockdev-snapshot-sync."""

    device: Annotated[str | None, Doc("name of a device; nodes have none here")] = None
    node_name: Annotated[str | None, Doc("the node to put the overlay on", since="2.0")] = None
    snapshot_file: Annotated[str, Doc("path of the overlay")]
    snapshot_node_name: Annotated[str | None, Doc("name of the new node", since="2.0")] = None
    format: Annotated[str, Doc("format of the overlay")] = "qcow2"
    mode: Annotated[NewImageMode, Doc("whether the overlay's file is made")] = NewImageMode.ABSOLUTE_PATHS


class BlockdevSnapshotInternal(Struct):
    """Arguments of blockdev-snapshot-internal-sync."""

    device: Annotated[str, Doc("the node", since="1.7")]
    name: Annotated[str, Doc("name of the snapshot", since="1.7")]


class BlockdevSnapshotDeleteInternal(Struct):
    """Arguments of blockdev-snapshot-delete-internal-sync."""

    device: Annotated[str, Doc("the node", since="1.7")]
    id: Annotated[str | None, Doc("id of the snapshot", since="1.7")] = None
    name: Annotated[str | None, Doc("name of the snapshot", since="1.7")] = None


class ChangeBackingFile(Struct):
    """Arguments of change-backing-file."""

    device: Annotated[str, Doc("the node at the top of the chain", since="2.1")]
    image_node_name: Annotated[str, Doc("the node whose image is changed", since="2.1")]
    backing_file: Annotated[str, Doc("what the image shall name as its backing file; nothing if empty", since="2.1")]


COMMANDS = (
    Command(
        "blockdev-snapshot",
        "Put an overlay on a node: its users, and all that is written from now on, go to the overlay.",
        BlockdevSnapshot,
        since="2.5",
        features=(ALLOW_WRITE_ONLY_OVERLAY,),
    ),
    Command(
        "blockdev-snapshot-sync",
        "Make an overlay and put it on a node.",
        BlockdevSnapshotSync,
        since="0.14",
    ),
    Command(
        "blockdev-snapshot-internal-sync",
        "Make a snapshot inside an image.",
        BlockdevSnapshotInternal,
        since="1.7",
    ),
    Command(
        "blockdev-snapshot-delete-internal-sync",
        "Delete a snapshot inside an image.",
        BlockdevSnapshotDeleteInternal,
        returns=SnapshotInfo,
        since="1.7",
    ),
    Command(
        "change-backing-file",
        "Change what an image says of its backing file, and nothing else.",
        ChangeBackingFile,
        since="2.1",
    ),
)
