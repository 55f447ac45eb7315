"""The reply to query-qmp-schema, made from the declarations, and the types of that reply.

Types are named by opaque numbers, as QEMU does, so that nobody comes to rely on the name of a class;
builtins keep their names and an array is its element in brackets. Type "0" is the object without members.
Widths and bounds of integers do not show: QAPI has one `int`.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Literal

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
    resolve,
)
from blkferry.schema.qapi import DEPRECATED, Command, Doc, Event, Form, Integer, Null, Struct, branch, union

if TYPE_CHECKING:
    from collections.abc import Iterable


class JSONType(enum.StrEnum):
    """The JSON types, `value` being any of them."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


@union("meta-type")
class SchemaInfo(Struct):
    """One entry of the schema."""

    name: Annotated[str, Doc("name of the entry", since="2.5")]
    meta_type: Annotated[str, Doc("what the entry is", since="2.5")]
    features: Annotated[list[str] | None, Doc("names of its features", since="4.1")] = None


@branch
class SchemaInfoBuiltin(SchemaInfo):
    """A type that is not made of others."""

    meta_type: Literal["builtin"] = "builtin"
    json_type: Annotated[JSONType, Doc("the JSON type of its values")]


class SchemaInfoEnumMember(Struct):
    """A value of an enum."""

    name: Annotated[str, Doc("the value")]
    features: Annotated[list[str] | None, Doc("names of its features")] = None


@branch
class SchemaInfoEnum(SchemaInfo):
    """An enum."""

    meta_type: Literal["enum"] = "enum"
    members: Annotated[list[SchemaInfoEnumMember], Doc("its values", since="6.2")]
    values: Annotated[list[str], Doc("the names of its values", features=(DEPRECATED,))]


@branch
class SchemaInfoArray(SchemaInfo):
    """A list."""

    meta_type: Literal["array"] = "array"
    element_type: Annotated[str, Doc("name of the type of its items")]


class SchemaInfoObjectMember(Struct):
    """A member of an object."""

    name: Annotated[str, Doc("name of the member")]
    type: Annotated[str, Doc("name of its type")]
    default: Annotated[object | None, Doc("null if the member is optional")] = None
    features: Annotated[list[str] | None, Doc("names of its features", since="5.0")] = None


class SchemaInfoObjectVariant(Struct):
    """A branch of a union."""

    case: Annotated[str, Doc("value of the tag")]
    type: Annotated[str, Doc("name of the object type whose members it adds")]


@branch
class SchemaInfoObject(SchemaInfo):
    """A struct or a union."""

    meta_type: Literal["object"] = "object"
    members: Annotated[list[SchemaInfoObjectMember], Doc("its members")]
    tag: Annotated[str | None, Doc("name of the member that selects the branch")] = None
    variants: Annotated[list[SchemaInfoObjectVariant] | None, Doc("its branches")] = None


class SchemaInfoAlternateMember(Struct):
    """One of the types of an alternate."""

    type: Annotated[str, Doc("name of the type")]


@branch
class SchemaInfoAlternate(SchemaInfo):
    """A value of one of several types."""

    meta_type: Literal["alternate"] = "alternate"
    members: Annotated[list[SchemaInfoAlternateMember], Doc("its types")]


@branch
class SchemaInfoCommand(SchemaInfo):
    """A command."""

    meta_type: Literal["command"] = "command"
    arg_type: Annotated[str, Doc("name of the object type of its arguments")]
    ret_type: Annotated[str, Doc("name of the type of its result")]
    allow_oob: Annotated[bool, Doc("whether it may run out of band", since="2.12")] = False


@branch
class SchemaInfoEvent(SchemaInfo):
    """An event."""

    meta_type: Literal["event"] = "event"
    arg_type: Annotated[str, Doc("name of the object type of its data")]


_EMPTY = "0"

_BUILTINS = {
    "str": JSONType.STRING,
    "bool": JSONType.BOOLEAN,
    "null": JSONType.NULL,
    "any": JSONType.VALUE,
    "int": JSONType.INT,
}


def introspect(commands: Iterable[Command], events: Iterable[Event]) -> list[SchemaInfo]:
    """Describe commands and events and every type that they mention."""
    return _Describer().describe(commands, events)


class _Describer:
    """Names types and describes each once; the name comes first, so that a type may mention itself."""

    def __init__(self) -> None:
        self._names: dict[object, str] = {}
        self._entries: list[SchemaInfo] = []
        self._numbers = 0

    def describe(self, commands: Iterable[Command], events: Iterable[Event]) -> list[SchemaInfo]:
        self._entries.append(SchemaInfoObject(name=_EMPTY, members=[]))
        for command in commands:
            arguments = self._name(Object(command.arguments)) if command.arguments is not None else _EMPTY
            returns = self._name(resolve(command.returns)) if command.returns is not None else _EMPTY
            features = _features(command.features)
            self._entries.append(
                SchemaInfoCommand(name=command.name, arg_type=arguments, ret_type=returns, features=features)
            )
        for event in events:
            data = self._name(Object(event.data)) if event.data is not None else _EMPTY
            self._entries.append(SchemaInfoEvent(name=event.name, arg_type=data, features=_features(event.features)))
        return self._entries

    def _name(self, type_: QapiType) -> str:
        """The name of a type, describing it when it is met for the first time."""
        match type_:
            case Builtin() | Integer():
                name = type_.value if isinstance(type_, Builtin) else "int"
                if self._is_new(name, name):
                    self._entries.append(SchemaInfoBuiltin(name=name, json_type=_BUILTINS[name]))
            case Array(element=element):
                element_name = self._name(element)
                name = f"[{element_name}]"
                if self._is_new(name, name):
                    self._entries.append(SchemaInfoArray(name=name, element_type=element_name))
            case Enumeration() | Tag():
                if self._is_new(type_):
                    listed = [SchemaInfoEnumMember(name=value) for value in type_.values]
                    values = list(type_.values)
                    self._entries.append(SchemaInfoEnum(name=self._names[type_], members=listed, values=values))
                name = self._names[type_]
            case Alternate(choices=choices):
                if self._is_new(type_):
                    types = [SchemaInfoAlternateMember(type=self._name(choice)) for choice in choices]
                    self._entries.append(SchemaInfoAlternate(name=self._names[type_], members=types))
                name = self._names[type_]
            case Object():
                if self._is_new(type_):
                    self._object(self._names[type_], type_)
                name = self._names[type_]
        return name

    def _object(self, name: str, type_: Object) -> None:
        listed = [self._member(member) for member in members(type_.cls)]
        variants = type_.variants
        if variants is None:
            self._entries.append(SchemaInfoObject(name=name, members=listed))
            return
        cases = [
            SchemaInfoObjectVariant(case=case, type=self._branch(cls, type_.form))
            for case, cls in variants.all().items()
        ]
        self._entries.append(SchemaInfoObject(name=name, members=listed, tag=variants.tag, variants=cases))

    def _branch(self, cls: type[Struct], form: Form) -> str:
        """The object type of what a branch adds: its members, or `data` that holds them."""
        own = branch_members(cls)
        data = self._struct(("branch", cls), [self._member(member) for member in own]) if own else _EMPTY
        if form is Form.FLAT:
            return data
        return self._struct(("wrapper", cls), [SchemaInfoObjectMember(name="data", type=data)])

    def _struct(self, key: object, listed: list[SchemaInfoObjectMember]) -> str:
        if self._is_new(key):
            self._entries.append(SchemaInfoObject(name=self._names[key], members=listed))
        return self._names[key]

    def _member(self, member: Member) -> SchemaInfoObjectMember:
        return SchemaInfoObjectMember(
            name=member.name,
            type=self._name(member.type),
            default=Null.NULL if member.optional else None,
            features=_features(member.doc.features),
        )

    def _is_new(self, key: object, name: str = "") -> bool:
        """Whether `key` has no name yet; it has one afterwards."""
        if key in self._names:
            return False
        if not name:
            self._numbers += 1
            name = str(self._numbers)
        self._names[key] = name
        return True


def _features(names: tuple[str, ...]) -> list[str] | None:
    return list(names) or None
