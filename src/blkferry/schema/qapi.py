"""The vocabulary in which everything a user may say is declared.

One `Struct` class is one QAPI object type. Its annotations are the schema: names, types, ranges, defaults and
documentation are read from there (`model`) by the visitor, introspection, help and the manual, so nothing is
said twice. It does not know any concrete type, any command, or how values arrive (JSON or `key=value`).

A struct::

    class NbdServerOptions(Struct):
        '''The NBD server: where it listens and whom it lets in.'''

        addr: Annotated[SocketAddress, Doc("the address to listen on")]
        max_connections: Annotated[Uint32, Doc("clients at the same time; 0 is unlimited", since="5.2")] = 0

A member without a default is required. A default of None says that absence means something of its own; any
other default is the value an absent member has. Where QAPI has an explicit null, `Null` joins the type.
Underscores become dashes on the wire; a class whose wire names differ passes `rename={...}`, a single member
`= msgspec.field(name="str")`.

A flat union is a base class that names its tag, and one subclass per branch that fixes it::

    @union("driver")
    class BlockdevOptions(Struct):
        driver: Annotated[str, Doc("the block driver")]
        ...

    @branch
    class FileOptions(BlockdevOptions):
        '''A file of the host.'''

        driver: Literal["file"] = "file"
        filename: Annotated[str, Doc("path of the file")]

That is all a block driver, export or object writes about its options. A driver that answers to two names has
two classes, the second a subclass of the first that fixes the tag anew. Unions are open:
`variants(base).loader` may be set to a function that brings in branches on demand (from entry points) when a
tag is unknown or all are wanted.

Annotations are evaluated at run time: the types they name must be imported outside `if TYPE_CHECKING`.

Invariants: every member carries a `Doc`; a tag is fixed by one branch only.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, dataclass_transform

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXTENSION = "x-blkferry"
"""The feature that marks what QEMU does not have."""

DEPRECATED = "deprecated"
UNSTABLE = "unstable"


# -- what a declaration is made of ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Doc:
    """What a member means, in a phrase.

    `since` is the QEMU version that introduced it. `always` marks a member of a reply that is always sent:
    its default serves the code that builds the reply, and is no default of the protocol.
    """

    text: str
    since: str = ""
    features: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """The name of an alternate, which errors and the manual use: `Annotated[str | Options, Named("Ref")]`."""

    name: str


@dataclass(frozen=True, slots=True)
class TagOf:
    """A string that is one of a union's tags: `Annotated[str, TagOf(BlockExportOptions)]`."""

    base: type[Struct]


class Null(enum.Enum):
    """The explicit JSON null of a member where it differs from absence (`backing: null`: no backing file)."""

    NULL = None


class Form(enum.Enum):
    """How a union travels: members beside the tag, or wrapped in `data` as older commands have it."""

    FLAT = "flat"
    WRAPPED = "wrapped"


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer of a C type, or with documented bounds narrower than that (`bounded`)."""

    c_name: str
    low: int
    high: int
    bounded: bool = False


class _KeywordOnly(msgspec.StructMeta):
    """Makes `kw_only` hold for subclasses, which msgspec does not inherit."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> _KeywordOnly:
        config.setdefault("kw_only", True)
        made: _KeywordOnly = super().__new__(cls, name, bases, namespace, **config)
        return made


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Struct(msgspec.Struct, metaclass=_KeywordOnly, frozen=True, rename="kebab", omit_defaults=True):
    """Base of every QAPI object type: an immutable value built with keywords."""

    __variants__: ClassVar[Variants | None] = None


StructT = TypeVar("StructT", bound=Struct)


# -- unions --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Variants:
    """The branches of a union by tag value.

    `loader`, when set, is called with an unknown tag, or with None when all branches are wanted; it imports
    the modules whose `@branch` classes it knows of. `wrappable` unions have a form in which the members of
    the branch stand in `data` (QAPI's simple unions); both forms are accepted wherever the union is.
    """

    base: type[Struct]
    tag: str
    wrappable: bool = False
    loader: Callable[[str | None], None] | None = None
    known: dict[str, type[Struct]] = dataclasses.field(default_factory=dict)

    @property
    def field(self) -> str:
        """The tag's name in Python."""
        return self.tag.replace("-", "_")

    def find(self, value: str) -> type[Struct] | None:
        if value not in self.known and self.loader is not None:
            self.loader(value)
        return self.known.get(value)

    def all(self) -> Mapping[str, type[Struct]]:
        if self.loader is not None:
            self.loader(None)
        return dict(sorted(self.known.items()))

    def add(self, cls: type[Struct]) -> None:
        value = self.value_of(cls)
        other = self.known.setdefault(value, cls)
        if other is not cls:
            raise TypeError(f"{self.tag} '{value}' is fixed by both {other.__qualname__} and {cls.__qualname__}")

    def value_of(self, cls: type[Struct]) -> str:
        """The tag value a branch fixes: the default of its tag member."""
        value = defaults(cls).get(self.field)
        if not isinstance(value, str):
            raise TypeError(f"{cls.__qualname__} is a branch of {self.base.__name__} but does not fix '{self.tag}'")
        return value


def union(tag: str, *, wrappable: bool = False) -> Callable[[type[StructT]], type[StructT]]:
    """Make a struct the base of a union whose branches its member `tag` selects."""

    def declare(cls: type[StructT]) -> type[StructT]:
        cls.__variants__ = Variants(cls, tag, wrappable)
        return cls

    return declare


def branch(cls: type[StructT]) -> type[StructT]:
    """Make a subclass of a union's base the branch for the tag value it fixes."""
    variants(cls).add(cls)
    return cls


def variants(cls: type[Struct]) -> Variants:
    """The variants of the union that `cls` is the base or a branch of."""
    found = cls.__variants__
    if found is None:
        raise TypeError(f"{cls.__qualname__} is not part of a union")
    return found


def defaults(cls: type[Struct]) -> dict[str, object]:
    """The default of every field, NODEFAULT for those without."""
    fields, trailing = cls.__struct_fields__, cls.__struct_defaults__
    padding = (msgspec.NODEFAULT,) * (len(fields) - len(trailing))
    return dict(zip(fields, padding + trailing, strict=True))


# -- integers ------------------------------------------------------------------------------------------------

Int32 = Annotated[int, Integer("int32_t", -(2**31), 2**31 - 1)]
Uint8 = Annotated[int, Integer("uint8_t", 0, 2**8 - 1)]
Uint16 = Annotated[int, Integer("uint16_t", 0, 2**16 - 1)]
Uint32 = Annotated[int, Integer("uint32_t", 0, 2**32 - 1)]
Uint64 = Annotated[int, Integer("uint64_t", 0, 2**64 - 1)]
Size = Annotated[int, Integer("size", 0, 2**64 - 1)]
"""Bytes; in `key=value` form it may carry a suffix (`4k`, `0.5M`)."""


def bounded(low: int, high: int) -> Integer:
    """Bounds that the documentation states, for `Annotated[int, ..., Doc(...)]`."""
    return Integer("int64_t", low, high, bounded=True)


# -- commands and events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Command:
    """A QMP command. `arguments` is None when it takes none; `returns` is any annotation, None for `{}`."""

    name: str
    doc: str
    arguments: type[Struct] | None = None
    returns: Any = None
    since: str = ""
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event and its data."""

    name: str
    doc: str
    data: type[Struct] | None = None
    since: str = ""
    features: tuple[str, ...] = ()
