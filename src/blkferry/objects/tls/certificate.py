"""What an X.509 certificate says about itself (RFC 5280), read from its DER. Pure; signatures are OpenSSL's affair."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from blkferry.objects.tls import der

Attribute = tuple[str, der.Value]
"""A type, as an object identifier, and its value."""

MAX_ATTRIBUTES = 256
"""Attributes of one name: it becomes a string that is logged and compared."""

_VERSION, _EXTENSIONS = 0xA0, 0xA3  # the tags of explicit members
_BASIC_CONSTRAINTS, _KEY_USAGE, _EXTENDED_KEY_USAGE = "2.5.29.19", "2.5.29.15", "2.5.29.37"


class KeyUsage(enum.IntFlag):
    """What a key may be used for (RFC 5280, section 4.2.1.3), as far as anybody here asks: bits of the first byte."""

    DIGITAL_SIGNATURE = 0x80
    KEY_ENCIPHERMENT = 0x20
    KEY_CERT_SIGN = 0x04


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension: whether one must understand it, and the DER in it."""

    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate. `subject` has the relative names in the order in which they stand."""

    subject: Sequence[Sequence[Attribute]]
    not_before: dt.datetime
    not_after: dt.datetime
    extensions: dict[str, Extension] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> Certificate:
        """Read one. Raises ValueError."""
        body, *_signature = der.read(der.only(data, der.SEQUENCE))
        fields = list(der.read(body.content))
        if fields and fields[0].tag == _VERSION:
            del fields[0]
        if body.tag != der.SEQUENCE or len(fields) < 6:
            raise ValueError("fewer fields than a certificate has")
        _serial, _algorithm, _issuer, validity, subject, _key, *optional = fields
        times = [_time(value) for value in der.read(validity.content)]
        if len(times) != 2:
            raise ValueError("a validity without beginning or end")
        extensions: dict[str, Extension] = {}
        for value in optional:
            if value.tag == _EXTENSIONS:
                extensions = dict(map(_extension, der.read(der.only(value.content, der.SEQUENCE))))
        return cls(_name(subject), times[0], times[1], extensions)

    @property
    def is_ca(self) -> bool | None:
        """Whether its key may sign certificates by the basic constraints; None when there are none. ValueError."""
        extension = self.extensions.get(_BASIC_CONSTRAINTS)
        if extension is None:
            return None
        return any(value == (der.BOOLEAN, b"\xff", b"\x01\x01\xff") for value in der.read(_sequence(extension)))

    @property
    def critical_usage(self) -> KeyUsage | None:
        """What the key may be used for; None when that is not said, or need not be heeded. Raises ValueError."""
        extension = self.extensions.get(_KEY_USAGE)
        if extension is None or not extension.critical:
            return None
        bits = der.only(extension.value, der.BIT_STRING)
        return KeyUsage(bits[1] & sum(KeyUsage)) if len(bits) > 1 else KeyUsage(0)

    @property
    def critical_purposes(self) -> frozenset[str] | None:
        """What it may be used for, as object identifiers; None when that need not be heeded. Raises ValueError."""
        extension = self.extensions.get(_EXTENDED_KEY_USAGE)
        if extension is None or not extension.critical:
            return None
        return frozenset(der.oid(value.content) for value in der.read(_sequence(extension)))


def _sequence(extension: Extension) -> bytes:
    return der.only(extension.value, der.SEQUENCE)


def _extension(value: der.Value) -> tuple[str, Extension]:
    kind, *rest = der.read(value.content)
    if not rest or rest[-1].tag != der.OCTET_STRING:
        raise ValueError("an extension without a value")
    return der.oid(kind.content), Extension(len(rest) == 2 and any(rest[0].content), rest[-1].content)


def _name(value: der.Value) -> list[list[Attribute]]:
    parts: list[list[Attribute]] = []
    count = 0
    for part in der.read(value.content):
        attributes: list[Attribute] = []
        for pair in der.read(part.content):
            count += 1
            if count > MAX_ATTRIBUTES:
                raise ValueError("a name of too many parts")
            kind, attribute = der.read(pair.content)
            attributes.append((der.oid(kind.content), attribute))
        parts.append(attributes)
    return parts


def _time(value: der.Value) -> dt.datetime:
    text = value.content.decode("ascii")
    if value.tag == der.UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif value.tag != der.GENERALIZED_TIME:
        raise ValueError("a time of an unknown type")
    return dt.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=dt.UTC)
