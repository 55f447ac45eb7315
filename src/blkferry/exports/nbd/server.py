"""The NBD server: listening sockets, clients that are still negotiating, and the exports they can choose from.

It lives on the main loop. A client that has finished its handshake is handed to its export, which may run on another
loop; here it only counts as a connection from then on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.exports.nbd import lobby
from blkferry.exports.nbd.lobby import Lobby
from blkferry.exports.nbd.negotiation import Negotiation
from blkferry.exports.nbd.security import Security
from blkferry.wire.nbd.handshake import ExportInfo

if TYPE_CHECKING:
    from blkferry.exports.nbd.export import NbdExport

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 16
"""So that a flood of connections does not starve those who are served."""

RETRY_SECONDS = 1.0
"""How long to wait with accepting when the process is out of descriptors."""


class NbdServer:
    """Serves exports on sockets that listen already. 0 means unlimited `max_connections` and `handshake_seconds`.

    `name` is empty for the server that exports use which name none. Without `security` there is no TLS. While it is
    `held`, clients wait in the kernel's backlog.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        max_connections: int = 0,
        handshake_seconds: int = 10,
        name: str = "",
        security: Security | None = None,
        held: bool = False,
    ) -> None:
        self.name = name
        self.security = security
        self.loop = asyncio.get_running_loop()
        self.sockets = list(sockets)
        self.max_connections = max_connections
        self._handshake_seconds = handshake_seconds
        self._exports: dict[str, NbdExport] = {}
        self._lobby = Lobby(self.loop.time)
        self._connections = 0
        self._accepting = False
        self._closed = False
        self._held = held
        self._listen()

    # The directory that handshakes see -------------------------------------------------------------------------

    def list(self) -> Sequence[ExportInfo]:
        return [export.info for export in self._exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        export = self._exports.get(name)
        return None if export is None else export.info

    def add(self, export: NbdExport) -> None:
        """Offer an export under its name. Raises Error(EXISTS), Error(NOT_FOUND) while the server is being stopped."""
        if self._closed:
            raise Error(ErrorKind.NOT_FOUND, "NBD server not running", hint="It is being stopped.")
        if export.name in self._exports:
            raise Error(
                ErrorKind.EXISTS, f"NBD server already has export named '{export.name}'", hint="Give it another name."
            )
        self._exports[export.name] = export

    def remove(self, export: NbdExport) -> None:
        """Stop offering an export."""
        if self._exports.get(export.name) is export:
            del self._exports[export.name]

    @property
    def exports(self) -> Sequence[NbdExport]:
        """What is offered, oldest first."""
        return tuple(self._exports.values())

    # Connections -----------------------------------------------------------------------------------------------

    def _listen(self, *, even_if_full: bool = False) -> None:
        if not self._accepting and not self._held and not self._closed and (even_if_full or not self._full()):
            self._accepting = True
            for listener in self.sockets:
                self.loop.add_reader(listener.fileno(), self._accept, listener)

    def admit(self) -> None:
        """Accept the clients that were held back."""
        self._held = False
        self._listen()

    def _ignore(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self.sockets:
                self.loop.remove_reader(listener.fileno())

    def _full(self) -> bool:
        return (0 < self.max_connections <= self._connections) or len(self._lobby) >= lobby.MOST

    def _accept(self, listener: socket.socket) -> None:
        for attempt in range(ACCEPTS_PER_TURN):
            if self._full():
                # Only the first time it is certain that somebody waits.
                wait = 0.0 if attempt else self._lobby.make_room()
                if attempt or wait != 0.0:
                    self._let_wait(wait)
                    return
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.warning("cannot accept clients for a while: %s", error.strerror)
                    self._let_wait(RETRY_SECONDS)
                    return
                continue  # that client is gone already
            self._connections += 1
            negotiation = Negotiation(self, sock, address)
            self._lobby.enter(negotiation)
            negotiation.start()

    def _let_wait(self, seconds: float | None) -> None:
        """Leave further clients in the kernel's backlog, as QEMU does, until there is room, or may be."""
        self._ignore()
        if seconds is not None:
            self.loop.call_later(seconds, self._listen_again)

    def _listen_again(self) -> None:
        self._listen(even_if_full=True)

    def spoke(self, negotiation: Negotiation) -> None:
        self._lobby.spoke(negotiation)

    def negotiation_ended(self, negotiation: Negotiation) -> None:
        self._lobby.leave(negotiation)

    def is_negotiating(self, negotiation: Negotiation) -> bool:
        return negotiation in self._lobby

    def connection_closed(self) -> None:
        """One connection less."""
        self._connections -= 1
        self._listen()

    @property
    def connections(self) -> int:
        """How many clients are connected, those that negotiate included."""
        return self._connections

    def choose(self, name: str) -> NbdExport | None:
        return self._exports.get(name)

    @property
    def handshake_seconds(self) -> int:
        return self._handshake_seconds

    def stop_listening(self) -> None:
        """Take no new connections; the sockets are closed by whoever made them."""
        self._closed = True
        self._ignore()

    def close(self) -> None:
        """Stop listening and cut off those who negotiate; exports are removed by the daemon."""
        self.stop_listening()
        for negotiation in self._lobby:
            negotiation.close("the server is stopping")
