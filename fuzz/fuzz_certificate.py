"""Invariant: of any bytes a certificate, its name and what it is for are read, or the answer is that they cannot be.

    python fuzz/fuzz_certificate.py [seconds] [seed]

Damages real certificates. A failure prints the seed and the bytes that reproduce it.
"""

from __future__ import annotations

import datetime as dt
import random
import sys
import time

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls.certificate import Certificate
from blkferry.objects.tls.names import distinguished_name


def whole():
    """A certificate with all that is looked at."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=a\\,b+OU=c,O=zoë,C=DE,1.2.840.113549.1.9.1=x")
    now = dt.datetime.now(dt.UTC)
    usage = x509.KeyUsage(*[True] * 5, True, True, False, False)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + dt.timedelta(days=1))
    for extension in (
        x509.BasicConstraints(ca=True, path_length=1),
        usage,
        x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]),
    ):
        made = made.add_extension(extension, critical=True)
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def damaged(rng, data):
    """The same bytes with some changed, lost or inserted."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        position = rng.randrange(len(changed) + 1)
        changed[position : position + rng.randrange(3)] = rng.choice(
            [b"", b"\0", b"\x30", b"\x80", b"\x84\xff\xff\xff\xff", b"\xff", rng.randbytes(2)]
        )
    return bytes(changed)


def check(data):
    """Read all there is; return whether it could be."""
    try:
        certificate = Certificate.parse(data)
        certificate.is_ca, certificate.critical_usage, certificate.critical_purposes  # noqa: B018 - they are read
    except ValueError:
        understood = False
    else:
        understood = True
    try:
        assert isinstance(distinguished_name(data), str)
    except Error as error:
        if understood or error.kind is not ErrorKind.CORRUPT:
            raise
    return understood


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    original = whole()
    assert check(original)
    deadline = time.monotonic() + seconds
    tried = understood = 0
    data = b""
    try:
        while time.monotonic() < deadline:
            data = damaged(rng, original)
            understood += check(data)
            tried += 1
    except Exception:
        sys.stderr.write(f"seed {seed}, try {tried}: {data.hex()}\n")
        raise
    sys.stdout.write(f"seed {seed}: {tried} certificates, understood {understood}\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
