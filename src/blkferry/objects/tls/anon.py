"""`tls-creds-anon`: encryption without knowing with whom. Only for tests, and for networks that nobody can change."""

from __future__ import annotations

import ssl
from typing import ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls import openssl
from blkferry.objects.tls.creds import QCryptoTLSCredsEndpoint, TlsCreds, TlsCredsProperties, load_dh_params
from blkferry.schema.qapi import branch
from blkferry.schema.qom import ObjectOptions

_CIPHERS = "ADH-AES256-GCM-SHA384:ADH-AES256-SHA256:@SECLEVEL=0"
"""What is anonymous is below every level of security to OpenSSL. 256 bits, so that it takes 3072 for the exchange."""


@branch
class TlsCredsAnonProperties(TlsCredsProperties):
    """Anonymous TLS: nobody can listen, but anybody may be in between. `dir` may have `dh-params.pem`."""

    qom_type: Literal["tls-creds-anon"] = "tls-creds-anon"


class TlsCredsAnon(TlsCreds):
    """Anonymous credentials."""

    kind: ClassVar[str] = "tls-creds-anon"
    options_type: ClassVar[type[ObjectOptions]] = TlsCredsAnonProperties

    def _make(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        context = self._new_context()
        if context.minimum_version > ssl.TLSVersion.TLSv1_2:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Anonymous TLS needs TLS 1.2",
                hint="TLS 1.3 has no anonymous key exchange; leave priority= out.",
            )
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        if self.endpoint is QCryptoTLSCredsEndpoint.SERVER and not (
            self._directory is not None and load_dh_params(context, self._path("dh-params.pem"))
        ):
            openssl.choose_dh_params(context)
        return context, context
