"""The `key=value,...` syntax of command-line options, and its JSON alternative.

`parse` turns text into nested dicts, lists and strings and knows no types; `parse_option` has the result
validated. Grammar: items are separated by `,`; `,,` in a value is a comma; one trailing comma is ignored;
dots in a key nest; a group whose fragments are all numbers from 0 without gaps is a list; of equal keys the
last wins. The first item may be a bare value when the option has an implied key. An item `help` or `?` asks
for help.

Invariants: bounded by `MAX_LENGTH` and `MAX_FRAGMENTS`; raises nothing but `Error(INVALID_ARGUMENT)`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from blkferry.errors import Error, ErrorKind
from blkferry.schema.help import help_text
from blkferry.schema.qapi import TagOf
from blkferry.schema.visit import MAX_DEPTH, cut, visit

if TYPE_CHECKING:
    from collections.abc import Collection

    from blkferry.schema.qapi import Struct

MAX_LENGTH = 128 * 1024
"""Characters of one option: what Linux passes in one argument (MAX_ARG_STRLEN)."""

MAX_FRAGMENTS = MAX_DEPTH
"""Fragments of one key; what nests deeper could not be visited."""

MAX_FRAGMENT_LENGTH = 127
"""Bytes of one fragment, QEMU's limit."""

_HELP = frozenset({"help", "?"})
_FRAGMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|0|[1-9][0-9]*")
_KEY = re.compile(r"[^=,]*")
_VALUE = re.compile(r"(?:[^,]|,,)*")

StructT = TypeVar("StructT", bound="Struct")


@dataclass(frozen=True, slots=True)
class Keyval:
    """A parsed option. `help` says that help was asked for among the items."""

    values: dict[str, Any]
    help: bool


@dataclass(frozen=True, slots=True)
class Help:
    """What to print instead of acting, since the option asked for help."""

    text: str


def parse_option(
    form: type[StructT], text: str, implied: str | None = None, *, bare: Collection[str] = ()
) -> StructT | Help:
    """The value of an option's argument, which is JSON if it starts with `{` and `key=value` otherwise.

    `implied` is the key of a first item without one; `bare` names the switches that may stand without a
    value.
    """
    if text.startswith("{"):
        return visit(form, parse_json(text))
    option = parse(text, implied, bare=bare)
    if not option.help:
        return visit(form, option.values, keyval=True)
    union = form.__variants__
    if union is None or union.tag not in option.values:
        return Help(help_text(form))
    tag = visit(Annotated[str, TagOf(union.base)], option.values[union.tag], keyval=True, path=union.tag)
    return Help(help_text(union.known[tag]))


def parse(text: str, implied: str | None = None, *, bare: Collection[str] = ()) -> Keyval:
    """Parse `key=value` items; what they mean is for the caller."""
    _check_length(text)
    root: dict[str, Any] = {}
    wants_help = False
    position = 0
    while position < len(text):
        key, end = _scan(_KEY, text, position)
        has_value = text[end : end + 1] == "="
        if not has_value and key in _HELP:
            wants_help = True
            position = end + 1
            continue
        if has_value:
            position = end + 1
        elif position == 0 and implied is not None and key:
            key = implied
        else:
            name = key.removeprefix("no") if key not in bare else key
            if name not in bare:
                hint = f"Write '{key}=on' to switch it on." if key else "An item is empty."
                raise _invalid(f"Expected '=' after parameter '{cut(key)}'", hint)
            _store(root, name, "on" if name == key else "off")
            position = end + 1
            continue
        value, end = _scan(_VALUE, text, position)
        _store(root, key, value.replace(",,", ","))
        position = end + 1
    return Keyval({key: _with_lists(value, key) for key, value in root.items()}, wants_help)


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object, strictly: no duplicate keys, no NaN."""
    _check_length(text)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        hint = f"{error.msg} at character {error.pos + 1}."
        raise _invalid("JSON parse error, expecting value", hint) from None
    except RecursionError:
        raise _invalid("JSON nesting depth limit exceeded", f"At most {MAX_DEPTH} levels may be nested.") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise _invalid("JSON parse error, invalid number", str(error)) from None
    return cast("dict[str, Any]", value)


def _check_length(text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise _invalid("Option is too long", f"At most {MAX_LENGTH} characters are read; this has {len(text)}.")


def _scan(pattern: re.Pattern[str], text: str, start: int) -> tuple[str, int]:
    """What `pattern`, which matches anything, finds at `start`, and where that ends."""
    found = cast("re.Match[str]", pattern.match(text, start))
    return found[0], found.end()


def _store(root: dict[str, Any], key: str, value: str) -> None:
    """Put a value where its dotted key says."""
    fragments = key.split(".")
    if len(fragments) > MAX_FRAGMENTS:
        raise _invalid(f"Parameter '{cut(key)}' is nested too deeply", f"At most {MAX_FRAGMENTS} levels.")
    for fragment in fragments:
        if _FRAGMENT.fullmatch(fragment) is None:
            raise _invalid(f"Invalid parameter '{cut(key)}'", "Names have letters, digits, '-' and '_'.")
        if len(fragment) > MAX_FRAGMENT_LENGTH:
            hint = f"At most {MAX_FRAGMENT_LENGTH} characters between dots."
            raise _invalid(f"Parameter fragment '{cut(fragment)}' is too long", hint)
    if fragments[0].isdigit():
        raise _invalid(f"Invalid parameter '{cut(key)}'", "A number can only follow the name of a list.")
    group = root
    for depth, fragment in enumerate(fragments[:-1], 1):
        group = group.setdefault(fragment, {})
        if not isinstance(group, dict):
            raise _inconsistent(".".join(fragments[:depth]))
    if isinstance(group.get(fragments[-1]), dict):
        raise _inconsistent(key)
    group[fragments[-1]] = value


def _with_lists(value: Any, path: str) -> Any:
    """Turn the groups whose keys are numbers into lists."""
    if not isinstance(value, dict):
        return value
    items = {key: _with_lists(item, f"{path}.{key}") for key, item in value.items()}
    numbers = sum(key.isdigit() for key in items)
    if numbers == 0:
        return items
    if numbers < len(items):
        raise _inconsistent(path)
    for index in range(len(items)):
        if str(index) not in items:
            raise _invalid(f"Parameter '{path}.{index}' missing", "The items of a list are numbered from 0.")
    return [items[str(index)] for index in range(len(items))]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _invalid("JSON parse error, duplicate key", "A member is given twice in one object.")
    return made


def _refuse_constant(name: str) -> Any:
    raise _invalid(f"JSON parse error, invalid keyword '{name}'", "JSON has true, false and null.")


def _inconsistent(path: str) -> Error:
    hint = f"'{cut(path)}' has either one value, or members, or numbered items."
    return _invalid(f"Parameters '{cut(path)}.*' used inconsistently", hint)


def _invalid(message: str, hint: str) -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, message, hint=hint)
