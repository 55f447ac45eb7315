"""GnuTLS priority strings, as far as they can be heeded with OpenSSL: which versions of TLS may be used.

What would have to choose ciphers or signatures is refused: something weaker than what was asked for must not be used in
silence.
"""

from __future__ import annotations

import ssl

from blkferry.errors import Error, ErrorKind

_USUAL = frozenset(("NORMAL", "PERFORMANCE", "@SYSTEM"))
"""What leaves the choice of algorithms to the library."""

_ALL = frozenset((ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
_VERSIONS = {
    "VERS-ALL": _ALL,
    "VERS-TLS-ALL": _ALL,
    "VERS-TLS1.2": frozenset((ssl.TLSVersion.TLSv1_2,)),
    "VERS-TLS1.3": frozenset((ssl.TLSVersion.TLSv1_3,)),
}
# These are never used, so to take them away means nothing.
_NEVER = frozenset(
    ("VERS-SSL3.0", "VERS-TLS1.0", "VERS-TLS1.1", "VERS-DTLS-ALL", "VERS-DTLS1.0", "VERS-DTLS1.2", "COMP-ALL")
)


def restrict(context: ssl.SSLContext, priority: str) -> None:
    """Let `context` use only the versions that `priority` allows. Raises Error(INVALID_ARGUMENT or UNSUPPORTED)."""
    base, *changes = priority.split(":")
    if base not in _USUAL:
        raise _unsupported(priority, base)
    allowed = _ALL
    for change in changes:
        sign, name = change[:1], change[1:]
        versions = _VERSIONS.get(name)
        if versions is not None and sign == "+":
            allowed |= versions
        elif versions is not None and sign in {"-", "!"}:
            allowed -= versions
        elif not (name in _NEVER and sign in {"-", "!"}):
            raise _unsupported(priority, change)
    if not allowed:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Unable to set TLS session priority {priority}: it leaves no version of TLS",
            hint="There are VERS-TLS1.2 and VERS-TLS1.3.",
        )
    context.minimum_version, context.maximum_version = min(allowed), max(allowed)


def _unsupported(priority: str, part: str) -> Error:
    return Error(
        ErrorKind.UNSUPPORTED,
        f"Unable to set TLS session priority {priority}: '{part}' is not supported",
        hint="Versions can be chosen, as in NORMAL:-VERS-TLS-ALL:+VERS-TLS1.3.",
    )
