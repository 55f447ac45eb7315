"""The NBD server and block exports: their options, commands and events.

The options of an export type are a branch of `BlockExportOptions`; those of types other than NBD live with
them.
"""

import enum
from typing import Annotated, Literal

from blkferry.schema.bitmap import BlockDirtyBitmapOrStr
from blkferry.schema.qapi import DEPRECATED, EXTENSION, Command, Doc, Event, Named, Struct, TagOf, Uint32, branch, union
from blkferry.schema.sockets import SocketAddress, SocketAddressLegacy


class NbdServerOptionsBase(Struct):
    """What the NBD server needs to know besides its address."""

    id: Annotated[
        str | None,
        Doc(
            "name of this server, where there are several (default: the one that exports use which name none)",
            features=(EXTENSION,),
        ),
    ] = None
    tls_creds: Annotated[
        str | None, Doc("the tls-creds object for TLS, which then is required (default: no TLS)", since="2.6")
    ] = None
    tls_authz: Annotated[
        str | None,
        Doc(
            "the authz object that a client's certificate is checked with; as long as there is none of this name, "
            "nobody is let in (default: every certificate that is valid)",
            since="4.0",
        ),
    ] = None
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


class NbdServerStop(Struct):
    """Arguments of nbd-server-stop."""

    id: Annotated[str | None, Doc("the server to stop (default: the one without a name)", features=(EXTENSION,))] = None


class NbdServerInfo(Struct):
    """An NBD server, as query-nbd-servers lists it."""

    id: Annotated[str | None, Doc("name of the server; the one that exports use which name none has none")] = None
    addresses: Annotated[list[SocketAddress], Doc("where it listens, with the ports that the kernel chose")]
    uris: Annotated[list[str], Doc("where clients find its default export, for addresses that can be written so")]
    tls_creds: Annotated[str | None, Doc("the tls-creds object it uses")] = None
    tls_authz: Annotated[str | None, Doc("the authz object that certificates are checked with")] = None
    max_connections: Annotated[Uint32, Doc("clients at the same time; 0 is unlimited", always=True)] = 0
    connections: Annotated[int, Doc("clients now, those that have not chosen an export included")]
    exports: Annotated[list[str], Doc("the names it offers")]


class NbdServerAdd(Struct):
    """Arguments of nbd-server-add."""

    device: Annotated[str, Doc("the node to export")]
    name: Annotated[
        str | None, Doc("the name clients ask for, and the id of the export (default: device)", since="2.12")
    ] = None
    description: Annotated[str | None, Doc("free text for clients, at most 4096 bytes", since="5.0")] = None
    writable: Annotated[bool, Doc("clients may write, if the node can be written")] = False
    bitmap: Annotated[str | None, Doc("a dirty bitmap that clients may ask for", since="4.0")] = None


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
    server: Annotated[
        str | None, Doc("the NBD server that offers it (default: the one without a name)", features=(EXTENSION,))
    ] = None
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


class FuseExportAllowOther(enum.StrEnum):
    """Whether users other than the one who mounts may use a FUSE export."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


@branch
class BlockExportOptionsFuse(BlockExportOptions):
    """The node as a regular file, by FUSE."""

    type: Literal["fuse"] = "fuse"
    mountpoint: Annotated[str, Doc("the regular file that shows the node; it has to be there already", since="6.0")]
    growable: Annotated[bool, Doc("writes behind the end make the node larger", since="6.0")] = False
    allow_other: Annotated[
        FuseExportAllowOther,
        Doc(
            "on lets other users in as the file's mode allows, which takes user_allow_other in /etc/fuse.conf unless "
            "root mounts; auto does so where that is possible",
            since="6.1",
        ),
    ] = FuseExportAllowOther.AUTO
    passthrough: Annotated[
        bool,
        Doc(
            "let the kernel read and write a plain raw image by itself: as fast as the image, and unseen. While the "
            "file is open, bitmaps, snapshots and other changes of the node are refused. Takes growable if writable, "
            "and Linux 6.9",
            features=(EXTENSION,),
        ),
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


class NbdServerRemove(Struct):
    """Arguments of nbd-server-remove."""

    name: Annotated[str, Doc("the id of the export to remove")]
    mode: Annotated[BlockExportRemoveMode, Doc("safe refuses while clients are connected, hard disconnects them")] = (
        BlockExportRemoveMode.SAFE
    )


class BlockExportClient(Struct):
    """A client of an export. Everything is counted from the end of its handshake, in bytes as they go over the wire."""

    peer: Annotated[str, Doc("its address, or the process at the other end of a unix socket")]
    identity: Annotated[str | None, Doc("who it is by TLS: the name of its certificate, or of its key")] = None
    requests: Annotated[int, Doc("requests it has made")]
    received: Annotated[int, Doc("bytes received from it")]
    sent: Annotated[int, Doc("bytes sent to it")]


class BlockExportInfo(Struct):
    """An export, as query-block-exports lists it."""

    id: Annotated[str, Doc("name of the export")]
    type: Annotated[str, TagOf(BlockExportOptions), Doc("the kind of export")]
    node_name: Annotated[str, Doc("the exported node")]
    shutting_down: Annotated[bool, Doc("whether it is being removed")]
    clients: Annotated[list[BlockExportClient], Doc("who uses it now", features=(EXTENSION,))]
    mountpoint: Annotated[str | None, Doc("the file that shows it, with FUSE", features=(EXTENSION,))] = None
    allow_other: Annotated[
        bool | None, Doc("whether other users may open that file, as its mode allows", features=(EXTENSION,))
    ] = None


class BlockExportDeleted(Struct):
    """Data of BLOCK_EXPORT_DELETED."""

    id: Annotated[str, Doc("name of the export that is gone")]


COMMANDS = (
    Command("nbd-server-start", "Start the NBD server.", NbdServerStart, since="1.3"),
    Command(
        "nbd-server-add",
        "Export a node over NBD, with its name as the id.",
        NbdServerAdd,
        since="1.3",
        features=(DEPRECATED,),
    ),
    Command(
        "nbd-server-remove",
        "Begin to remove an NBD export by its id.",
        NbdServerRemove,
        since="2.12",
        features=(DEPRECATED,),
    ),
    Command("nbd-server-stop", "Stop an NBD server and remove its exports.", NbdServerStop, since="1.3"),
    Command("query-nbd-servers", "List the NBD servers.", returns=list[NbdServerInfo], features=(EXTENSION,)),
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
