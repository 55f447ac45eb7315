"""The NBD server and block exports: their options, commands and events.

The options of an export type are a branch of `BlockExportOptions`; those of types other than NBD live with
them.
"""

import enum
from typing import Annotated, Literal

from blkferry.schema.qapi import EXTENSION, Command, Doc, Event, Named, Struct, TagOf, Uint32, branch, union
from blkferry.schema.sockets import SocketAddress, SocketAddressLegacy


class NbdServerOptionsBase(Struct):
    """What the NBD server needs to know besides its address."""

    max_connections: Annotated[
        Uint32, Doc("clients at the same time; 0 is unlimited, 1 tells clients not to share", since="5.2")
    ] = 0
    handshake_max_seconds: Annotated[
        Uint32, Doc("time a client has to finish negotiation; 0 is unlimited", since="10.0")
    ] = 10


class NbdServerOptions(NbdServerOptionsBase):
    """The NBD server on the command line."""

    addr: Annotated[SocketAddress, Doc("the address to listen on", since="4.2")]


class NbdServerStart(NbdServerOptionsBase):
    """Arguments of nbd-server-start, which takes the legacy form of the address."""

    addr: Annotated[SocketAddressLegacy, Doc("the address to listen on", since="1.3")]


class BlockDirtyBitmap(Struct):
    """A dirty bitmap of a node."""

    node: Annotated[str, Doc("the node that has it", since="2.4")]
    name: Annotated[str, Doc("its name", since="2.4")]


BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Named("BlockDirtyBitmapOrStr")]
"""A dirty bitmap of a node that the context names, or of any node."""


Iothreads = Annotated[str | list[str], Named("BlockExportIothreads")]
"""One iothread, or several; the list form is where QEMU is heading."""


@union("type")
class BlockExportOptions(Struct):
    """How a node is offered to the outside."""

    type: Annotated[str, Doc("the kind of export", since="4.2")]
    id: Annotated[str, Doc("name of the export, unique among all exports", since="4.2")]
    node_name: Annotated[str, Doc("the node to export", since="5.2")]
    writable: Annotated[bool, Doc("clients may write", since="4.2")] = False
    writethrough: Annotated[bool, Doc("flush before a write completes", since="5.2")] = False
    iothread: Annotated[
        Iothreads | None,
        Doc("the iothread to run in (default: where the node is)", since="5.2", features=(EXTENSION,)),
    ] = None
    fixed_iothread: Annotated[
        bool, Doc("keep the node in the export's thread; fail if it cannot be moved there", since="5.2")
    ] = False
    allow_inactive: Annotated[bool, Doc("the node may be inactive", since="10.0")] = False


@branch
class BlockExportOptionsNbd(BlockExportOptions):
    """An export of the NBD server."""

    type: Literal["nbd"] = "nbd"
    name: Annotated[str | None, Doc("the name clients ask for (default: the node's name)", since="5.2")] = None
    description: Annotated[str | None, Doc("free text for clients, at most 4096 bytes", since="5.2")] = None
    bitmaps: Annotated[
        list[BlockDirtyBitmapOrStr] | None,
        Doc(
            "dirty bitmaps to offer as qemu:dirty-bitmap:NAME, by name of the node's own or its backing chain's, or of "
            "any node",
            since="5.2",
        ),
    ] = None
    allocation_depth: Annotated[
        bool, Doc("offer qemu:allocation-depth: which layer of the backing chain has the data", since="5.2")
    ] = False


class BlockExportRemoveMode(enum.StrEnum):
    """What happens to the clients of an export that is removed."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportDel(Struct):
    """Arguments of block-export-del."""

    id: Annotated[str, Doc("the export to remove")]
    mode: Annotated[BlockExportRemoveMode, Doc("safe refuses while clients are connected, hard disconnects them")] = (
        BlockExportRemoveMode.SAFE
    )


class BlockExportInfo(Struct):
    """An export, as query-block-exports lists it."""

    id: Annotated[str, Doc("name of the export")]
    type: Annotated[str, TagOf(BlockExportOptions), Doc("the kind of export")]
    node_name: Annotated[str, Doc("the exported node")]
    shutting_down: Annotated[bool, Doc("whether it is being removed")]


class BlockExportDeleted(Struct):
    """Data of BLOCK_EXPORT_DELETED."""

    id: Annotated[str, Doc("name of the export that is gone")]


COMMANDS = (
    Command("nbd-server-start", "Start the NBD server.", NbdServerStart, since="1.3"),
    Command("nbd-server-stop", "Stop the NBD server and remove its exports.", since="1.3"),
    Command("block-export-add", "Export a node.", BlockExportOptions, since="5.2"),
    Command(
        "block-export-del",
        "Begin to remove an export; it is gone when BLOCK_EXPORT_DELETED says so.",
        BlockExportDel,
        since="5.2",
    ),
    Command("query-block-exports", "List the exports.", returns=list[BlockExportInfo], since="5.2"),
)

EVENTS = (Event("BLOCK_EXPORT_DELETED", "An export is gone and its id may be used again.", BlockExportDeleted, "5.2"),)
