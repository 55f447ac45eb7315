"""Reading DER (X.690), as far as certificates need it: pure, and bounded by the bytes there are.

Only definite lengths and tags of one byte: RFC 5280 has no others. What is wrong raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID = 0x01, 0x02, 0x03, 0x04, 0x06
UTF8_STRING, NUMERIC_STRING, PRINTABLE_STRING, TELETEX_STRING, IA5_STRING = 0x0C, 0x12, 0x13, 0x14, 0x16
UTC_TIME, GENERALIZED_TIME, UNIVERSAL_STRING, BMP_STRING = 0x17, 0x18, 0x1C, 0x1E
SEQUENCE, SET = 0x30, 0x31


class Value(NamedTuple):
    """One value: its tag, what it holds, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes


def read(data: bytes) -> Iterator[Value]:
    """The values that stand one after the other in `data`."""
    position = 0
    while position < len(data):
        start = position
        tag = data[position]
        if tag & 0x1F == 0x1F or position + 2 > len(data):
            raise ValueError("a tag that certificates do not have")
        length = data[position + 1]
        position += 2
        if length & 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4 or position + count > len(data):
                raise ValueError("a length that is not DER")
            length = int.from_bytes(data[position : position + count], "big")
            position += count
        if length > len(data) - position:
            raise ValueError("a value that does not end")
        position += length
        yield Value(tag, data[position - length : position], data[start:position])


def only(data: bytes, tag: int) -> bytes:
    """What the one value in `data` holds, which has this tag."""
    values = list(read(data))
    if len(values) != 1 or values[0].tag != tag:
        raise ValueError("not what is expected there")
    return values[0].content


def oid(content: bytes) -> str:
    """An object identifier, with dots."""
    if not content or content[-1] & 0x80 or len(content) > 64:
        raise ValueError("an object identifier that does not end")
    arcs, arc = [], 0
    for byte in content:
        arc = arc << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))
