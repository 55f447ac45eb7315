"""A line to the server: a connection, and the next one when it has ended."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from blkferry.drivers.nbd.connection import Connection
from blkferry.errors import Error

if TYPE_CHECKING:
    from blkferry.drivers.nbd.haggling import Session
    from blkferry.plane.services import Services

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LAST_PAUSE = 4.0
"""Seconds between two attempts to connect: doubled from the first up to the last."""


class Line:
    """`redial` makes a session like the first one or raises Error; it is tried for `patience` seconds, once at least.

    All methods are for the loop of the services.
    """

    def __init__(
        self, session: Session, services: Services, redial: Callable[[], Awaitable[Session]], patience: float
    ) -> None:
        self.connection = Connection(session, services)
        self._services = services
        self._redial = redial
        self._patience = patience
        self._reconnecting: asyncio.Task[Connection] | None = None
        self._rest_until = 0.0  # nobody who can do without this line tries it again before

    async def connected(self) -> Connection:
        """The connection, if need be another one, waited for together with all others who do. Raises OSError."""
        if not self.connection.lost:
            return self.connection
        reconnecting = self._reconnect()
        try:
            return await asyncio.shield(reconnecting)
        except Error as error:
            raise OSError(errno.EIO, f"the connection to the NBD server has ended: {error}") from error
        except asyncio.CancelledError:
            if not reconnecting.cancelled():
                raise
            raise OSError(errno.EIO, "the connection to the NBD server has ended, and is given up") from None

    def revive(self) -> None:
        """Have a lost connection replaced some time, for those who can do without."""
        if self._reconnecting is None and time.monotonic() >= self._rest_until:
            self._reconnect()

    def _reconnect(self) -> asyncio.Task[Connection]:
        if self._reconnecting is None:
            self._reconnecting = self._services.loop.create_task(self._try())
            self._reconnecting.add_done_callback(self._tried)
        return self._reconnecting

    async def _try(self) -> Connection:
        session = await persist(self._redial, self._patience)
        self.connection = Connection(session, self._services)
        return self.connection

    def _tried(self, task: asyncio.Task[Connection]) -> None:
        self._reconnecting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._rest_until = time.monotonic() + LAST_PAUSE
            log.warning("Cannot reach the NBD server again: %s", error)

    def give_up(self) -> None:
        """Let nobody wait any longer, neither for another connection nor for an answer."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self.connection.in_flight:
            self.connection.end("it is given up")

    def pause(self) -> None:
        """Leave the loop; nothing is in flight."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if not self.connection.lost:
            self.connection.detach()

    def move(self, services: Services) -> None:
        """Go on with another loop, after `pause`."""
        self._services = self.connection.services = services

    def leave(self) -> None:
        """Say goodbye; nothing is in flight."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self.connection.leave()


async def persist(attempt: Callable[[], Awaitable[Session]], patience: float) -> Session:
    """Repeat what raises Error for `patience` seconds, with pauses; raises the last one."""
    deadline = time.monotonic() + patience
    pause = FIRST_PAUSE
    while True:
        try:
            return await attempt()
        except Error:
            if time.monotonic() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)
