"""What the declarations of `qapi` amount to: types and members as data.

The visitor, introspection and help work on this model alone and never look at annotations themselves.

Invariants: models are immutable and cached; an annotation without meaning is a `TypeError` of the declaring
module, not of the user.
"""

from __future__ import annotations

import enum
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any

import msgspec

from blkferry.schema.qapi import Doc, Form, Integer, Named, Null, Struct, TagOf, Variants, defaults, variants

if typing.TYPE_CHECKING:
    from collections.abc import Mapping

INT64 = Integer("int64_t", -(2**63), 2**63 - 1)


class Builtin(enum.Enum):
    """Types without parameters, by their QAPI names."""

    STR = "str"
    BOOL = "bool"
    NULL = "null"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Enumeration:
    """An enum; the values of its members are the wire names."""

    cls: type[enum.Enum]

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(member.value for member in self.cls)


@dataclass(frozen=True, slots=True)
class Tag:
    """The tags of a union, as an enum that grows with its branches."""

    variants: Variants

    @property
    def name(self) -> str:
        return f"{self.variants.base.__name__}.{self.variants.tag}"

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.variants.all())


@dataclass(frozen=True, slots=True)
class Array:
    element: QapiType


@dataclass(frozen=True, slots=True)
class Object:
    """A struct, or a union when the class has variants."""

    cls: type[Struct]
    form: Form = Form.FLAT

    @property
    def variants(self) -> Variants | None:
        return variants_of(self.cls)


@dataclass(frozen=True, slots=True)
class Alternate:
    """One of several types, told apart by their JSON type."""

    name: str
    choices: tuple[QapiType, ...]


QapiType = Builtin | Integer | Enumeration | Tag | Array | Object | Alternate


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an object: `name` on the wire, `field` in Python."""

    name: str
    field: str
    type: QapiType
    default: object
    has_default: bool
    doc: Doc

    @property
    def optional(self) -> bool:
        """Whether it may be absent on the wire."""
        return self.has_default and not self.doc.always


def variants_of(cls: type[Struct]) -> Variants | None:
    """The variants when `cls` is the base of a union; None for a branch or a plain struct."""
    found = cls.__variants__
    return found if found is not None and found.base is cls else None


@functools.cache
def members(cls: type[Struct]) -> tuple[Member, ...]:
    """The members of a struct in declaration order, those of its base classes first.

    The tag is a member of a union's base, but not of the branches, which fix it.
    """
    own = cls.__variants__
    tag_field = own.field if own is not None else None
    hints = typing.get_type_hints(cls, include_extras=True)
    given = defaults(cls)
    found = []
    for name, wire_name in zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True):
        if name == tag_field and variants_of(cls) is None:
            continue
        hint = hints[name]
        doc = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Doc)), None)
        if doc is None:
            raise TypeError(f"{cls.__qualname__}.{name} has no Doc")
        type_ = Tag(own) if own is not None and name == tag_field else resolve(hint)
        default = given[name]
        has_default = default is not msgspec.NODEFAULT
        found.append(Member(wire_name, name, type_, default if has_default else None, has_default, doc))
    return tuple(found)


@functools.cache
def branch_members(cls: type[Struct]) -> tuple[Member, ...]:
    """The members a branch adds to those of its union's base."""
    common = {member.name for member in members(variants(cls).base)}
    return tuple(member for member in members(cls) if member.name not in common)


def resolve(hint: Any) -> QapiType:
    """The model of an annotation; a plain `int` is 64 bits wide, as in QAPI."""
    marks: tuple[object, ...] = getattr(hint, "__metadata__", ())
    if marks:
        hint = hint.__origin__
    for mark in marks:
        if isinstance(mark, Integer):
            return mark
        if isinstance(mark, TagOf):
            return Tag(variants(mark.base))
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Enumeration(hint)
    if isinstance(hint, type) and issubclass(hint, Struct):
        return Object(hint, Form.WRAPPED if Form.WRAPPED in marks else Form.FLAT)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return Array(resolve(arguments[0]))
    if origin in {typing.Union, types.UnionType}:
        choices = [choice for choice in arguments if choice is not type(None)]
        if len(choices) == 1:
            return resolve(choices[0])
        name = next((mark.name for mark in marks if isinstance(mark, Named)), None)
        if name is not None:
            return Alternate(name, tuple(resolve(choice) for choice in choices))
    raise TypeError(f"{hint!r} has no meaning in the schema")


_PLAIN: Mapping[object, QapiType] = {
    str: Builtin.STR,
    bool: Builtin.BOOL,
    int: INT64,
    Null: Builtin.NULL,
    object: Builtin.ANY,
    Any: Builtin.ANY,
}
