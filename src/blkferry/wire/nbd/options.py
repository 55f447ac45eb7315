"""Layouts of the NBD handshake, and the reader that takes an option's payload apart.

Both sides use the layouts; the reader is the server's. What an option means is not known here.
"""

from __future__ import annotations

import struct
from typing import Final

from blkferry.wire.nbd.constants import MAX_STRING, RepError

GREETING: Final = struct.Struct(">QQH")  # magic, magic, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")  # magic, option, payload length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, reply type, payload length
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags; zeroes may follow
STRING_LENGTH: Final = struct.Struct(">I")
QUERY_COUNT: Final = struct.Struct(">I")
INFO_COUNT: Final = struct.Struct(">H")
INFO_KIND: Final = struct.Struct(">H")
INFO_EXPORT: Final = struct.Struct(">HQH")  # kind, size, transmission flags
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")  # kind, minimum, preferred, maximum
CONTEXT_ID: Final = struct.Struct(">I")
EXPORT_NAME_PADDING: Final = 124


class Refused(Exception):  # noqa: N818 - an outcome, not a fault
    """This option is answered with an error; the negotiation goes on."""

    def __init__(self, error: RepError, text: str) -> None:
        super().__init__(text)
        self.error = error
        self.text = text


class Payload:
    """The fields of one option, taken in order. A field that is not there whole refuses the option."""

    def __init__(self, label: str, data: bytes) -> None:
        self.label = label
        self._data = data
        self._position = 0

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise Refused(RepError.INVALID, f"Inconsistent lengths in option {self.label}")
        field = self._data[self._position : end]
        self._position = end
        return field

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def name(self) -> str:
        length = self.number(STRING_LENGTH)
        if length > MAX_STRING:
            raise Refused(RepError.INVALID, f"Invalid name length: {length}")
        return self._text(self.take(length))

    def rest_as_name(self) -> str:
        return self._text(self.take(len(self._data) - self._position))

    def _text(self, field: bytes) -> str:
        if b"\0" in field:
            raise Refused(RepError.INVALID, f"Unexpected embedded NUL in option {self.label}")
        try:
            return field.decode()
        except UnicodeDecodeError:
            raise Refused(RepError.INVALID, f"Name is not valid UTF-8 in option {self.label}") from None

    def end(self) -> None:
        if self._position != len(self._data):
            raise Refused(RepError.INVALID, f"option '{self.label}' has unexpected length")
