"""GNU option syntax: `--name value`, `--name=value`, unique abbreviations, `-h`, clusters of short options.

Only splits argv; what options mean, and in which order they act, is for the caller. The texts are getopt_long's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blkferry.errors import Error, ErrorKind


@dataclass(frozen=True, slots=True)
class Given:
    """One option of a command line: its full name, its argument if it takes one, and how it was written."""

    name: str
    argument: str
    written: str


def split(argv: Sequence[str], long: Mapping[str, bool], short: Mapping[str, str]) -> Iterator[Given]:
    """The options in `argv`, one by one; `long` says which names take an argument, `short` what letters stand for.

    Raises Error(INVALID_ARGUMENT) when it comes to something that is no option, so what stands before has been seen.
    """
    words = iter(argv)
    for word in words:
        if word == "--":
            for operand in words:
                raise _invalid(f"{operand}: Unexpected argument")
        elif word.startswith("--"):
            yield _long(word, words, long)
        elif word.startswith("-") and word != "-":
            yield from _cluster(word, words, long, short)
        else:
            raise _invalid(f"{word}: Unexpected argument", "Options begin with '--'.")


def _long(word: str, words: Iterator[str], long: Mapping[str, bool]) -> Given:
    name, has_value, value = word[2:].partition("=")
    matches = [name] if name in long else [each for each in long if name and each.startswith(name)]
    if not matches:
        close = difflib.get_close_matches(name[:32], long, 1)
        raise _invalid(f"unrecognized option '--{name}'", f"Did you mean '--{close[0]}'?" if close else "Try --help.")
    if len(matches) > 1:
        possible = " ".join(f"'--{each}'" for each in matches)
        raise _invalid(f"option '--{name}' is ambiguous; possibilities: {possible}")
    (full,) = matches
    if not long[full]:
        if has_value:
            raise _invalid(f"option '--{full}' doesn't allow an argument")
        return Given(full, "", word)
    if has_value:
        return Given(full, value, word)
    argument = next(words, None)
    if argument is None:
        raise _invalid(f"option '--{full}' requires an argument")
    return Given(full, argument, f"{word} {argument}")


def _cluster(word: str, words: Iterator[str], long: Mapping[str, bool], short: Mapping[str, str]) -> Iterator[Given]:
    for position, letter in enumerate(word[1:], 2):
        name = short.get(letter)
        if name is None:
            raise _invalid(f"invalid option -- '{letter}'", "Try --help.")
        if not long[name]:
            yield Given(name, "", f"-{letter}")
            continue
        rest = word[position:]
        argument = rest or next(words, None)
        if argument is None:
            raise _invalid(f"option requires an argument -- '{letter}'", "Try --help.")
        yield Given(name, argument, f"-{letter}{rest}" if rest else f"-{letter} {argument}")
        return


def _invalid(message: str, hint: str = "") -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, message, hint=hint)
