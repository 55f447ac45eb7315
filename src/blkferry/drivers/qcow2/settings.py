"""What the options of an image amount to: cache sizes, protected metadata, discards, lazy refcounts; QEMU's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.header import Compatible, Header
from blkferry.drivers.qcow2.options import Qcow2OverlapCheckFlags, Qcow2OverlapCheckMode
from blkferry.errors import Error, ErrorKind
from blkferry.schema.block import BlockdevDiscardOptions

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.node import Qcow2

CLEAN_INTERVAL_SECONDS = 600
MAX_L2_CACHE = 32 << 20
DEFAULT_SLICE = 64 << 10
"""QEMU's defaults: the L2 cache covers the whole disk, up to that."""

MIN_REFCOUNT_CACHE = 256 << 10
"""QEMU's is four clusters. With small clusters that is so little that every second write would have to wait."""


def cache_sizes(node: Qcow2, header: Header) -> tuple[int, int, int]:
    """Bytes for L2 slices, for refcount blocks, and of one slice, by QEMU's rules. Raises Error."""
    options = node.options
    size = header.cluster_size
    entry = options.l2_cache_entry_size or min(DEFAULT_SLICE, size)
    if entry < 512 or entry > size or entry & (entry - 1):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({size})",
            value=entry,
        )
    whole = -(-header.size // size) * header.l2_entry_size
    most = max(-(-whole // entry) * entry, entry)
    smallest_refcount = max(4 * size, MIN_REFCOUNT_CACHE)
    combined, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    for name, value in (("cache-size", combined), ("l2-cache-size", l2), ("refcount-cache-size", refcount)):
        if value is not None and value < 0:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Parameter '{name}' expects a size of 0 bytes or more")
    if combined is None:
        l2 = min(MAX_L2_CACHE, most) if l2 is None else min(l2, most)
        return l2, smallest_refcount if refcount is None else refcount, entry
    if l2 is not None and refcount is not None and l2 + refcount != combined:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            hint="Leave one of them out.",
        )
    if l2 is not None and l2 > combined:
        raise Error(ErrorKind.INVALID_ARGUMENT, "l2-cache-size may not exceed cache-size")
    if refcount is not None and refcount > combined:
        raise Error(ErrorKind.INVALID_ARGUMENT, "refcount-cache-size may not exceed cache-size")
    if l2 is None and refcount is None:
        if combined >= most + smallest_refcount:
            l2 = most
        else:
            return max(combined - smallest_refcount, 0), min(combined, smallest_refcount), entry
    if l2 is None:
        l2 = combined - (refcount or 0)
    return min(l2, most), combined - l2 if refcount is None else refcount, entry


def lazy_refcounts(node: Qcow2, header: Header) -> bool:
    """Whether refcounts may be out of date on disk. Raises Error."""
    wanted = node.options.lazy_refcounts
    if wanted and header.version < 3:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        )
    return bool(header.compatible & Compatible.LAZY_REFCOUNTS) if wanted is None else wanted


_CONSTANT = frozenset({"main_header", "active_l1", "refcount_table", "snapshot_table", "bitmap_directory"})
_CACHED = _CONSTANT | {"active_l2", "refcount_block", "inactive_l1"}
_ALL = _CACHED | {"inactive_l2"}
_CHECKS = {
    Qcow2OverlapCheckMode.NONE: frozenset[str](),
    Qcow2OverlapCheckMode.CONSTANT: _CONSTANT,
    Qcow2OverlapCheckMode.CACHED: _CACHED,
    Qcow2OverlapCheckMode.ALL: _ALL,
}


def overlap_checks(node: Qcow2) -> set[str]:
    """Which metadata is protected, by the names of Qcow2OverlapCheckFlags."""
    wanted = node.options.overlap_check
    if not isinstance(wanted, Qcow2OverlapCheckFlags):
        return set(_CHECKS[wanted or Qcow2OverlapCheckMode.CACHED])
    chosen = set(_CHECKS[wanted.template or Qcow2OverlapCheckMode.CACHED])
    for name in _ALL:
        flag = getattr(wanted, name)
        if flag is not None:
            (chosen.add if flag else chosen.discard)(name)
    return chosen


def set_discards(node: Qcow2) -> None:
    """What is given back to the host, of what is given up in the image."""
    options = node.options
    node.unmaps = node.unmaps or options.discard is BlockdevDiscardOptions.UNMAP
    node.discard_no_unref = bool(options.discard_no_unref)
    request, snapshot = options.pass_discard_request, options.pass_discard_snapshot
    node.pass_discard_request = node.unmaps if request is None else request
    node.pass_discard_snapshot = True if snapshot is None else snapshot
    node.pass_discard_other = bool(options.pass_discard_other)
