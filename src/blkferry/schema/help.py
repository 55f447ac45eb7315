"""Help texts of options, made from their declarations.

Knows how a type is written in `key=value` form and nothing about terminals: lines are plain text with aligned
columns, as wide as they need to be.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from blkferry.schema.model import (
    Alternate,
    Array,
    Builtin,
    Enumeration,
    Member,
    Object,
    QapiType,
    Tag,
    branch_members,
    members,
    variants_of,
)
from blkferry.schema.qapi import Integer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from blkferry.schema.qapi import Struct

_WRITTEN = {Builtin.STR: "str", Builtin.BOOL: "on|off", Builtin.NULL: "null", Builtin.ANY: "any"}

MAX_COLUMN = 40
"""Widest first column; a longer entry pushes its own text to the right rather than everyone's."""


def help_text(cls: type[Struct]) -> str:
    """What may be said about `cls`: for a union its branches and what they share, else its members."""
    union = variants_of(cls)
    if union is None:
        own = cls.__variants__
        heading = f"{own.tag}={own.value_of(cls)}: {summary(cls)}" if own is not None else summary(cls)
        return "\n".join([heading, *_table(_rows(members(cls)))])
    branches = [(f"{union.tag}={name}", summary(each)) for name, each in union.all().items()]
    common = [member for member in members(cls) if member.name != union.tag]
    lines = [summary(cls), *_table(branches)]
    if common:
        lines += ["", f"Common to every {union.tag}:", *_table(_rows(common))]
    return "\n".join(lines)


def summary(documented: type) -> str:
    """The first line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]


def written(type_: QapiType) -> str:
    """How a value of the type is written."""
    match type_:
        case Builtin():
            return _WRITTEN[type_]
        case Integer():
            return "size" if type_.c_name == "size" else "int"
        case Enumeration() | Tag():
            return "|".join(type_.values)
        case Array(element=element):
            return f"[{written(element)}]"
        case Object():
            return "object"
        case Alternate(choices=choices):
            return " or ".join(written(choice) for choice in choices)


def _rows(shown: Iterable[Member], prefix: str = "") -> Iterator[tuple[str, str]]:
    for member in shown:
        name = prefix + member.name
        if isinstance(member.type, Object) and not prefix:
            yield from _nested(member, member.type)
        else:
            yield f"{name}=<{written(member.type)}>", _described(member)


def _nested(member: Member, type_: Object) -> Iterator[tuple[str, str]]:
    """The members of an object one level down, with dotted names; deeper ones are shown as objects."""
    prefix = f"{member.name}."
    union = type_.variants
    yield f"{member.name}", _described(member)
    yield from (("  " + name, text) for name, text in _rows(members(type_.cls), prefix))
    if union is None:
        return
    for name, cls in union.all().items():
        for entry, text in _rows(branch_members(cls), prefix):
            yield "  " + entry, f"{name}: {text}"


def _described(member: Member) -> str:
    if not member.optional:
        return f"{member.doc.text} (required)"
    default = member.default
    if default is None:
        return member.doc.text
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, enum.Enum):
        default = default.value
    return f"{member.doc.text} (default: {default})"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max((len(left) for left, _ in listed if len(left) <= MAX_COLUMN), default=0)
    return [f"  {left:<{width}}  {right}".rstrip() for left, right in listed]
