"""What is wrong with certificates, found when they are loaded rather than when somebody connects.

The rules and texts are QEMU's. As with GnuTLS, usages and purposes bind only where they are marked critical.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import ssl

from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls.certificate import Certificate, KeyUsage

_PEM = re.compile(rb"-----BEGIN (?:X509 )?CERTIFICATE-----\s.*?\n-----END (?:X509 )?CERTIFICATE-----", re.DOTALL)
_PURPOSES = {"server": "1.3.6.1.5.5.7.3.1", "client": "1.3.6.1.5.5.7.3.2"}
_ANY_PURPOSE = "2.5.29.37.0"

# Numbers of X509_V_ERR_*.
_INVALID_PURPOSE = 26
_NO_ISSUER = frozenset((2, 18, 19, 20, 21))

_MOST_FLIGHTS = 8  # a handshake takes at most four


def check(own_pem: bytes, own: str, ca_pem: bytes, ca: str, endpoint: str) -> None:
    """Look at the certificate of this end, and at the CA's. Raises Error."""
    found = _certificates(own_pem)
    if not found:
        raise _wrong(f"Unable to import {endpoint} certificate {own}: it has no certificate", own)
    _look(found[0], own, endpoint)
    check_ca(ca_pem, ca)


def check_ca(ca_pem: bytes, ca: str) -> None:
    """Look at every certificate in the file of the CA. Raises Error."""
    found = _certificates(ca_pem)
    if not found:
        raise _wrong(f"Unable to import CA certificate list {ca}", ca)
    for each in found:
        _look(each, ca, "CA")


def rehearse(server: ssl.SSLContext, client: ssl.SSLContext, own: str, ca: str) -> None:
    """Connect the two in memory. Raises Error when one does not trust the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(_MOST_FLIGHTS):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        # OpenSSL heeds purposes that are not critical, too; those have been looked at already.
        if error.verify_code != _INVALID_PURPOSE:
            issuer = error.verify_code in _NO_ISSUER
            why = "The certificate hasn't got a known issuer" if issuer else "The certificate is not trusted"
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Our own certificate {own} failed validation against {ca}: {why}",
                hint=f"OpenSSL says: {error.verify_message}.",
                path=own,
            ) from None
    except ssl.SSLError as error:
        raise _wrong(f"Our own certificate {own} cannot be used: {error.reason}", own) from None


def _certificates(pem: bytes) -> list[bytes]:
    return _PEM.findall(pem)


def _look(pem: bytes, path: str, role: str) -> None:
    """Look at one certificate, for what it is to be: "server", "client" or "CA"."""
    try:
        certificate = Certificate.parse(ssl.PEM_cert_to_DER_cert(_plain(pem)))
        _look_at_times(certificate, path, role)
        _look_at_constraints(certificate, path, role)
        _look_at_usage(certificate, path, role)
    except ValueError as error:  # binascii's too
        what = "CA certificate list" if role == "CA" else f"{role} certificate"
        raise _wrong(f"Unable to import {what} {path}: {error}", path) from None


def _plain(pem: bytes) -> str:
    return pem.decode("ascii").replace("X509 CERTIFICATE", "CERTIFICATE")


def _look_at_times(certificate: Certificate, path: str, role: str) -> None:
    now = dt.datetime.now(dt.UTC)
    if certificate.not_after < now:
        raise _wrong(f"The {role} certificate {path} has expired", path, f"It was valid until {certificate.not_after}.")
    if certificate.not_before > now:
        hint = f"It is valid from {certificate.not_before}."
        raise _wrong(f"The {role} certificate {path} is not yet active", path, hint)


def _look_at_constraints(certificate: Certificate, path: str, role: str) -> None:
    is_ca = certificate.is_ca
    if role != "CA":
        if is_ca:
            raise _wrong(f"The certificate {path} basic constraints show a CA, but we need one for a {role}", path)
    elif is_ca is None:
        raise _wrong(f"The certificate {path} is missing basic constraints for a CA", path)
    elif not is_ca:
        raise _wrong(f"The certificate {path} basic constraints do not show a CA", path)


def _look_at_usage(certificate: Certificate, path: str, role: str) -> None:
    usage, purposes = certificate.critical_usage, certificate.critical_purposes
    if role == "CA":
        if usage is not None and KeyUsage.KEY_CERT_SIGN not in usage:
            raise _wrong(f"Certificate {path} usage does not permit certificate signing", path)
        return
    if usage is not None and KeyUsage.DIGITAL_SIGNATURE not in usage:
        raise _wrong(f"Certificate {path} usage does not permit digital signature", path)
    if purposes is not None and not purposes & {_PURPOSES[role], _ANY_PURPOSE}:
        raise _wrong(f"Certificate {path} purpose does not allow use with a TLS {role}", path)


def _wrong(message: str, path: str, hint: str = "") -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, message, hint=hint, path=path)
