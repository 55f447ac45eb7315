"""Credentials for TLS (`tls-creds-x509`, `tls-creds-psk`, `tls-creds-anon`), as of QEMU's qapi/crypto.json."""

from blkferry.objects.tls.creds import TlsCreds

__all__ = ["TlsCreds"]
