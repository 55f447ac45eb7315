r"""Distinguished names in the form in which QEMU compares them: GnuTLS's, which is RFC 4514's in certificate order.

The parts stand in the order of the certificate (RFC 4514 would turn them round), `+` joins what makes one part, and
types without a name here have their object identifier. A value that is not text of a type it may have is `#` and all
of its DER in hexadecimal; one that may have that type, but cannot be shown, is `\#` and its content in hexadecimal.
"""

from __future__ import annotations

import re

from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls import der
from blkferry.objects.tls.certificate import Certificate

_DIRECTORY = frozenset(
    (der.UTF8_STRING, der.PRINTABLE_STRING, der.TELETEX_STRING, der.BMP_STRING, der.UNIVERSAL_STRING)
)
_PRINTABLE = frozenset((der.PRINTABLE_STRING,))
_IA5 = frozenset((der.IA5_STRING,))
_NUMERIC = frozenset((der.NUMERIC_STRING,))

# What a type is called, and which strings its values may be.
_TYPES = {
    "0.9.2342.19200300.100.1.1": ("UID", _DIRECTORY),
    "0.9.2342.19200300.100.1.25": ("DC", _IA5),
    "1.2.643.100.1": ("OGRN", _NUMERIC),
    "1.2.643.100.3": ("SNILS", _NUMERIC),
    "1.2.643.3.131.1.1": ("INN", _NUMERIC),
    "1.2.840.113549.1.9.1": ("EMAIL", _IA5),
    "1.2.840.113549.1.9.7": ("1.2.840.113549.1.9.7", frozenset((der.PRINTABLE_STRING, der.UTF8_STRING))),
    "1.2.840.113549.1.9.20": ("1.2.840.113549.1.9.20", frozenset((der.BMP_STRING,))),
    "1.2.840.113556.1.4.656": ("userPrincipalName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.1": ("jurisdictionOfIncorporationLocalityName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.2": ("jurisdictionOfIncorporationStateOrProvinceName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.3": ("jurisdictionOfIncorporationCountryName", _PRINTABLE),
    "1.3.6.1.5.5.7.8.5": ("XmppAddr", frozenset((der.UTF8_STRING,))),
    "1.3.6.1.5.5.7.9.2": ("placeOfBirth", _DIRECTORY),
    "1.3.6.1.5.5.7.9.3": ("gender", _PRINTABLE),
    "1.3.6.1.5.5.7.9.4": ("countryOfCitizenship", _PRINTABLE),
    "1.3.6.1.5.5.7.9.5": ("countryOfResidence", _PRINTABLE),
    "2.5.4.3": ("CN", _DIRECTORY),
    "2.5.4.4": ("surName", _DIRECTORY),
    "2.5.4.5": ("serialNumber", _PRINTABLE),
    "2.5.4.6": ("C", _PRINTABLE),
    "2.5.4.7": ("L", _DIRECTORY),
    "2.5.4.8": ("ST", _DIRECTORY),
    "2.5.4.9": ("street", _DIRECTORY),
    "2.5.4.10": ("O", _DIRECTORY),
    "2.5.4.11": ("OU", _DIRECTORY),
    "2.5.4.12": ("title", _DIRECTORY),
    "2.5.4.13": ("description", _DIRECTORY),
    "2.5.4.15": ("businessCategory", _DIRECTORY),
    "2.5.4.17": ("postalCode", _DIRECTORY),
    "2.5.4.20": ("telephoneNumber", _PRINTABLE),
    "2.5.4.41": ("name", _DIRECTORY),
    "2.5.4.42": ("givenName", _DIRECTORY),
    "2.5.4.43": ("initials", _DIRECTORY),
    "2.5.4.44": ("generationQualifier", _DIRECTORY),
    "2.5.4.46": ("dnQualifier", _PRINTABLE),
    "2.5.4.65": ("pseudonym", _DIRECTORY),
}
_ENCODINGS = {
    der.UTF8_STRING: "utf-8",
    der.PRINTABLE_STRING: "utf-8",
    der.IA5_STRING: "utf-8",
    der.NUMERIC_STRING: "utf-8",
    der.TELETEX_STRING: "ascii",
    der.BMP_STRING: "utf-16-be",
}
_SHOWN_AS_BYTES = frozenset((der.TELETEX_STRING, der.UNIVERSAL_STRING))
_SPECIAL = re.compile(r'[,+"\\<>;]|^[# ]| \Z')


def distinguished_name(certificate: bytes) -> str:
    """The subject of a certificate in DER. Raises Error(CORRUPT)."""
    try:
        subject = Certificate.parse(certificate).subject
    except ValueError as error:
        raise Error(ErrorKind.CORRUPT, f"The certificate cannot be read: {error}") from None
    return ",".join("+".join(_attribute(kind, value) for kind, value in part) for part in subject)


def _attribute(kind: str, value: der.Value) -> str:
    name, strings = _TYPES.get(kind, (kind, frozenset()))
    text = _text(value) if value.tag in strings else None
    if text is None and strings is _DIRECTORY and value.tag in _SHOWN_AS_BYTES:
        text = f"#{value.content.hex()}"
    return f"{name}=#{value.whole.hex()}" if text is None else f"{name}={_SPECIAL.sub(_escape, text)}"


def _text(value: der.Value) -> str | None:
    """The text of a string; None if it is none, or has a NUL, where a program in C would see its end."""
    encoding = _ENCODINGS.get(value.tag)
    if encoding is None:
        return None
    try:
        text = value.content.decode(encoding)
    except UnicodeDecodeError:
        return None
    if value.tag == der.TELETEX_STRING and not text.isprintable():
        return None
    return None if "\0" in text else text


def _escape(found: re.Match[str]) -> str:
    return f"\\{found[0]}"
