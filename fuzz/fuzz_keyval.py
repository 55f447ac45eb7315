"""Invariant: whatever the text of an option, the answer is a value, a help text or Error(INVALID_ARGUMENT).

    python fuzz/fuzz_keyval.py [seconds] [seed]

Joins, cuts and damages pieces of real options, in `key=value` form and as JSON. A failure prints the seed and the
option that reproduce it.
"""

from __future__ import annotations

import random
import sys
import time

from blkferry.errors import Error, ErrorKind
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.char import ChardevAdd, parse_chardev
from blkferry.schema.export import BlockExportOptions, NbdServerOptions
from blkferry.schema.keyval import Help, parse_option
from blkferry.schema.qom import ObjectOptions
from blkferry.schema.visit import visit

FORMS = (
    (BlockdevOptions, "driver"),
    (BlockExportOptions, "type"),
    (NbdServerOptions, None),
    (ObjectOptions, "qom-type"),
)
ITEMS = (
    *("nbd", "iothread", "socket", "help", "?", "server", "nowait", "id=x", "node-name=n", "writable=on", "wait=off"),
    *("addr.type=inet", "addr.type=unix", "addr.data.path=/s", "addr.path=/x,,y", "addr.host=::1", "addr.port=0"),
    *("addr.to=017", "addr.str=3", "iothread.0=a", "iothread.1=b", "iothread=i", "poll-max-ns=-1", "path=/s", "fd=3"),
    *("max-connections=0x10", "max-connections=" + "9" * 80, "a.0.1=x", "a.b.c=1", "a=1", "a.99999=x", "=", ",", ".=1"),
)
TEXTS = (
    '{"type": "nbd", "id": "e", "node-name": "n", "writable": true, "iothread": ["a"]}',
    '{"addr": {"type": "unix", "data": {"path": "/s"}}, "max-connections": 4294967296}',
    '{"qom-type": "iothread", "id": "i", "poll-max-ns": 1e3, "x": [1, null, NaN, "\\ud800"]}',
    '{"addr": ' * 70,
    "a." * 100 + "b=1",
)


def damaged(rng, text):
    """The same text with some characters changed, lost or inserted."""
    characters = list(text)
    for _ in range(rng.randrange(4)):
        position = rng.randrange(len(characters) + 1)
        characters[position : position + rng.randrange(3)] = rng.choice(
            [*'.,=?{}[]":\\0', "\udc80", "\u0661", "\n", "no"]
        )
    return "".join(characters)


def any_option(rng):
    if rng.random() < 0.3:
        return damaged(rng, rng.choice(TEXTS))
    text = ",".join(rng.choices(ITEMS, k=rng.randrange(8)))
    return damaged(rng, text) if rng.random() < 0.5 else text


def answered(call, *arguments):
    """What the call returned, or None when it refused as it should."""
    try:
        return call(*arguments)
    except Error as error:
        if error.kind is not ErrorKind.INVALID_ARGUMENT or not str(error):
            raise
        return None


def check(text):
    """Give the option to each that might read it; return how many took it."""
    taken = 0
    for form, implied in FORMS:
        value = answered(parse_option, form, text, implied)
        assert value is None or isinstance(value, form | Help)
        taken += value is not None
    value = answered(parse_chardev, text)
    assert value is None or isinstance(value, ChardevAdd | Help)
    answered(visit, ChardevAdd, text)
    return taken + (value is not None)


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    options = taken = 0
    text = ""
    try:
        while time.monotonic() < deadline:
            text = any_option(rng)
            taken += check(text)
            options += 1
    except Exception:
        sys.stderr.write(f"seed {seed}, option {options}: {text!r}\n")
        raise
    sys.stdout.write(f"seed {seed}: {options} options, taken {taken} times\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
