"""Dirty bitmaps: what was written since they were added or cleared, and doing several such things at once."""

import enum
from typing import Annotated, Literal

from blkferry.schema.qapi import Command, Doc, Named, Struct, Uint32, branch, union
from blkferry.schema.snapshot import BlockdevSnapshot, BlockdevSnapshotInternal, BlockdevSnapshotSync

UNSTABLE = "unstable"


class BlockDirtyBitmap(Struct):
    """A bitmap of a node."""

    node: Annotated[str, Doc("the node", since="2.4")]
    name: Annotated[str, Doc("name of the bitmap", since="2.4")]


class BlockDirtyBitmapAdd(Struct):
    """Arguments of block-dirty-bitmap-add."""

    node: Annotated[str, Doc("the node", since="2.4")]
    name: Annotated[str, Doc("name of the bitmap, at most 1023 bytes", since="2.4")]
    granularity: Annotated[
        Uint32 | None,
        Doc(
            "bytes a bit, a power of two from 512 to 2 GiB (default: cluster size, 4 to 64 KiB; else 64 KiB)",
            since="2.4",
        ),
    ] = None
    persistent: Annotated[bool, Doc("store it with the image when that is closed", since="2.10")] = False
    disabled: Annotated[bool, Doc("record nothing yet", since="4.0")] = False


BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Named("BlockDirtyBitmapOrStr")]
"""A bitmap: its name, or its node and name."""


class BlockDirtyBitmapMerge(Struct):
    """Arguments of block-dirty-bitmap-merge."""

    node: Annotated[str, Doc("the node of the target", since="4.0")]
    target: Annotated[str, Doc("name of the bitmap that gets what the others have", since="4.0")]
    bitmaps: Annotated[list[BlockDirtyBitmapOrStr], Doc("the others; a name alone is of the same node", since="4.0")]


class BlockDirtyBitmapSha256(Struct):
    """Result of x-debug-block-dirty-bitmap-sha256."""

    sha256: Annotated[str, Doc("digest of the bits, in hexadecimal", since="2.10")]


class Abort(Struct):
    """Data of the action that makes a transaction fail."""


@union("type")
class TransactionAction(Struct):
    """One part of a transaction."""

    type: Annotated[str, Doc("the command that it does", since="1.1")]


@branch
class AbortAction(TransactionAction):
    """Fail, so that nothing is done."""

    type: Literal["abort"] = "abort"
    data: Annotated[Abort, Doc("nothing", since="1.6")]


@branch
class AddBitmapAction(TransactionAction):
    """block-dirty-bitmap-add in a transaction."""

    type: Literal["block-dirty-bitmap-add"] = "block-dirty-bitmap-add"
    data: Annotated[BlockDirtyBitmapAdd, Doc("its arguments", since="2.5")]


@branch
class RemoveBitmapAction(TransactionAction):
    """block-dirty-bitmap-remove in a transaction."""

    type: Literal["block-dirty-bitmap-remove"] = "block-dirty-bitmap-remove"
    data: Annotated[BlockDirtyBitmap, Doc("its arguments", since="4.2")]


@branch
class ClearBitmapAction(TransactionAction):
    """block-dirty-bitmap-clear in a transaction."""

    type: Literal["block-dirty-bitmap-clear"] = "block-dirty-bitmap-clear"
    data: Annotated[BlockDirtyBitmap, Doc("its arguments", since="2.5")]


@branch
class EnableBitmapAction(TransactionAction):
    """block-dirty-bitmap-enable in a transaction."""

    type: Literal["block-dirty-bitmap-enable"] = "block-dirty-bitmap-enable"
    data: Annotated[BlockDirtyBitmap, Doc("its arguments", since="4.0")]


@branch
class DisableBitmapAction(TransactionAction):
    """block-dirty-bitmap-disable in a transaction."""

    type: Literal["block-dirty-bitmap-disable"] = "block-dirty-bitmap-disable"
    data: Annotated[BlockDirtyBitmap, Doc("its arguments", since="4.0")]


@branch
class MergeBitmapAction(TransactionAction):
    """block-dirty-bitmap-merge in a transaction."""

    type: Literal["block-dirty-bitmap-merge"] = "block-dirty-bitmap-merge"
    data: Annotated[BlockDirtyBitmapMerge, Doc("its arguments", since="4.0")]


@branch
class SnapshotAction(TransactionAction):
    """blockdev-snapshot in a transaction."""

    type: Literal["blockdev-snapshot"] = "blockdev-snapshot"
    data: Annotated[BlockdevSnapshot, Doc("its arguments", since="2.5")]


@branch
class SnapshotInternalAction(TransactionAction):
    """blockdev-snapshot-internal-sync in a transaction."""

    type: Literal["blockdev-snapshot-internal-sync"] = "blockdev-snapshot-internal-sync"
    data: Annotated[BlockdevSnapshotInternal, Doc("its arguments", since="1.7")]


@branch
class SnapshotSyncAction(TransactionAction):
    """blockdev-snapshot-sync in a transaction."""

    type: Literal["blockdev-snapshot-sync"] = "blockdev-snapshot-sync"
    data: Annotated[BlockdevSnapshotSync, Doc("its arguments", since="1.1")]


class ActionCompletionMode(enum.StrEnum):
    """Whether jobs of a transaction end each on its own."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Struct):
    """What holds for all actions of a transaction."""

    completion_mode: Annotated[ActionCompletionMode, Doc("how jobs end; there are none", since="2.5")] = (
        ActionCompletionMode.INDIVIDUAL
    )


class Transaction(Struct):
    """Arguments of transaction."""

    actions: Annotated[list[TransactionAction], Doc("what is done, in this order", since="1.1")]
    properties: Annotated[TransactionProperties | None, Doc("what holds for all of them", since="2.5")] = None


COMMANDS = (
    Command("transaction", "Do all of these or, when one is refused, none.", Transaction, since="1.1"),
    Command(
        "block-dirty-bitmap-add", "Record from now on which ranges of a node change.", BlockDirtyBitmapAdd, since="2.4"
    ),
    Command("block-dirty-bitmap-remove", "Remove a bitmap, from the image too.", BlockDirtyBitmap, since="2.4"),
    Command("block-dirty-bitmap-clear", "Forget what a bitmap has recorded.", BlockDirtyBitmap, since="2.4"),
    Command("block-dirty-bitmap-enable", "Let a bitmap record.", BlockDirtyBitmap, since="4.0"),
    Command("block-dirty-bitmap-disable", "Let a bitmap record no more.", BlockDirtyBitmap, since="4.0"),
    Command(
        "block-dirty-bitmap-merge", "Add to a bitmap what others have recorded.", BlockDirtyBitmapMerge, since="4.0"
    ),
    Command(
        "x-debug-block-dirty-bitmap-sha256",
        "Tell the digest of a bitmap.",
        BlockDirtyBitmap,
        returns=BlockDirtyBitmapSha256,
        since="2.10",
        features=(UNSTABLE,),
    ),
)
