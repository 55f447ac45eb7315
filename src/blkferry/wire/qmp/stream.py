r"""Frames a byte stream into JSON texts: QMP needs no separator between messages, only balanced brackets.

The lexer here looks for brackets, quotes and line ends only; what stands between them is judged when the
message is complete (`text`). It knows nothing of commands.

A bad message costs its sender one `Fault`, however long it is (QEMU answers every stray token). What follows
is dropped in silence up to the end of the bad message, which is the first of
- the bracket that closes its outermost one, where a string ends with its line at the latest,
- a line that starts with `{` in its first column,
- outside of brackets, the end of the line,
- a byte 0xFF, which is never JSON: clients send it to start afresh, so it ends a message that was good as
  well.

Invariants: how the bytes are cut makes no difference, to the outcome nor to the work; no more than
`max_message` bytes are held of one message.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final, Literal

from blkferry.wire.qmp.text import MAX_WORD, InvalidText, decode

MAX_MESSAGE = 4 << 20
"""Bytes of one message. A transaction of 10,000 actions needs 1 to 2 MiB. QEMU's 64 MiB per token would let one
client take gigabytes, since `[[],[],...` costs about 24 bytes of memory per byte of text, and the loop's time:
the worst 4 MiB take over a second to decode."""
MAX_DEPTH = 1024  # QEMU's limit, so that what it accepts is accepted

_RESET = 0xFF
_BACKSLASH = ord("\\")
_NEWLINE = ord("\n")
_OPENING = b"{["
_CLOSING = b"}]"
_QUOTES = b"\"'"
_BLANKS = re.compile(rb"[ \t\r\n]*+")
_WORD = re.compile(rb"[^ \t\r\n{}\[\]\"'\xff,:]*+")
_STOPS = {  # by the quote of the string we are in
    0: re.compile(rb"[{}\[\]\"'\n\xff]"),
    ord('"'): re.compile(rb'["\\\x00-\x1f\xff]'),
    ord("'"): re.compile(rb"['\\\x00-\x1f\xff]"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A message that is not JSON; `text` is the sentence for the client."""

    text: str


class Signal(enum.Enum):
    """What `next_value` returns besides values, of which None is one."""

    NEED_DATA = enum.auto()
    NOTHING = enum.auto()  # internal: a step was made that yields nothing


NEED_DATA: Final = Signal.NEED_DATA
"""There is no complete message yet."""


class Parser:
    """`feed` bytes, then take `next_value` until it is NEED_DATA."""

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self._max_message = max_message
        self._buffer = bytearray()  # starts with the current message; of a bad one only what is not yet seen
        self._scanned = 0  # bytes of the buffer that the lexer has seen
        self._started = False
        self._depth = 0
        self._deepest = 0
        self._quote = 0  # the quote that ends the string we are in, else 0
        self._bad = False  # the fault is reported, the rest of the message is being dropped
        self._reset = False  # the last byte was 0xFF: a run of them is one fault

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_value(self) -> object | Fault | Literal[Signal.NEED_DATA]:
        while True:
            found = self._scan() if self._started else self._start()
            if found is not Signal.NOTHING:
                return found

    def _start(self) -> object:
        """Skip blanks and look at the first byte of a message; bare words are complete here."""
        buffer = self._buffer
        blanks = _BLANKS.match(buffer)
        assert blanks is not None
        if blanks.end():
            del buffer[: blanks.end()]
            self._reset = False
        if not buffer:
            return NEED_DATA
        first = buffer[0]
        if first == _RESET:
            del buffer[:1]
            repeated, self._reset = self._reset, True
            return Signal.NOTHING if repeated else Fault(r"JSON parse error, stray '\xff'")
        self._reset = False
        if first in _OPENING:
            self._depth = self._deepest = 1
        elif first in _QUOTES:
            self._quote = first
        else:
            return self._word()
        self._started = True
        self._scanned = 1
        return Signal.NOTHING

    def _word(self) -> object:
        word = _WORD.match(self._buffer)
        assert word is not None
        end = word.end()
        if end > MAX_WORD:
            return self._drop("JSON parse error, expecting value")
        if end == len(self._buffer):
            return NEED_DATA
        try:
            value = decode(bytes(self._buffer[:end]), 0)
        except InvalidText as error:
            return self._drop(str(error))
        del self._buffer[:end]
        return value

    def _drop(self, why: str) -> Fault:
        """Report the current message; `_scan` drops the rest of it."""
        self._started = self._bad = True
        return Fault(why)

    def _scan(self) -> object:
        """Go on to the end of the current message."""
        buffer = self._buffer
        at = self._scanned
        while True:
            stop = _STOPS[self._quote].search(buffer, at)
            at = stop.start() if stop else len(buffer)
            if at >= self._max_message and not self._bad:
                self._scanned = at
                return self._drop(f"JSON message size limit of {self._max_message} bytes exceeded")
            if stop is None:
                return self._pause(at)
            byte = buffer[at]
            if byte == _RESET:
                self._end(at + 1)
                was_bad, self._bad, self._reset = self._bad, False, True
                return Signal.NOTHING if was_bad else Fault(r"JSON parse error, stray '\xff'")
            if self._quote:
                if byte == _BACKSLASH:
                    if at + 1 == len(buffer):
                        return self._pause(at)
                    # Only these two could be taken for something else; any other byte is looked at as usual.
                    at += 2 if buffer[at + 1] in (self._quote, _BACKSLASH) else 1
                    continue
                if byte == self._quote:
                    self._quote = 0
                    at += 1
                    if not self._depth:
                        return self._complete(at)
                elif not self._bad:
                    self._scanned = at
                    return self._drop(rf"JSON parse error, stray character '\x{byte:02x}' in a string")
                elif byte == _NEWLINE:
                    self._quote = 0  # and the line end is looked at again, outside of the string
                else:
                    at += 1
            elif byte in _QUOTES:
                if self._depth:
                    self._quote = byte
                at += 1
            elif byte in _OPENING:
                at += 1
                if not self._depth:
                    continue
                self._depth += 1
                self._deepest = max(self._deepest, self._depth)
                if self._deepest > MAX_DEPTH and not self._bad:
                    self._scanned = at
                    return self._drop("JSON nesting depth limit exceeded")
            elif byte in _CLOSING:
                at += 1
                if not self._depth:
                    continue
                self._depth -= 1
                if not self._depth:
                    return self._complete(at)
            else:  # a line end
                at += 1
                if not self._bad:
                    continue
                if not self._depth:
                    return self._complete(at)
                if at == len(buffer):
                    return self._pause(at - 1)
                if buffer[at] == ord("{"):
                    return self._complete(at)

    def _pause(self, at: int) -> Signal:
        if self._bad:
            del self._buffer[:at]
            at = 0
        self._scanned = at
        return NEED_DATA

    def _end(self, at: int) -> None:
        del self._buffer[:at]
        self._scanned = self._depth = self._quote = 0
        self._started = False

    def _complete(self, at: int) -> object:
        if self._bad:
            self._bad = False
            self._end(at)
            return Signal.NOTHING
        raw, depth = bytes(self._buffer[:at]), self._deepest
        self._end(at)
        try:
            return decode(raw, depth)
        except InvalidText as error:
            return Fault(str(error))
