"""From what a user said to a validated, typed value (`visit`), and back (`dump`).

The one place where input meets the declarations of `qapi`. Input is what a JSON parser or `keyval` made:
dicts, lists and scalars of any shape; whatever it is, the answer is a value or `Error(INVALID_ARGUMENT)`
with QEMU's sentence, and what would be right as the hint. It does not judge meaning (does the node exist?),
only form.

Invariants: nothing is coerced beyond what the wire form says (`"on"` is a bool only in `key=value` form);
recursion is bounded; echoed input is cut to a readable length.
"""

from __future__ import annotations

import difflib
import enum
import itertools
from typing import TYPE_CHECKING, Any, TypeVar, overload

from blkferry.errors import Error, ErrorKind
from blkferry.schema.model import (
    Alternate,
    Array,
    Builtin,
    Enumeration,
    Member,
    Object,
    QapiType,
    Tag,
    members,
    resolve,
    variants_of,
)
from blkferry.schema.qapi import Form, Integer, Null, Struct, Variants
from blkferry.schema.scalars import parse_integer, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_DEPTH = 64
"""Deepest nesting of options: overlays given inline nest once per image, and Python's stack is finite."""

MAX_ECHO = 200
"""Characters of a user's value repeated in a message."""

MAX_GUESS = 64
"""Longest name for which a similar one is looked for; the comparison is quadratic."""

MAX_GUESSES = 32
"""Most names looked at to find a similar one."""

_ON = frozenset({"on", "yes", "true", "y"})
_OFF = frozenset({"off", "no", "false", "n"})
_JSON_KINDS: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    dict: "object",
    list: "array",
    float: "number",
}
_BUILTIN_KINDS = {Builtin.STR: "string", Builtin.BOOL: "boolean", Builtin.NULL: "null"}

T = TypeVar("T")


@overload
def visit(form: type[T], value: object, *, keyval: bool = False, path: str = "") -> T: ...
@overload
def visit(form: Any, value: object, *, keyval: bool = False, path: str = "") -> Any: ...
def visit(form: Any, value: object, *, keyval: bool = False, path: str = "") -> Any:
    """Make `value` a value of the annotation `form`.

    With `keyval`, scalars are the strings of a `key=value` option. `path` names the value in errors; members
    of a nameless value are named plainly.
    """
    return _Visitor(keyval=keyval).visit(resolve(form), value, path, 0)


def dump(value: object) -> Any:
    """The JSON-able form of a typed value: absent members and those at their default are left out.

    A union's tag is always there, so that `visit` reads back what `dump` wrote.
    """
    if isinstance(value, Struct):
        cls = type(value)
        union = cls.__variants__
        written: dict[str, Any] = {}
        if union is not None and union.base is not cls:
            written[union.tag] = union.value_of(cls)
        for member in members(cls):
            item = getattr(value, member.field)
            if member.optional and item == member.default:
                continue
            if item is not None:
                written[member.name] = _wrapped(dump(item), member.type)
        return written
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    if isinstance(value, dict):
        return {key: dump(item) for key, item in value.items()}
    return value


def _wrapped(written: Any, type_: QapiType) -> Any:
    """The member `type_` in the form in which it travels."""
    if not isinstance(type_, Object) or type_.form is Form.FLAT or type_.variants is None:
        return written
    tag = type_.variants.tag
    return {tag: written.pop(tag), "data": written}


def kind_of(type_: QapiType) -> str | None:
    """The JSON type that a value of `type_` has, in the words of the error messages; None: any."""
    match type_:
        case Builtin():
            return _BUILTIN_KINDS.get(type_)
        case Integer():
            return "integer"
        case Enumeration() | Tag():
            return "string"
        case Array():
            return "array"
        case Object():
            return "object"
        case Alternate():
            return None


class _Visitor:
    """One traversal. `path` is the dotted name of the value in hand, empty for the outermost one."""

    def __init__(self, *, keyval: bool) -> None:
        self._keyval = keyval

    def visit(self, type_: QapiType, value: object, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _invalid("Parameter nesting depth limit exceeded", f"At most {MAX_DEPTH} levels may be nested.", path)
        match type_:
            case Object():
                return self._object(type_, value, path, depth)
            case Array(element=element):
                if not isinstance(value, list):
                    raise self._wrong_kind(value, path, "array")
                return [self.visit(element, item, self._item(path, i), depth + 1) for i, item in enumerate(value)]
            case Alternate():
                return self._alternate(type_, value, path, depth)
            case Enumeration(cls=cls):
                text = self._string(value, path)
                if text not in type_.values:
                    raise _not_accepted(type_.values, text, path)
                return cls(text)
            case Tag():
                text = self._string(value, path)
                if type_.variants.find(text) is None:
                    raise _not_accepted(type_.values, text, path)
                return text
            case Integer():
                return self._integer(type_, value, path)
            case Builtin.STR:
                return self._string(value, path)
            case Builtin.BOOL:
                return self._bool(value, path)
            case Builtin.NULL:
                if value is not None:
                    raise self._wrong_kind(value, path, "null")
                return Null.NULL
            case Builtin.ANY:
                return value

    # -- scalars ---------------------------------------------------------------------------------------------

    def _string(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise self._wrong_kind(value, path, "string")
        if "\0" in value:  # most strings end up as names of files or of things in the kernel, which cannot have one
            raise _invalid(f"Parameter '{path}' has a NUL character in it", "Leave '\\u0000' out.", path)
        return value

    def _bool(self, value: object, path: str) -> bool:
        if self._keyval and isinstance(value, str):
            if value in _ON or value in _OFF:
                return value in _ON
            raise _invalid(f"Parameter '{path}' expects 'on' or 'off'", f"It is '{cut(value)}'.", path)
        if not isinstance(value, bool):
            raise self._wrong_kind(value, path, "boolean")
        return value

    def _integer(self, type_: Integer, value: object, path: str) -> int:
        is_size = type_.c_name == "size"
        number = value
        if self._keyval:
            if not isinstance(value, str):
                raise self._wrong_kind(value, path, "integer")
            number = parse_size(value) if is_size else parse_integer(value)
            if number is None:
                expected = "size" if is_size else "integer"
                raise _invalid(f"Parameter '{path}' expects {expected}", _example(type_, value), path)
        if not isinstance(number, int) or isinstance(number, bool):
            if type_.low < 0 or type_.bounded:
                raise self._wrong_kind(value, path, "integer")
            raise _invalid(f"Parameter '{path}' expects uint64", _example(type_, value), path)
        if not type_.low <= number <= type_.high:
            # QEMU names only the last part of the path here; the hint says the rest.
            name = path.rpartition(".")[2]
            hint = f"'{path}' must be between {type_.low} and {type_.high}."
            if type_.bounded:
                text = f"{name} value must be in range [{type_.low}, {type_.high}]"
                raise _invalid(text, hint, path)
            raise _invalid(f"Parameter '{name}' expects {type_.c_name}", hint, path)
        return number

    # -- compounds -------------------------------------------------------------------------------------------

    def _alternate(self, type_: Alternate, value: object, path: str, depth: int) -> Any:
        kind = "null" if value is None else _JSON_KINDS.get(type(value))
        for choice in type_.choices:
            if kind is not None and kind_of(choice) == kind:
                return self.visit(choice, value, path, depth)
        kinds = " or ".join(str(kind_of(choice)) for choice in type_.choices)
        name = path.rpartition(".")[2]
        raise _invalid(f"Invalid parameter type for '{name}', expected: {type_.name}", f"It takes {kinds}.", path)

    def _object(self, type_: Object, value: object, path: str, depth: int) -> Struct:
        if not isinstance(value, dict):
            raise self._wrong_kind(value, path, "object")
        union = variants_of(type_.cls)
        if union is None:
            return self._plain(type_.cls, value, path, depth)
        if union.tag not in value:
            raise _missing(_join(path, union.tag), f"One of {', '.join(union.all())}.")
        tag = self.visit(Tag(union), value[union.tag], _join(path, union.tag), depth + 1)
        cls = union.known[tag]
        if union.wrappable and ("data" in value or (type_.form is Form.WRAPPED and len(value) == 1)):
            return self._wrapped(cls, union, value, path, depth)
        return self._fill(cls, value, path, depth, tag=union.tag)

    def _plain(self, cls: type[Struct], value: Mapping[str, object], path: str, depth: int) -> Struct:
        """A struct, or a branch asked for by its own name: that may repeat the tag it fixes."""
        union = cls.__variants__
        if union is None:
            return self._fill(cls, value, path, depth)
        fixed = union.value_of(cls)
        if value.get(union.tag, fixed) != fixed:
            tag_path = _join(path, union.tag)
            raise _not_accepted([fixed], self._string(value[union.tag], tag_path), tag_path)
        return self._fill(cls, value, path, depth, tag=union.tag)

    def _wrapped(
        self, cls: type[Struct], union: Variants, value: Mapping[str, object], path: str, depth: int
    ) -> Struct:
        """A branch whose members stand in `data`, which may be left out when it could be empty."""
        for key in value:
            if key not in {union.tag, "data"}:
                raise _unexpected(path, key, [union.tag, "data"])
        inner = _join(path, "data")
        if "data" not in value and not all(member.optional for member in members(cls)):
            raise _missing(inner, f"It holds {', '.join(member.name for member in members(cls))}.")
        data = value.get("data", {})
        if not isinstance(data, dict):
            raise self._wrong_kind(data, inner, "object")
        return self._fill(cls, data, inner, depth + 1)

    def _fill(self, cls: type[Struct], value: Mapping[str, object], path: str, depth: int, *, tag: str = "") -> Struct:
        known = members(cls)
        names = {member.name for member in known} | ({tag} if tag else set())
        arguments = {}
        for member in known:
            if member.name in value:
                item = value[member.name]
                arguments[member.field] = self.visit(member.type, item, _join(path, member.name), depth + 1)
            elif not member.optional:
                raise _missing(_join(path, member.name), _needed(member, value.keys() - names))
        for key in value:
            if key not in names:
                raise _unexpected(path, key, sorted(names))
        return cls(**arguments)

    # -- errors ----------------------------------------------------------------------------------------------

    def _item(self, path: str, index: int) -> str:
        return f"{path}.{index}" if self._keyval else f"{path}[{index}]"

    def _wrong_kind(self, value: object, path: str, expected: str) -> Error:
        if self._keyval and expected in {"string", "boolean", "integer"} and isinstance(value, dict | list):
            return _invalid(f"Parameters '{path}.*' are unexpected", f"'{path}' takes a single {expected}.", path)
        given = "null" if value is None else _JSON_KINDS.get(type(value), type(value).__name__)
        hint = f"It is of type {given}."
        return _invalid(f"Invalid parameter type for '{path}', expected: {expected}", hint, path)


def _missing(path: str, hint: str) -> Error:
    return _invalid(f"Parameter '{path}' is missing", hint, path)


def _needed(member: Member, strangers: Iterable[str]) -> str:
    """A hint for a member that is missing, perhaps only misspelled as one of `strangers`."""
    few = [name for name in itertools.islice(strangers, MAX_GUESSES) if len(name) <= MAX_GUESS]
    close = difflib.get_close_matches(member.name, few, 1)
    return f"Was '{close[0]}' meant to be it?" if close else f"Needed: {member.doc.text}."


def _unexpected(path: str, key: object, names: Sequence[str]) -> Error:
    full = _join(path, cut(str(key)))
    return _invalid(f"Parameter '{full}' is unexpected", suggest(names, str(key)), full)


def _not_accepted(values: Sequence[str], given: str, path: str) -> Error:
    # As for widths, QEMU names only the last part of the path.
    name = path.rpartition(".")[2]
    text = f"Parameter '{name}' does not accept value '{cut(given)}'"
    return _invalid(text, suggest(values, given), path)


def suggest(names: Iterable[str], given: str) -> str:
    """A hint for a name that is none of `names`: the closest one, if any is close, and all of them."""
    choices = list(names)
    close = difflib.get_close_matches(given, choices, 1) if len(given) <= MAX_GUESS else []
    guess = f"Did you mean '{close[0]}'? " if close else ""
    return f"{guess}Possible: {', '.join(choices)}." if choices else "There is nothing to choose from."


def _example(type_: Integer, given: object) -> str:
    what = "bytes with an optional suffix, such as 512, 64k or 1.5G" if type_.c_name == "size" else "a whole number"
    return f"'{cut(str(given))}' is not {what}."


def cut(text: str) -> str:
    """Shorten a user's text to what a message can carry."""
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _invalid(message: str, hint: str, path: str) -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, message, hint=hint, parameter=path)
