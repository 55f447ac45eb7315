"""Reaching an NBD server: connecting, TLS if it is wanted, and the handshake, up to the first request."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blkferry.drivers.nbd.haggling import Haggling
from blkferry.errors import Error, ErrorKind
from blkferry.plane.tls import TlsSocket, reason
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix, SocketAddressVsock
from blkferry.sockets.connect import connect

if TYPE_CHECKING:
    import socket

    from blkferry.drivers.nbd.haggling import Session

HANDSHAKE_SECONDS = 30.0
"""How long a server may take from the first attempt to connect to the end of the handshake."""

_HOSTNAME_MISMATCH: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH

_REMEDIES: Final = {
    "CERTIFICATE_REQUIRED": "The server wants a certificate of ours: client-cert.pem and client-key.pem.",
    "UNKNOWN_CA": "The server does not trust the authority that signed our certificate.",
    "HANDSHAKE_FAILURE": "The server may want credentials of another kind: a certificate, a key, or none.",
}
"""What to do about the alerts that servers send, by how OpenSSL calls those."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is dialled. With `security`, which gives a context for each attempt, only ever by TLS.

    `hostname` is the name that the certificate must have; None where there is none to expect. `context` is the
    metadata context that tells block status, None for base:allocation if there is one.
    """

    address: SocketAddress
    export: str
    context: str | None = None
    security: Callable[[], ssl.SSLContext] | None = None
    hostname: str | None = None


async def dial(target: Target) -> Session:
    """Connect, and haggle for the best that the server offers. Raises Error."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            sock = await connect(target.address)
            return await _shake_hands(sock, target)
    except TimeoutError:
        text = f"'{shown(target.address)}' took longer than {HANDSHAKE_SECONDS:.0f} seconds to shake hands"
        raise Error(ErrorKind.IO, text) from None


def shown(address: SocketAddress) -> str:
    """The address as error texts show it."""
    match address:
        case SocketAddressInet():
            return f"{address.host}:{address.port}"
        case SocketAddressUnix():
            return address.path
        case SocketAddressVsock():
            return f"vsock:{address.cid}:{address.port}"
    return address.type


async def _shake_hands(plain: socket.socket, target: Target) -> Session:
    haggling = Haggling(plain)
    try:
        await haggling.greet()
        if target.security is not None:
            await haggling.start_tls()
            haggling.sock = await _secure(plain, target.security(), target.hostname)
        return await haggling.agree(target.export, target.context)
    except OSError as error:
        haggling.sock.close()
        text = f"Failed to read initial magic or option reply: {reason(error)}"
        raise Error(ErrorKind.IO, text, hint=_remedy(error)) from error
    except BaseException:
        haggling.sock.close()
        raise


async def _secure(plain: socket.socket, context: ssl.SSLContext, hostname: str | None) -> TlsSocket:
    try:
        secured = TlsSocket(plain, context, server_hostname=hostname)
    except ValueError as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"No certificate can have the name '{hostname}': {error}") from error
    try:
        await secured.shake_hands()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _HOSTNAME_MISMATCH:
            text = f"Certificate does not match the hostname {hostname}"
            raise Error(ErrorKind.DENIED, text, hint="Set tls-hostname to a name that it has.") from error
        text = f"The server's certificate was refused: {error.verify_message}"
        raise Error(ErrorKind.DENIED, text, hint="Is it signed by the CA of ca-cert.pem?") from error
    except OSError as error:
        raise Error(ErrorKind.IO, f"TLS handshake failed: {reason(error)}", hint=_remedy(error)) from error
    return secured


def _remedy(error: OSError) -> str:
    alert = getattr(error, "reason", None) or ""
    return next((remedy for name, remedy in _REMEDIES.items() if alert.endswith(f"ALERT_{name}")), "")
