"""The NBD servers of a daemon: one without a name, as QEMU has it, and any number that have one.

Each has its own address, credentials and limits; an export belongs to one of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.exports.nbd import NbdServer
from blkferry.exports.nbd.security import Security
from blkferry.graph.graph import well_formed
from blkferry.objects.authz import Authz
from blkferry.objects.tls import TlsCreds
from blkferry.schema.export import NbdServerInfo, NbdServerOptionsBase
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix, SocketAddressVsock
from blkferry.sockets import names
from blkferry.sockets.listener import Listener, listen
from blkferry.wire.nbd.uri import tcp_uri, unix_uri, vsock_uri

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    server: NbdServer
    listeners: Sequence[Listener]
    options: NbdServerOptionsBase

    @property
    def addresses(self) -> list[SocketAddress]:
        return [address for listener in self.listeners for address in listener.addresses]

    def uris(self, export: str) -> list[str]:
        secure = self.server.security is not None
        found = (uri_of(address, export, tls=secure) for address in self.addresses)
        return [uri for uri in found if uri is not None]


class NbdServers:
    """All of them, by name; the name of the one that has none is empty. Lives on the main loop."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._running: dict[str, _Running] = {}
        self._lock = asyncio.Lock()
        self._held = False

    async def start(self, addresses: Sequence[SocketAddress], options: NbdServerOptionsBase) -> list[SocketAddress]:
        """Listen for clients at all of these addresses; returns where that is, with the ports that the kernel chose.

        Raises Error(EXISTS) when it runs already, or what is wrong with addresses or objects.
        """
        name = options.id or ""
        if options.id is not None and not well_formed(name):
            raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'id' expects an identifier", hint="Like 'backup'.")
        async with self._lock:
            if name in self._running:
                raise Error(
                    ErrorKind.EXISTS,
                    f"NBD server '{name}' already running" if name else "NBD server already running",
                    hint="Stop it first, or give this one an id of its own.",
                )
            listeners: list[Listener] = []
            try:
                for address in addresses:
                    listeners.append(await listen(address))  # noqa: PERF401 - when one fails, those before are closed
                server = NbdServer(
                    [sock for listener in listeners for sock in listener.sockets],
                    max_connections=options.max_connections,
                    handshake_seconds=options.handshake_max_seconds,
                    name=name,
                    security=self._security(options),
                    held=self._held,
                )
            except BaseException:
                for listener in listeners:
                    listener.close()
                raise
            running = self._running[name] = _Running(server, listeners, options)
            return running.addresses

    def _security(self, options: NbdServerOptionsBase) -> Security | None:
        if options.tls_creds is None:
            if options.tls_authz is not None:
                raise Error(
                    ErrorKind.INVALID_ARGUMENT,
                    "tls-authz needs tls-creds",
                    hint="Without TLS nobody can tell who a client is.",
                )
            return None
        first = self._daemon.objects.credentials(options.tls_creds, "server")
        authorize, rule = None, ""
        if options.tls_authz is not None:
            if not (first.is_x509 and first.verify_peer):
                raise Error(
                    ErrorKind.INVALID_ARGUMENT,
                    f"tls-authz needs clients with certificates, and '{options.tls_creds}' asks for none",
                    hint="Use a tls-creds-x509 object with verify-peer=on.",
                )
            rule = options.tls_authz
            authorize = _Gate(self._daemon, rule).allows
        return Security(_Newest(self._daemon, first).get, authorize, rule)

    async def stop(self, name: str | None = None) -> bool:
        """Remove the server's exports and stop listening; False when it does not run."""
        async with self._lock:
            running = self._running.get(name or "")
            if running is None:
                return False
            running.server.close()
            await self._daemon.exports.remove_all(lambda export: getattr(export, "server", None) is running.server)
            for listener in running.listeners:
                listener.close()
            del self._running[name or ""]
            return True

    async def stop_all(self) -> None:
        """Stop every server."""
        for name in list(self._running):
            await self.stop(name)

    def stop_listening(self) -> None:
        """Take no new clients."""
        for running in self._running.values():
            running.server.stop_listening()

    def get(self, name: str | None = None) -> NbdServer:
        """The server of this name; raises Error(NOT_FOUND) when it does not run."""
        running = self._running.get(name or "")
        if running is not None:
            return running.server
        known = ", ".join(each for each in self._running if each)
        if name:
            hint = f"Known servers: {known}." if known else "Start it first (nbd-server-start with this id)."
            raise Error(ErrorKind.NOT_FOUND, f"NBD server '{name}' not running", hint=hint)
        hint = "Start it first (nbd-server-start, --nbd-server)."
        if known:
            hint = f"Start it first, or name another server; there are: {known}."
        raise Error(ErrorKind.NOT_FOUND, "NBD server not running", hint=hint)

    def __iter__(self) -> Iterator[NbdServer]:
        return (running.server for running in self._running.values())

    def __contains__(self, name: str) -> bool:
        return name in self._running

    def hold_clients(self) -> None:
        """Let clients of servers started from now on wait, so that they find everything that is still being made."""
        self._held = True

    def admit_clients(self) -> None:
        """Let them in."""
        self._held = False
        for server in self:
            server.admit()

    def uris(self, export: str, name: str | None = None) -> list[str]:
        """Where clients find an export: one URI for each address of the server that can be written as one."""
        running = self._running.get(name or "")
        return [] if running is None else running.uris(export)

    def query(self) -> list[NbdServerInfo]:
        """What query-nbd-servers says."""
        return [
            NbdServerInfo(
                id=name or None,
                addresses=running.addresses,
                uris=running.uris(""),
                tls_creds=running.options.tls_creds,
                tls_authz=running.options.tls_authz,
                max_connections=running.options.max_connections,
                connections=running.server.connections,
                exports=[export.name for export in running.server.exports],
            )
            for name, running in self._running.items()
        ]


class _Newest:
    """The credentials of an id as they are now. Until there are others the ones that were removed stay in use."""

    def __init__(self, daemon: Daemon, creds: TlsCreds) -> None:
        self._daemon = daemon
        self._creds = creds

    def get(self) -> TlsCreds:
        found = self._daemon.objects.get(self._creds.id)
        if found is not self._creds and isinstance(found, TlsCreds):
            before = self._creds
            if (found.endpoint, found.is_x509) == (before.endpoint, before.is_x509) and (
                found.verify_peer or not before.verify_peer  # else they would let in who was not to be let in
            ):
                self._creds = found
            else:
                log.warning("object '%s' does not fit its NBD server: the one before it stays in use", found.id)
        return self._creds


class _Gate:
    """An authorization object by its id: who it is is asked each time, and while it is nobody, nobody gets in."""

    def __init__(self, daemon: Daemon, object_id: str) -> None:
        self._daemon = daemon
        self._id = object_id

    async def allows(self, identity: str) -> bool:
        found = self._daemon.objects.get(self._id)
        if not isinstance(found, Authz):
            log.warning("Cannot find authorization object '%s': nobody is let in", self._id)
            return False
        return await found.allows(identity)


def uri_of(address: SocketAddress, export: str, *, tls: bool = False) -> str | None:
    """The NBD URI of an export at a bound address; None where there is none."""
    match address:
        case SocketAddressInet():
            return tcp_uri(address.host, int(address.port), export, tls=tls)
        case SocketAddressUnix(abstract=False):
            return unix_uri(address.path, export, tls=tls)
        case SocketAddressVsock():
            cid, port = names.vsock_numbers(address)
            return vsock_uri(names.local_cid() if cid == names.MAX_UINT32 else cid, port, export, tls=tls)
    return None
