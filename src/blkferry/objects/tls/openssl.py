"""What Python's ssl module does not offer of OpenSSL, called by ctypes on the context that is inside an `SSLContext`.

Pre-shared keys (until Python 3.13), Diffie-Hellman parameters that OpenSSL chooses, servers without sessions, and which
ciphers come first. The functions come from the very library that `_ssl` uses: a second OpenSSL would not know the
context.
"""

from __future__ import annotations

import _ssl
import ctypes
import functools
import ssl
from collections.abc import Callable
from typing import Any

from blkferry.errors import Error, ErrorKind

# SSL_CTRL_*, what SSL_CTX_ctrl does.
_SET_SESS_CACHE_MODE = 44
_TLS_1_3_CIPHERS = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_SET_DH_AUTO = 118

_ServerCallback = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint)
_ClientCallback = ctypes.CFUNCTYPE(
    ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint
)


class Context(ssl.SSLContext):
    """A context that can keep what OpenSSL calls alive as long as itself."""

    callback: Any = None


def serve_keys(context: Context, find: Callable[[str], bytes]) -> None:
    """Make a server ask `find` for the key of a user, which is empty when there is no such user. Raises Error."""

    def key_of(identity: str | None) -> bytes:
        return find(identity or "")

    if (native := getattr(context, "set_psk_server_callback", None)) is not None:
        native(key_of)
        return

    def answer(_session: int, identity: bytes | None, key_at: int, room: int) -> int:
        key = key_of((identity or b"").decode(errors="replace"))
        if len(key) > room:
            return 0
        ctypes.memmove(key_at, key, len(key))
        return len(key)

    context.callback = _ServerCallback(answer)
    _function("SSL_CTX_set_psk_server_callback")(_handle(context), context.callback)


def use_key(context: Context, identity: str, key: bytes) -> None:
    """Make a client name itself `identity` and prove it with `key`. Raises Error."""
    if (native := getattr(context, "set_psk_client_callback", None)) is not None:
        native(lambda _hint: (identity, key))
        return
    name = identity.encode() + b"\0"

    def answer(_session: int, _hint: bytes | None, name_at: int, name_room: int, key_at: int, key_room: int) -> int:
        if len(name) > name_room or len(key) > key_room:
            return 0
        ctypes.memmove(name_at, name, len(name))
        ctypes.memmove(key_at, key, len(key))
        return len(key)

    context.callback = _ClientCallback(answer)
    # With TLS 1.3 OpenSSL makes a session of the key, in no context, and wants it to be in that of the SSL_CTX.
    _function("SSL_CTX_set_session_id_context")(_handle(context), b"", ctypes.c_uint(0))
    _function("SSL_CTX_set_psk_client_callback")(_handle(context), context.callback)


def choose_dh_params(context: ssl.SSLContext) -> None:
    """Let OpenSSL take well-known Diffie-Hellman parameters that are as strong as the cipher. Raises Error."""
    _control(context, _SET_DH_AUTO, 1)


def keep_no_sessions(context: ssl.SSLContext) -> None:
    """Keep nothing of connections that are over: nobody resumes them, and 20000 may be many MiB. Raises Error."""
    _control(context, _SET_SESS_CACHE_MODE, 0)


def prefer_fast_ciphers(context: ssl.SSLContext) -> None:
    """Of TLS 1.3's ciphers, which are all good, first the one that costs both ends least. Raises Error."""
    _function("SSL_CTX_set_ciphersuites")(_handle(context), _TLS_1_3_CIPHERS)


def _control(context: ssl.SSLContext, what: int, value: int) -> None:
    control = _function("SSL_CTX_ctrl")
    control.restype = ctypes.c_long
    control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
    control(_handle(context), what, value, None)


def _handle(context: ssl.SSLContext) -> ctypes.c_void_p:
    """The SSL_CTX: the first member of the object, after what every object has."""
    return ctypes.c_void_p.from_address(id(context) + object.__basicsize__)


@functools.cache
def _library() -> ctypes.CDLL:
    # Symbols are looked for in the libraries that _ssl was linked with, too; or in all there are, if it is built in.
    return ctypes.CDLL(getattr(_ssl, "__file__", None))


def _function(name: str) -> Any:
    try:
        function = _library()[name]
    except (OSError, AttributeError):
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"This Python keeps its OpenSSL to itself: {name} cannot be called",
            hint="Use certificates (tls-creds-x509), or Python 3.13 or newer for pre-shared keys.",
        ) from None
    function.restype = None
    return function
