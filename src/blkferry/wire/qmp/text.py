"""One framed JSON text to its value, with QEMU's words when it is wrong.

Two decoders that agree where both speak: the standard library's for plain text, and an iterative one that
also knows single-quoted strings, nests deeper than the interpreter's stack, and can say what is wrong. What
the first refuses, the second judges. Knows nothing of QMP, nor where a message ends (that is `stream`).

Numbers stay exact integers (QEMU turns large ones into doubles); what JSON cannot carry back, an infinity, is
refused. So is U+0000: no path, name or id may hold one, and refusing it here spares every command the check.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_WORD = 640  # characters of a number or bare word: the lowest that Python's own limit on digits may be
PLAIN_DEPTH = 64  # nesting for the recursive decoder; leaves the interpreter's stack to whoever called us
SHOWN = 40  # characters of a foreign text repeated in a message about it


class InvalidText(ValueError):  # noqa: N818 - it names a text, as UnicodeDecodeError's base names a value
    """The text is not JSON; str() is the sentence for the client."""


def decode(raw: bytes, depth: int) -> object:
    """Value of one complete JSON text that nests `depth` deep. Raises InvalidText, nothing else."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidText(f"JSON parse error, invalid UTF-8 at byte {error.start}") from None
    # Escaped surrogates and NUL pass the plain decoder, so texts with \u escapes take the careful road.
    if depth <= PLAIN_DEPTH and "\\u" not in text:
        try:
            return _plain(text)
        except ValueError:
            pass
    return decode_careful(text)


def shown(text: str) -> str:
    """A foreign text as an error message may repeat it: short, printable."""
    if len(text) > SHOWN:
        text = text[:SHOWN] + "..."
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _refuse(what: str) -> NoReturn:
    raise InvalidText(f"JSON parse error, {what}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        _refuse("duplicate key")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_WORD:
        _refuse(f"number of {len(digits)} characters is too long")
    return int(digits)


def _real(digits: str) -> float:
    if len(digits) > MAX_WORD:
        _refuse(f"number of {len(digits)} characters is too long")
    value = float(digits)
    if math.isinf(value):
        _refuse(f"number '{shown(digits)}' is out of range")
    return value


def _constant(word: str) -> NoReturn:
    _refuse(f"invalid keyword '{word}'")


_plain = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
).decode


_TOKEN = re.compile(
    r"""[ \t\r\n]*+(?:
        (?P<mark>[{}\[\]:,])
      | (?P<string>"[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+"
                 | '[^'\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^'\\\x00-\x1f]*+)*+')
      | (?P<word>[^\x00-\x20{}\[\]:,"']++)
      | (?P<stray>[^ \t\r\n])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_REAL = re.compile(r"-?(?:0|[1-9][0-9]*+)(?P<fraction>(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)")
_WORDS = {"true": True, "false": False, "null": None}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_ESCAPED = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_CLOSER = {list: "]", dict: "}"}

_Token = tuple[str, str]  # group of _TOKEN, text


def decode_careful(text: str) -> object:
    """What `decode` does, token by token. The open containers are a list, so depth costs no stack."""
    tokens = _tokens(text)
    open_containers: list[list[object] | dict[str, object]] = []
    keys: list[str] = []  # one per open object: the key whose value comes next
    token = next(tokens)
    while True:
        value: object
        if token == ("mark", "["):
            token = next(tokens)
            value = []
            if token != ("mark", "]"):
                open_containers.append(value)
                continue
        elif token == ("mark", "{"):
            token = next(tokens)
            value = {}
            if token != ("mark", "}"):
                open_containers.append(value)
                keys.append(_key(value, token, tokens))
                token = next(tokens)
                continue
        else:
            value = _scalar(token)
        # A value is complete: hand it to its container, and each container that ends here to its own.
        while open_containers:
            container = open_containers[-1]
            if isinstance(container, list):
                container.append(value)
            else:
                container[keys.pop()] = value
            kind, mark = token = next(tokens)
            if token == ("mark", ","):
                token = next(tokens)
                if isinstance(container, dict):
                    keys.append(_key(container, token, tokens))
                    token = next(tokens)
                break
            if kind != "mark" or mark != _CLOSER[type(container)]:
                _unexpected(token, f"expecting ',' or '{_CLOSER[type(container)]}'")
            value = open_containers.pop()
        else:
            token = next(tokens)
            if token[0] != "end":
                _unexpected(token, "expecting the end of the message")
            return value


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        assert match is not None
        assert match.lastgroup is not None
        yield match.lastgroup, match[match.lastgroup]
        position = match.end()


def _key(container: dict[str, object], token: _Token, tokens: Iterator[_Token]) -> str:
    if token[0] != "string":
        _unexpected(token, "expecting a string as key")
    key = _unescape(token[1][1:-1])
    if key in container:
        _refuse("duplicate key")
    token = next(tokens)
    if token != ("mark", ":"):
        _unexpected(token, f"expecting ':' after key '{shown(key)}'")
    container[key] = None  # holds the key's place until its value is complete
    return key


def _scalar(token: _Token) -> object:
    kind, text = token
    if kind == "string":
        return _unescape(text[1:-1])
    if kind != "word":
        _unexpected(token, "expecting value")
    if text in _WORDS:
        return _WORDS[text]
    number = _REAL.fullmatch(text)
    if number is not None:
        return _real(text) if number["fraction"] else _integer(text)
    if text.isascii() and text.isalpha():
        _refuse(f"invalid keyword '{shown(text)}'")
    _refuse(f"stray '{shown(text)}'")


def _unescape(text: str) -> str:
    if "\\" in text:
        text = _ESCAPE.sub(_unescape_one, text)
        try:
            # Escaped surrogate pairs join; what stays alone is no character.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            lone = next(char for char in _joined(text) if "\ud800" <= char <= "\udfff")
            _refuse(f"\\u{ord(lone):04x} is not a valid Unicode character")
    return text


def _joined(text: str) -> str:
    return re.sub(r"[\ud800-\udbff][\udc00-\udfff]", "", text)


def _unescape_one(match: re.Match[str]) -> str:
    digits, short = match.groups()
    if digits is not None:
        if digits == "0000":
            _refuse("\\u0000 is not accepted in a string")
        return chr(int(digits, 16))
    if short not in _ESCAPED:
        _refuse(f"invalid escape sequence '\\{shown(short)}'")
    return _ESCAPED[short]


def _unexpected(token: _Token, expecting: str) -> NoReturn:
    kind, text = token
    if kind == "stray" or (kind == "word" and text not in _WORDS and not _REAL.fullmatch(text)):
        if text.isascii() and text.isalpha():
            _refuse(f"invalid keyword '{shown(text)}'")
        _refuse(f"stray '{shown(text)}'")
    _refuse(expecting)
