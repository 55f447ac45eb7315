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
from blkferry.plane.drain import InFlight

if TYPE_CHECKING:
    from blkferry.drivers.nbd.haggling import Session
    from blkferry.plane.services import Services

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LAST_PAUSE = 4.0
"""Seconds between two attempts to connect: doubled from the first up to the last."""


class Line:
    """`redial` makes a session like the first one or raises Error; it is tried for `patience` seconds, once at least.

    `forsaken` is for the connections (see there).
    All methods are for the loop of the services.
    """

    def __init__(
        self,
        session: Session,
        services: Services,
        redial: Callable[[], Awaitable[Session]],
        patience: float,
        forsaken: InFlight,
    ) -> None:
        self.connection = Connection(session, services, forsaken)
        self._services = services
        self._forsaken = forsaken
        self._redial = redial
        self._patience = patience
        self._reconnecting: asyncio.Task[Connection] | None = None
        self._waiting: dict[asyncio.Future[None], object] = {}  # for whose sake each of them waits
        self._rest_until = 0.0  # nobody who can do without this line tries it again before

    async def connected(self, user: object = None) -> Connection:
        """The connection, if need be another one, waited for together with all others who do. Raises OSError."""
        if self.connection.lost:
            self._reconnect()
            waiter: asyncio.Future[None] = self._services.loop.create_future()
            self._waiting[waiter] = user
            try:
                await waiter
            finally:
                del self._waiting[waiter]
        return self.connection

    def revive(self) -> None:
        """Have a lost connection replaced some time, for those who can do without."""
        if self._reconnecting is None and time.monotonic() >= self._rest_until:
            self._reconnect()

    def _reconnect(self) -> None:
        if self._reconnecting is None:
            self._reconnecting = self._services.loop.create_task(self._try())
            self._reconnecting.add_done_callback(self._tried)

    async def _try(self) -> Connection:
        session = await persist(self._redial, self._patience)
        self.connection = Connection(session, self._services, self._forsaken)
        return self.connection

    def _tried(self, task: asyncio.Task[Connection]) -> None:
        self._reconnecting = None
        failure = None
        if task.cancelled():
            failure = "it is given up"
        elif (error := task.exception()) is not None:
            self._rest_until = time.monotonic() + LAST_PAUSE
            log.warning("Cannot reach the NBD server again: %s", error)
            failure = str(error)
        for waiter in self._waiting:
            if not waiter.done():
                if failure is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(_ended(failure))

    def give_up(self, user: object = None) -> None:
        """Let nobody wait for the sake of `user` any longer, neither for another connection nor for an answer.

        Without a user: let nobody at all.
        """
        if user is not None:
            for waiter in [each for each, whose in self._waiting.items() if whose is user and not each.done()]:
                waiter.set_exception(_ended("it is given up"))
            self.connection.give_up(user)
            return
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self.connection.in_flight:
            self.connection.end("it is given up")

    def pause(self) -> None:
        """Leave the loop; nobody waits for anything."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self.connection.in_flight:
            self.connection.end("nobody waits for its answers any more")
        if not self.connection.lost:
            self.connection.detach()

    def move(self, services: Services) -> None:
        """Go on with another loop, after `pause`."""
        self._services = self.connection.services = services

    def leave(self) -> None:
        """Say goodbye; nobody waits for anything."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self.connection.leave()


def _ended(why: str) -> OSError:
    return OSError(errno.EIO, f"the connection to the NBD server has ended: {why}")


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
