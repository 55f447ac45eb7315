"""What transactions (`transaction`) can do to dirty bitmaps, and the digest of one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from blkferry.daemon.commands import command
from blkferry.errors import Error, ErrorKind
from blkferry.graph.bitmaps import DirtyBitmap, find_bitmap
from blkferry.schema.bitmap import (
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    BlockDirtyBitmapSha256,
)

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.graph import Graph
    from blkferry.graph.node import Node

MAX_NAME: Final = 1023  # bytes
_SMALLEST, _LARGEST = 512, 1 << 31
_DEFAULT: Final = 1 << 16
_DEFAULT_FROM: Final = 1 << 12

Undo = Callable[[], None]


def _node(graph: Graph, name: str) -> Node:
    node = graph.nodes.get(name)
    if node is None:
        raise Error(ErrorKind.NOT_FOUND, f"Node '{name}' not found", node=name)
    return node


def _find(graph: Graph, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    node = _node(graph, node_name)
    return node, find_bitmap(node, name)


def _check_writable(node: Node, bitmap: DirtyBitmap) -> None:
    if node.read_only and bitmap.persistent:
        raise Error(
            ErrorKind.DENIED,
            f"Bitmap '{bitmap.name}' is readonly and cannot be modified",
            hint=f"Node '{node.name}' is read-only.",
            bitmap=bitmap.name,
        )


# Actions: each is done at once and returns what undoes it ------------------------------------------------------


def _add(graph: Graph, wanted: BlockDirtyBitmapAdd) -> Undo:
    if not wanted.name:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Bitmap name cannot be empty")
    node = graph.find(wanted.node, device=wanted.node)
    granularity = _default_granularity(node) if wanted.granularity is None else wanted.granularity
    if not _SMALLEST <= granularity <= _LARGEST or granularity & (granularity - 1):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Granularity must be power of 2 and at least 512",
            hint="And at most 2 GiB.",
            granularity=granularity,
        )
    if wanted.name in node.dirty_bitmaps:
        raise Error(ErrorKind.EXISTS, f"Bitmap already exists: {wanted.name}", node=node.name)
    bits = granularity.bit_length() - 1
    if wanted.persistent:
        if node.read_only:
            raise Error(ErrorKind.DENIED, f"Block node is read-only: '{node.name}'", node=node.name)
        node.check_bitmap_storable(wanted.name, bits)
    if len(wanted.name.encode()) > MAX_NAME:
        raise Error(
            ErrorKind.INVALID_ARGUMENT, f"Bitmap name too long: {wanted.name}", hint=f"At most {MAX_NAME} bytes."
        )
    bitmap = DirtyBitmap(wanted.name, node.length, bits, enabled=not wanted.disabled, persistent=wanted.persistent)
    bitmap.changed = True
    node.dirty_bitmaps[wanted.name] = bitmap
    return lambda: node.dirty_bitmaps.__delitem__(wanted.name)


def _default_granularity(node: Node) -> int:
    return min(max(node.image_info().cluster_size or _DEFAULT, _DEFAULT_FROM), _DEFAULT)


def _remove(graph: Graph, wanted: BlockDirtyBitmap) -> Undo:
    node, bitmap = _find(graph, wanted.node, wanted.name)
    bitmap.check(busy=True, inconsistent=False)
    _check_writable(node, bitmap)
    before = dict(node.dirty_bitmaps)
    del node.dirty_bitmaps[wanted.name]
    return lambda: node.dirty_bitmaps.replace(before)


def _clear(graph: Graph, wanted: BlockDirtyBitmap) -> Undo:
    node, bitmap = _find(graph, wanted.node, wanted.name)
    bitmap.check(busy=True, inconsistent=True)
    _check_writable(node, bitmap)
    before = bitmap.clear()
    return lambda: bitmap.restore(before)


def _enable(graph: Graph, wanted: BlockDirtyBitmap) -> Undo:
    return _record(graph, wanted, enabled=True)


def _disable(graph: Graph, wanted: BlockDirtyBitmap) -> Undo:
    return _record(graph, wanted, enabled=False)


def _record(graph: Graph, wanted: BlockDirtyBitmap, *, enabled: bool) -> Undo:
    _, bitmap = _find(graph, wanted.node, wanted.name)
    bitmap.check(busy=True, inconsistent=True)
    before = bitmap.enabled
    bitmap.enabled = enabled
    bitmap.changed = True
    return lambda: setattr(bitmap, "enabled", before)


def _merge(graph: Graph, wanted: BlockDirtyBitmapMerge) -> Undo:
    node, target = _find(graph, wanted.node, wanted.target)
    target.check(busy=True, inconsistent=True)
    _check_writable(node, target)
    before = bytearray(target.array)

    def undo() -> None:
        target.restore(before)

    try:
        for each in wanted.bitmaps:
            where, name = (wanted.node, each) if isinstance(each, str) else (each.node, each.name)
            _, source = _find(graph, where, name)
            source.check(busy=True, inconsistent=True)
            target.merge(source)
    except BaseException:
        undo()
        raise
    return undo


ACTIONS: Final[dict[str, Callable[[Graph, Any], Undo]]] = {
    "block-dirty-bitmap-add": _add,
    "block-dirty-bitmap-remove": _remove,
    "block-dirty-bitmap-clear": _clear,
    "block-dirty-bitmap-enable": _enable,
    "block-dirty-bitmap-disable": _disable,
    "block-dirty-bitmap-merge": _merge,
}
"""Each takes the data of its own action."""


@command("x-debug-block-dirty-bitmap-sha256")
async def block_dirty_bitmap_sha256(daemon: Daemon, arguments: BlockDirtyBitmap) -> BlockDirtyBitmapSha256:
    _, bitmap = _find(daemon.graph, arguments.node, arguments.name)
    words = bitmap.bits
    words += bytes(-len(words) % 8 or (8 if not words else 0))
    return BlockDirtyBitmapSha256(sha256=hashlib.sha256(words).hexdigest())
