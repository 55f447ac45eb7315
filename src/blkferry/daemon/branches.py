"""The branches of the schema's open unions: what drivers, exports and objects contribute by their entry points."""

from __future__ import annotations

from collections.abc import Callable

from blkferry.graph import registry
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.create import BlockdevCreateOptions, unable
from blkferry.schema.export import BlockExportOptions
from blkferry.schema.qapi import variants
from blkferry.schema.qom import ObjectOptions


def load_branches() -> None:
    """Let the schema's open unions find what entry points contribute."""
    variants(BlockdevCreateOptions).loader = _load_creators
    for union, group in ((BlockdevOptions, "drivers"), (BlockExportOptions, "exports"), (ObjectOptions, "objects")):
        variants(union).loader = _loader(group)


def _loader(group: str) -> Callable[[str | None], None]:
    def load(name: str | None) -> None:
        for each in registry.plugins(group) if name is None else (name,):
            registry.load(group, each)

    return load


def _load_creators(name: str | None) -> None:
    for each in registry.plugins("drivers"):
        if name in (None, each):
            registry.load("drivers", each)
            unable(each)
