"""What all TLS credentials have: a directory, an end of the connection, and the context TLS is made with.

Files are read once, when the object is created. Whoever wants others removes the object and creates it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import ssl
from typing import Annotated

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.base import BlkObject
from blkferry.objects.tls import openssl
from blkferry.objects.tls.names import distinguished_name
from blkferry.objects.tls.priority import restrict
from blkferry.plane.tls import reason
from blkferry.schema.qapi import Doc
from blkferry.schema.qom import ObjectOptions

MAX_FILE = 1 << 20
"""Bytes of a file with certificates, keys or parameters; the certificates of 200 CAs take as many KiB."""


class QCryptoTLSCredsEndpoint(enum.StrEnum):
    """Which end of a connection the credentials are for."""

    CLIENT = "client"
    SERVER = "server"


class TlsCredsProperties(ObjectOptions):
    """What all credentials have in common."""

    verify_peer: Annotated[bool, Doc("whether the peer must show a valid certificate", since="2.5")] = True
    dir: Annotated[str | None, Doc("the directory with the files", since="2.5")] = None
    endpoint: Annotated[QCryptoTLSCredsEndpoint, Doc("the end of the connection they are for", since="2.5")] = (
        QCryptoTLSCredsEndpoint.CLIENT
    )
    priority: Annotated[str | None, Doc("versions to use, as a GnuTLS priority string", since="2.7")] = None


class TlsCreds(BlkObject):
    """Base of credentials; a subclass makes the context. `verify_peer` says that peers must have certificates."""

    is_x509: bool = False

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, TlsCredsProperties)
        super().__init__(options)
        self._directory = options.dir
        self._priority = options.priority
        self.endpoint = options.endpoint
        self.verify_peer = self.is_x509 and options.verify_peer
        self._context: ssl.SSLContext
        self._nameless: ssl.SSLContext

    async def start(self, graph: Graph, engine: str) -> None:
        """Read the files; raises Error when one is missing or wrong."""
        del graph, engine
        self._context, self._nameless = await asyncio.to_thread(self._make)

    def context(self, *, named: bool = True) -> ssl.SSLContext:
        """What to wrap a socket with, as the side that `endpoint` says.

        A client with `verify_peer` must give the name it expects of the server (`server_hostname`). One that has no
        name to expect, as on a unix socket, asks for the context without (`named`), which checks all else.
        Ask for it in the task that shakes hands, and for the `identity` there too.
        """
        return self._context if named else self._nameless

    def identity(self, tls: ssl.SSLObject) -> str:
        """Who the peer is: its certificate's distinguished name, "" when it showed none. Raises Error(CORRUPT)."""
        certificate = tls.getpeercert(binary_form=True)
        return distinguished_name(certificate) if certificate else ""

    def _make(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """The contexts with and without a name to expect; called in a thread. Raises Error."""
        raise NotImplementedError

    def _new_context(self) -> openssl.Context:
        """What all contexts have in common: TLS 1.2 or newer, no renegotiation, no sessions; no certificates yet."""
        server = self.endpoint is QCryptoTLSCredsEndpoint.SERVER
        context = openssl.Context(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if server:
            context.num_tickets = 0
            with contextlib.suppress(Error):  # neither is a reason to do without TLS
                openssl.keep_no_sessions(context)
                openssl.prefer_fast_ciphers(context)
        if self._priority is not None:
            restrict(context, self._priority)
        return context

    def _path(self, name: str) -> str:
        """Where a file of this name would be. Raises Error when no directory was given."""
        if self._directory is None:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Missing 'dir' property value",
                hint="Add dir=, the directory with the certificates and keys.",
            )
        return os.path.join(self._directory, name)


def read_file(path: str) -> bytes:
    """All of a file of credentials. Raises Error."""
    doing = f"Unable to access credentials {path}"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise Error.from_oserror(doing, error, path=path) from None
    except ValueError:  # a NUL in the path
        raise Error(ErrorKind.INVALID_ARGUMENT, f"{doing}: not a path") from None
    if len(data) > MAX_FILE:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"{doing}: it is larger than 1 MiB", path=path)
    return data


def load_dh_params(context: ssl.SSLContext, path: str) -> bool:
    """Take Diffie-Hellman parameters from a file; False if there is none. Raises Error."""
    if not os.path.exists(path):
        return False
    read_file(path)
    try:
        context.load_dh_params(path)
    except (ssl.SSLError, OSError) as error:
        text = f"Unable to load DH parameters from {path}: {reason(error)}"
        raise Error(ErrorKind.INVALID_ARGUMENT, text, path=path) from None
    return True
