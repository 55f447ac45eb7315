"""Making a node from an image: everything is read and validated before the first byte is changed.

The order is: the header and all it implies, the tables it names, the nodes it needs (data file, backing file, key), and
only then what a writer does to an image it opens (repair of a dirty one, feature bits nobody knows).
"""

from __future__ import annotations

import logging
import os
from array import array
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2 import compression, settings
from blkferry.drivers.qcow2.bitmaps import StoredBitmaps
from blkferry.drivers.qcow2.checking import Repair, check
from blkferry.drivers.qcow2.entries import OFFSET, Geometry
from blkferry.drivers.qcow2.header import (
    AUTOCLEAR_AT,
    Autoclear,
    CryptMethod,
    Header,
    Incompatible,
    pack_features,
)
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.mapping import Mapper
from blkferry.drivers.qcow2.metadata import Metadata
from blkferry.drivers.qcow2.refcount_codec import codec
from blkferry.drivers.qcow2.refcounts import MAX_TABLE_BYTES, TABLE_OFFSET, Refcounts
from blkferry.drivers.qcow2.snapshot_table import Snapshot, SnapshotTableReader
from blkferry.drivers.qcow2.tables import TableCache
from blkferry.drivers.qcow2.words import from_big_endian
from blkferry.errors import Error, ErrorKind
from blkferry.graph import filename, permissions
from blkferry.graph.access import BACKING
from blkferry.graph.permissions import ALL, NONE
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.qapi import Null

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2
    from blkferry.graph.graph import Opening
    from blkferry.graph.node import Node

log = logging.getLogger(__name__)

FILE, DATA_FILE = "file", "data-file"
_KNOWN_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW


async def open_image(node: Qcow2, opening: Opening) -> None:
    """Make `node` usable. Raises Error."""
    try:
        await _open_image(node, opening)
    except OSError as error:
        raise Error.from_oserror(f"Could not open '{node.filename()}'", error, node=node.name) from error


async def _open_image(node: Qcow2, opening: Opening) -> None:
    options = node.options
    if options.snapshot is not None and not node.read_only:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "An internal snapshot can only be opened read-only",
            hint="Add read-only=on, or apply the snapshot: blkferry image snapshot --apply.",
        )
    child = await opening.child(node, FILE, options.file)
    await permissions.change(node.children[FILE], *node.child_permissions(FILE, NONE, ALL))
    file = HostFile(child)
    header = await read_header(file)
    check_writable(node, header, read_only=node.read_only)
    compression.require(header.compression_type)
    snapshots = await read_snapshots(file, header)
    if options.snapshot is not None:
        header = _as_of_snapshot(header, snapshots, options.snapshot)
    await _open_data_file(node, opening, header)
    await _open_key(node, opening, file, header)
    await _open_backing(node, opening, header)
    node.snapshots = snapshots
    await _begin(node, file, header)


async def reload(node: Qcow2) -> None:
    """Begin anew with what is on disk; children and key stay. Raises Error or OSError."""
    file = node.metadata.file
    file.forget_place()
    header = await read_header(file)
    check_writable(node, header, read_only=node.read_only)
    await _begin(node, file, header)
    node.begun()


async def _begin(node: Qcow2, file: HostFile, header: Header) -> None:
    """Make what a node works with from a header that has been found good."""
    if not node.read_only:
        header = await _take_over(node, file, header)
    settings.set_discards(node)
    node.metadata = await read_metadata(node, file, header)
    node.header_changed()
    node.mapper = make_mapper(node)
    node.bitmaps = StoredBitmaps()
    await node.bitmaps.load(node)


async def read_header(file: HostFile) -> Header:
    """The header of an image. Raises Error or OSError."""
    head = bytes(await file.get(0, 512))
    data = bytes(await file.get(0, 1 << Header.cluster_bits_of(head)))
    return Header.parse(data, file_size=file.length)


def check_writable(node: Qcow2, header: Header, *, read_only: bool) -> None:
    """Refuse to write to what must not be written to. Raises Error."""
    if read_only:
        return
    if header.incompatible & Incompatible.CORRUPT:
        raise Error(
            ErrorKind.CORRUPT,
            "qcow2: Image is corrupt; cannot be opened read/write",
            hint="Repair it with: blkferry image check --repair all, or add read-only=on.",
            node=node.name,
        )


async def read_snapshots(file: HostFile, header: Header) -> list[Snapshot]:
    """The snapshot table of an image. Raises Error or OSError."""
    reader = SnapshotTableReader(header.nb_snapshots, header)
    at = header.snapshots_offset
    while reader.wanted:
        length = max(reader.wanted, header.cluster_size)
        if at >= file.length:
            raise Error(
                ErrorKind.CORRUPT,
                f"The snapshot table at {header.snapshots_offset:#x} reaches behind the end of the image",
                structure="snapshot table",
                offset=at,
            )
        reader.receive(bytes(await file.get(at, length)))
        at += length
    return list(reader.snapshots)


def find_snapshot(snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """The snapshot with this id or, if none has, with this name. Raises Error(NOT_FOUND)."""
    for attribute in ("id", "name"):
        for snapshot in snapshots:
            if getattr(snapshot, attribute) == wanted:
                return snapshot
    names = ", ".join(f"{snapshot.id} ({snapshot.name})" for snapshot in snapshots[:20])
    raise Error(
        ErrorKind.NOT_FOUND,
        f"Can't find snapshot '{wanted}'",
        hint=f"Known snapshots: {names}." if names else "The image has no snapshots.",
    )


def _as_of_snapshot(header: Header, snapshots: list[Snapshot], wanted: str) -> Header:
    snapshot = find_snapshot(snapshots, wanted)
    seen = replace(
        header,
        size=header.size if snapshot.disk_size is None else snapshot.disk_size,
        l1_size=snapshot.l1_size,
        l1_table_offset=snapshot.l1_table_offset,
    )
    seen.check()
    return seen


async def _open_data_file(node: Qcow2, opening: Opening, header: Header) -> None:
    wanted: str | BlockdevOptions | None = node.options.data_file
    if not header.incompatible & Incompatible.DATA_FILE:
        if wanted is not None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "'data-file' can only be set for images with an external data file",
                hint="Leave data-file out.",
            )
        return
    if wanted is None:
        if header.data_file is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "'data-file' is required for this image", hint="Name its node.")
        wanted = await node.services.in_thread(_plain_file, header.data_file, node.filename(), node.read_only)
    child = await opening.child(node, DATA_FILE, wanted)
    await permissions.change(node.children[DATA_FILE], *node.child_permissions(DATA_FILE, NONE, ALL))
    node.data_file = HostFile(child)


def _plain_file(name: str, named_by: str, read_only: bool) -> BlockdevOptions:
    path = filename.full_path(name, named_by)
    return filename.options_for(path, filename.protocol_of(path), read_only=read_only)


async def _open_key(node: Qcow2, opening: Opening, file: HostFile, header: Header) -> None:
    encrypt = node.options.encrypt
    if header.crypt_method is CryptMethod.NONE:
        if encrypt is not None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"No encryption in image header, but options specified format '{encrypt.format}'",
                hint="Leave encrypt out: the image is not encrypted.",
            )
        return
    found = header.crypt_method.name.lower()
    if encrypt is None:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Parameter 'encrypt.key-secret' is required for cipher",
            hint=f"The image is encrypted: add a secret object, and encrypt.format={found},encrypt.key-secret=ID.",
        )
    if encrypt.format != found:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Header reported '{found}' encryption format but options specify '{encrypt.format}'",
            hint=f"Say encrypt.format={found}.",
        )
    key = getattr(encrypt, "key_secret", None)
    if key is None:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Parameter 'encrypt.key-secret' is required for cipher",
            hint="Name the secret object that holds the password.",
        )
    await _unlock(node, opening, file, header, key)


async def _unlock(node: Qcow2, opening: Opening, file: HostFile, header: Header, key: str) -> None:
    from blkferry.crypt import aes_legacy, luks, luks_layout
    from blkferry.crypt.password import password

    secret = password(key, opening.graph.secret(key))
    if header.crypt_method is CryptMethod.AES:
        node.cipher = aes_legacy.legacy_cipher(secret)
        return
    pointer = header.encryption
    assert pointer is not None, "a parsed header has it"
    layout = luks_layout.parse(bytes(await file.get(pointer.offset, luks_layout.SIZE)), pointer.length)
    material = {slot.index: bytes(await file.get(pointer.offset + slot.offset, slot.length)) for slot in layout.active}
    node.luks = layout
    node.cipher = await node.services.in_thread(luks.unlock, layout, material, secret)


_chain: ContextVar[tuple[tuple[int, int], ...]] = ContextVar("_chain", default=())
"""The files of the images that are being opened, each as the backing file of the one before."""


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def _open_backing(node: Qcow2, opening: Opening, header: Header) -> None:
    wanted = node.options.backing
    if wanted is Null.NULL or (wanted is None and header.backing_file is None):
        return
    chain = _chain.get()
    reference: str | BlockdevOptions
    if wanted is None:
        assert header.backing_file is not None
        own = await node.services.in_thread(_identity, node.filename())
        chain = chain if own is None else (*chain, own)
        reference = await node.services.in_thread(
            _backing_options, node, header.backing_file, header.backing_format, chain
        )
    else:
        assert not isinstance(wanted, Null)
        reference = wanted
    token = _chain.set(chain)
    try:
        await opening.child(node, BACKING, reference)
    except Error as error:
        prefix = "Could not open backing file: "
        raise Error(
            error.kind,
            prefix + error.message.removeprefix(prefix),
            hint=error.hint or "To open the image without it, say backing=null.",
            **error.facts,
        ) from error
    finally:
        _chain.reset(token)


def _backing_options(
    node: Qcow2, name: str, image_format: str | None, chain: tuple[tuple[int, int], ...]
) -> BlockdevOptions:
    if _identity(filename.full_path(name, node.filename())) in chain:
        raise Error(
            ErrorKind.CORRUPT,
            f"The backing files of '{node.filename()}' go round in a circle",
            hint="To open an image without its backing file, say backing=null.",
            node=node.name,
        )
    return filename.options_for(name, image_format, named_by=node.filename())


# What a writer does first ---------------------------------------------------------------------------------------


async def _take_over(node: Qcow2, file: HostFile, header: Header) -> Header:
    """Repair what was not closed cleanly, and clear the feature bits that only hold while nobody else writes."""
    if header.incompatible & Incompatible.DIRTY:
        log.warning("%s was not closed cleanly: checking and repairing it", node.filename())
        result = await check(file.node, header, repair=Repair.ALL)
        if result.check_errors or result.corruptions:
            what = result.messages[0] if result.messages else "see blkferry image check"
            raise Error(ErrorKind.CORRUPT, f"Could not repair dirty image: {what}", node=node.name)
        header = await read_header(file)
    unknown = header.autoclear & ~_KNOWN_AUTOCLEAR
    if unknown:
        log.info("%s: clearing autoclear features that we do not know: %#x", node.filename(), unknown)
        header = replace(header, autoclear=header.autoclear & _KNOWN_AUTOCLEAR)
        await file.put(AUTOCLEAR_AT, pack_features(header.autoclear))
        await file.node.flush()
    return header


# Tables ---------------------------------------------------------------------------------------------------------


async def read_metadata(node: Qcow2, file: HostFile, header: Header) -> Metadata:
    """The tables of an image, in memory as far as they are always there. Raises Error or OSError."""
    l2_bytes, refcount_bytes, slice_bytes = settings.cache_sizes(node, header)
    geometry = Geometry(header, slice_bytes)
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    assert table_bytes <= max(MAX_TABLE_BYTES, header.cluster_size), "a parsed header says so"
    l1 = from_big_endian(await file.get(header.l1_table_offset, header.l1_size * 8))
    table = from_big_endian(await file.get(header.refcount_table_offset, table_bytes))
    counts = codec(header.refcount_order)
    refcounts = Refcounts(file, counts, header.cluster_bits, table, TableCache(refcount_bytes, header.cluster_size))
    slices = TableCache(l2_bytes, geometry.slice_bytes)
    metadata = Metadata(file, header, geometry, l1, refcounts, slices, node.services)
    metadata.data_file = node.data_file
    metadata.writable = not node.read_only
    metadata.lazy = metadata.writable and settings.lazy_refcounts(node, header)
    checks = settings.overlap_checks(node)
    _note_metadata(metadata, header, l1, table, checks)
    metadata.guards_snapshots = "inactive_l2" in checks
    for snapshot in node.snapshots if "inactive_l1" in checks else ():
        metadata.know(snapshot.l1_table_offset, 8 * snapshot.l1_size, "inactive L1 table")
        if metadata.guards_snapshots:
            inactive = from_big_endian(await file.get(snapshot.l1_table_offset, 8 * snapshot.l1_size))
            metadata.know_inactive_tables(inactive)
    return metadata


def _note_metadata(metadata: Metadata, header: Header, l1: array[int], table: array[int], checks: set[str]) -> None:
    """Tell where metadata lies, as far as `overlap-check` wants it protected."""
    if "main_header" in checks:
        metadata.know(0, 1, "header")
        if header.encryption is not None:
            length = min(header.encryption.length, metadata.file.length - header.encryption.offset)
            metadata.know(header.encryption.offset, length, "encryption header")
    if "active_l1" in checks:
        metadata.know(header.l1_table_offset, len(l1) * 8, "active L1 table")
    if "refcount_table" in checks:
        metadata.know(header.refcount_table_offset, len(table) * 8, "refcount table")
    if "refcount_block" in checks:
        for entry in table:
            if entry:
                metadata.know(entry & TABLE_OFFSET, 1, "refcount block")
    if "active_l2" in checks:
        for entry in l1:
            if entry & OFFSET:
                metadata.know(entry & OFFSET, 1, "active L2 table")
    if "snapshot_table" in checks and header.nb_snapshots:
        metadata.know(header.snapshots_offset, 1, "snapshot table")
    if "bitmap_directory" in checks and header.bitmaps is not None:
        metadata.know(header.bitmaps.directory_offset, header.bitmaps.directory_size, "bitmap directory")


def raw_data(node: Qcow2) -> Node | None:
    """The external data file, where it has to be a raw image of its own."""
    if node.data_file is None or not node.header.autoclear & Autoclear.DATA_FILE_RAW:
        return None
    return node.data_file.node


def make_mapper(node: Qcow2) -> Mapper:
    """The reader of L2 slices for this image."""
    return Mapper(
        node.metadata.geometry,
        child=DATA_FILE if node.data_file is not None else FILE,
        known=node.metadata.known,
        fixed=node.data_file is not None,
        opaque_data=node.cipher is not None,
    )
