"""`tls-creds-x509`: certificates, in QEMU's directory layout.

A server has `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and may have `ca-crl.pem` and `dh-params.pem`; a client
has `ca-cert.pem`, and may have both `client-cert.pem` and `client-key.pem`.
"""

from __future__ import annotations

import logging
import os
import ssl
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.tls import sanity
from blkferry.objects.tls.creds import (
    QCryptoTLSCredsEndpoint,
    TlsCreds,
    TlsCredsProperties,
    load_dh_params,
    read_file,
)
from blkferry.plane.tls import reason
from blkferry.schema.qapi import Doc, branch
from blkferry.schema.qom import ObjectOptions

log = logging.getLogger(__name__)


@branch
class TlsCredsX509Properties(TlsCredsProperties):
    """Certificates: `dir` has those of the CA and of this end, and the key of the latter."""

    qom_type: Literal["tls-creds-x509"] = "tls-creds-x509"
    sanity_check: Annotated[bool, Doc("whether certificates are checked when they are loaded", since="2.5")] = True
    passwordid: Annotated[str | None, Doc("the secret that decrypts the key", since="2.5")] = None


class TlsCredsX509(TlsCreds):
    """Certificates."""

    kind: ClassVar[str] = "tls-creds-x509"
    options_type: ClassVar[type[ObjectOptions]] = TlsCredsX509Properties
    is_x509 = True

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, TlsCredsX509Properties)
        super().__init__(options)
        self._sanity_check = options.sanity_check
        self._password_id = options.passwordid
        self._password: bytes | None = None

    async def start(self, graph: Graph, engine: str) -> None:
        if self._password_id is not None:
            self._password = graph.secret(self._password_id)
        try:
            await super().start(graph, engine)
        finally:
            self._password = None

    def _make(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        ca, own, key = (
            self._path(name) for name in ("ca-cert.pem", f"{self.endpoint}-cert.pem", f"{self.endpoint}-key.pem")
        )
        ca_pem = read_file(ca)
        shown = self.endpoint is QCryptoTLSCredsEndpoint.SERVER or _both(own, key)
        if shown:
            own_pem = read_file(own)
            read_file(key)
            if self._sanity_check:
                sanity.check(own_pem, own, ca_pem, ca, self.endpoint)
                self._check_signature(own, key, ca)
        elif self._sanity_check:
            sanity.check_ca(ca_pem, ca)
        context = self._load(ca, own, key, shown=shown)
        if not self.verify_peer or self.endpoint is QCryptoTLSCredsEndpoint.SERVER:
            return context, context
        named = self._load(ca, own, key, shown=shown)
        named.check_hostname = True
        return named, context

    def _load(self, ca: str, own: str, key: str, *, shown: bool) -> ssl.SSLContext:
        context = self._new_context()
        if shown:
            self._load_pair(context, own, key)
        self._trust(context, ca)
        if self.endpoint is QCryptoTLSCredsEndpoint.SERVER:
            self._load_crl(context)
            load_dh_params(context, self._path("dh-params.pem"))
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load_pair(self, context: ssl.SSLContext, own: str, key: str) -> None:
        def ask() -> bytes:
            # OpenSSL would ask on the terminal.
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Cannot load certificate '{own}' & key '{key}': Decryption has failed.",
                hint="The key is encrypted: name the secret that decrypts it (passwordid=).",
            )

        try:
            context.load_cert_chain(own, key, ask if self._password is None else self._password)
        except (OSError, ValueError) as error:  # ValueError: a password that is too long
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Cannot load certificate '{own}' & key '{key}': {_why(error, encrypted=self._password is not None)}",
                path=key,
            ) from None

    def _trust(self, context: ssl.SSLContext, ca: str) -> None:
        # Each certificate in the file is to be trusted, also if another one has signed it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            text = f"Cannot load CA certificate '{ca}': {reason(error)}"
            raise Error(ErrorKind.INVALID_ARGUMENT, text, path=ca) from None

    def _load_crl(self, context: ssl.SSLContext) -> None:
        path = self._path("ca-crl.pem")
        if not os.path.exists(path):
            return
        read_file(path)
        try:
            context.load_verify_locations(path)
        except OSError as error:
            text = f"Cannot load CRL '{path}': {reason(error)}"
            raise Error(ErrorKind.INVALID_ARGUMENT, text, path=path) from None
        if not context.cert_store_stats()["crl"]:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Cannot load CRL '{path}': it has none", path=path)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _check_signature(self, own: str, key: str, ca: str) -> None:
        """Have a peer that trusts the CA look at our certificate: OpenSSL verifies only what comes by a handshake."""
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        self._load_pair(server, own, key)
        verifier = client
        if self.endpoint is QCryptoTLSCredsEndpoint.CLIENT:
            verifier = server
            self._load_pair(client, own, key)
        self._trust(verifier, ca)
        verifier.verify_mode = ssl.CERT_REQUIRED
        sanity.rehearse(server, client, own, ca)


def _both(own: str, key: str) -> bool:
    """Whether a client has a certificate to show."""
    there = [path for path in (own, key) if os.path.exists(path)]
    if len(there) == 1:
        log.warning("%s is not used: the certificate and its key must both be there", there[0])
    return len(there) == 2


def _why(error: OSError | ValueError, *, encrypted: bool) -> str:
    text = reason(error)
    if text == "key values mismatch":
        return "The certificate and the given key do not match."
    if encrypted:
        return "Decryption has failed."
    return "There is no certificate, or no key, in PEM." if "pem lib" in text.lower() else text
