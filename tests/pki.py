"""Certificates for tests, in QEMU's directory layout, with everything in them that a test wants wrong."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)

CA_CONSTRAINTS = (x509.BasicConstraints(ca=True, path_length=None), True)
NO_CA = (x509.BasicConstraints(ca=False, path_length=None), True)
LOCALHOST = (x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)


def usage(*names: str) -> x509.KeyUsage:
    """Key usages by their names in snake case."""
    known = (
        "digital_signature content_commitment key_encipherment data_encipherment "
        "key_agreement key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: name in names for name in known.split()})


def purposes(*names: str) -> x509.ExtendedKeyUsage:
    """Extended key usages: "server", "client", "code", "any"."""
    oids = {
        "server": ExtendedKeyUsageOID.SERVER_AUTH,
        "client": ExtendedKeyUsageOID.CLIENT_AUTH,
        "code": ExtendedKeyUsageOID.CODE_SIGNING,
        "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }
    return x509.ExtendedKeyUsage([oids[name] for name in names])


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def key_pem(self, password: bytes | None = None) -> bytes:
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def issue(
    subject: x509.Name | str,
    ca: Pair | None = None,
    *extensions: tuple[Any, bool],
    start: dt.datetime = NOW - DAY,
    end: dt.datetime = NOW + 30 * DAY,
) -> Pair:
    """A certificate signed by `ca`, or by itself; extensions come with whether they are critical."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = common_name(subject) if isinstance(subject, str) else subject
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(ca.certificate.subject if ca else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return Pair(builder.sign(ca.key if ca else key, hashes.SHA256()), key)


def authority(name: str = "ca") -> Pair:
    return issue(name, None, CA_CONSTRAINTS, (usage("key_cert_sign", "crl_sign"), True))


def revocations(ca: Pair, *revoked: Pair) -> bytes:
    """A CRL in PEM."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.certificate.subject)
        .last_update(NOW - DAY)
        .next_update(NOW + DAY)
    )
    for pair in revoked:
        entry = (
            x509.RevokedCertificateBuilder().serial_number(pair.certificate.serial_number).revocation_date(NOW - DAY)
        )
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(ca.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def write(
    directory: Path,
    ca: Pair | None = None,
    *,
    server: Pair | None = None,
    client: Pair | None = None,
    password: bytes | None = None,
    **files: bytes,
) -> Path:
    """Fill a directory; `files` are others by name, with underscores for dashes, without `.pem`."""
    directory.mkdir(exist_ok=True)
    if ca is not None:
        (directory / "ca-cert.pem").write_bytes(ca.pem)
    for name, pair in (("server", server), ("client", client)):
        if pair is not None:
            (directory / f"{name}-cert.pem").write_bytes(pair.pem)
            (directory / f"{name}-key.pem").write_bytes(pair.key_pem(password))
    for name, content in files.items():
        (directory / f"{name.replace('_', '-')}.pem").write_bytes(content)
    return directory


def complete(directory: Path, client_name: x509.Name | str = "client1") -> tuple[Path, Pair]:
    """A directory with all there is for both ends, and its CA."""
    ca = authority()
    server = issue("localhost", ca, NO_CA, LOCALHOST, (purposes("server"), True))
    client = issue(client_name, ca, NO_CA, (purposes("client"), True))
    return write(directory, ca, server=server, client=client), ca
