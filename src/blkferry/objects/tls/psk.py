"""`tls-creds-psk`: pre-shared keys. `keys.psk` has lines of `user:key` with the key in hexadecimal (see psktool)."""

from __future__ import annotations

import logging
import ssl
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls import openssl
from blkferry.objects.tls.creds import QCryptoTLSCredsEndpoint, TlsCreds, TlsCredsProperties, read_file
from blkferry.schema.qapi import Doc, branch
from blkferry.schema.qom import ObjectOptions

log = logging.getLogger(__name__)

DEFAULT_USER = "qemu"

_MIN_KEY = 4
_MAX_KEY = 256
"""Bytes of a key. Shorter ones GnuTLS refuses, longer ones OpenSSL's older versions."""
_MAX_USER = 127
"""Bytes of a user's name: the most that all versions of OpenSSL take."""

_CIPHERS = "kECDHEPSK+CHACHA20:kECDHEPSK+AES:kPSK+AESGCM:kPSK+CHACHA20"
"""For TLS 1.2. Those with forward secrecy come first; clients that have none of them are rare."""


@dataclass(slots=True)
class _Client:
    """Whose key was asked for during one handshake. With a key that is not theirs the handshake fails."""

    user: str = ""


_CLIENT: ContextVar[_Client] = ContextVar("whose key one handshake has asked for")
"""OpenSSL asks for keys by the user's name, and does not say for which connection: but within its handshake."""


@branch
class TlsCredsPskProperties(TlsCredsProperties):
    """Pre-shared keys: whoever knows a user's key may connect. `dir` has `keys.psk`."""

    qom_type: Literal["tls-creds-psk"] = "tls-creds-psk"
    username: Annotated[str | None, Doc("who a client is (default: qemu)", since="3.0")] = None


class TlsCredsPsk(TlsCreds):
    """Pre-shared keys, of all users for a server, of one for a client."""

    kind: ClassVar[str] = "tls-creds-psk"
    options_type: ClassVar[type[ObjectOptions]] = TlsCredsPskProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, TlsCredsPskProperties)
        super().__init__(options)
        if self.endpoint is QCryptoTLSCredsEndpoint.SERVER and options.username is not None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "username should not be set when endpoint=server",
                hint="A server lets in all users that the file names.",
            )
        self._user = DEFAULT_USER if options.username is None else options.username

    def context(self, *, named: bool = True) -> ssl.SSLContext:
        _CLIENT.set(_Client())
        return super().context(named=named)

    def identity(self, tls: ssl.SSLObject) -> str:
        """The user's name, "" to a client: a server has none."""
        del tls
        return _CLIENT.get().user

    def _make(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        path = self._path("keys.psk")
        keys = parse_keys(read_file(path), path)
        context = self._new_context()
        context.set_ciphers(_CIPHERS)
        if self.endpoint is QCryptoTLSCredsEndpoint.SERVER:
            if not keys:
                log.warning("PSK file %s has no keys: nobody will get in", path)
            openssl.serve_keys(context, lambda user: _key_for(user, keys))
        elif (key := keys.get(self._user)) is None:
            raise Error(
                ErrorKind.NOT_FOUND, f"Username {self._user} not found in PSK file {path}", path=path, user=self._user
            )
        else:
            openssl.use_key(context, self._user, key)
        return context, context


def _key_for(user: str, keys: dict[str, bytes]) -> bytes:
    """The key of a client, which is noted for who asks for its identity; no bytes if there is none of this name."""
    if user in keys and (client := _CLIENT.get(None)) is not None:
        client.user = user
    return keys.get(user, b"")


def parse_keys(data: bytes, path: str) -> dict[str, bytes]:
    """The keys by user. A user's name that begins with `#` is hexadecimal. Raises Error, without naming a key."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        name, colon, key_text = line.partition(b":")
        try:
            user = (bytes.fromhex(name[1:].decode("ascii")) if name.startswith(b"#") else name).decode()
            key = bytes.fromhex(key_text.decode("ascii"))
        except ValueError:
            colon = b""
        if not colon:
            raise _wrong(path, number, "it is not 'user:key' with a key in hexadecimal")
        if not 0 < len(user.encode()) <= _MAX_USER or "\0" in user:
            raise _wrong(path, number, f"a user has a name of at most {_MAX_USER} bytes")
        if not _MIN_KEY <= len(key) <= _MAX_KEY:
            raise _wrong(path, number, f"a key has {_MIN_KEY} to {_MAX_KEY} bytes")
        keys.setdefault(user, key)
    return keys


def _wrong(path: str, number: int, why: str) -> Error:
    return Error(
        ErrorKind.INVALID_ARGUMENT,
        f"Cannot read PSK file {path}: line {number}: {why}",
        hint="psktool -u USER -p keys.psk makes one.",
        path=path,
        line=number,
    )
