"""All lines to one export, and the requests over them: tried again by another connection when one is lost.

A request that changes something waits while a server may still do what nobody waits for any more (`forsaken`): that
must not be done over what was answered later. A connection that ended says nothing about what its server goes on doing.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from blkferry.drivers.nbd.connection import LOST, ConnectionLost
from blkferry.drivers.nbd.line import FIRST_PAUSE, Line
from blkferry.graph.root import Root, asker
from blkferry.plane.drain import InFlight
from blkferry.wire.nbd.constants import Cmd

if TYPE_CHECKING:
    from blkferry.drivers.nbd.haggling import Session
    from blkferry.plane.engine import Done
    from blkferry.plane.services import Services

_CHANGES: Final = frozenset({Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM})


class Lines:
    """One line at least, once `add` was called. `redial` and `patience`, in seconds, are those of each `Line`.

    All methods are for the loop of the services.
    """

    def __init__(self, services: Services, redial: Callable[[], Awaitable[Session]], patience: float) -> None:
        self.forsaken = InFlight()
        self.all: list[Line] = []
        self._services = services
        self._redial = redial
        self._patience = patience
        self._epoch = 0  # counts how often all that was in flight was given up
        self._again: set[asyncio.Task[None]] = set()  # requests of `begin` that have lost their connection

    def add(self, session: Session) -> None:
        """Have one more."""
        self.all.append(Line(session, self._services, self._redial, self._patience, self.forsaken))

    async def call(
        self,
        command: Cmd,
        start: int,
        length: int,
        *,
        flags: int = 0,
        view: memoryview | None = None,
        lost_in: int | None = None,
    ) -> tuple[tuple[int, int], ...]:
        """Have a server do it; the extents of a BLOCK_STATUS are returned. Raises OSError.

        `lost_in` is the epoch in which a connection was lost that it had been sent by.
        """
        user, deadline, is_lost = asker.get(), None, lost_in is not None
        epoch = self._epoch if lost_in is None else lost_in
        while True:
            if epoch != self._epoch or (user is not None and user.given_up):
                raise OSError(errno.EIO, "it was given up")
            if is_lost:
                if deadline is None:
                    deadline = time.monotonic() + self._patience
                else:
                    await asyncio.sleep(FIRST_PAUSE)  # it was lost again: a server that hangs up on every request
                if time.monotonic() >= deadline and all(line.connection.lost for line in self.all):
                    raise OSError(errno.EIO, "the connection to the NBD server has ended")
            if command in _CHANGES and self.forsaken.count:
                await asyncio.sleep(FIRST_PAUSE)
                continue
            line = self.all[0] if len(self.all) == 1 else self._least_busy()
            connection = line.connection
            if connection.lost:
                connection = await line.connected(user)
            try:
                return await connection.call(command, start, length, flags=flags, view=view, user=user)
            except ConnectionLost:
                is_lost = True

    def begin(self, command: int, start: int, length: int, view: memoryview | None, done: Done) -> bool:
        """`call` for those who do not await it; false when that would have to wait for anything but the answer."""
        line = self.all[0] if len(self.all) == 1 else self._least_busy()
        connection, user, epoch = line.connection, asker.get(), self._epoch
        if connection.lost or (user is not None and user.given_up):
            return False
        if self.forsaken.count and command in _CHANGES:
            return False

        def answered(result: int) -> None:
            if result == LOST:
                task = self._services.loop.create_task(again())
                self._again.add(task)
                task.add_done_callback(self._again.discard)
            else:
                done(result)

        async def again() -> None:
            asker.set(user)
            try:
                await self.call(Cmd(command), start, length, view=view, lost_in=epoch)
            except OSError as error:
                done(-(error.errno or errno.EIO))
            else:
                done(0)

        connection.begin(command, start, length, answered, view=view, user=user)
        return True

    def _least_busy(self) -> Line:
        live: list[Line] = []
        for line in self.all:
            if line.connection.lost:
                line.revive()
            else:
                live.append(line)
        return min(live or self.all, key=lambda line: line.connection.in_flight)

    def give_up(self, user: Root | None) -> None:
        """Have what is waited for fail soon, for the sake of one user or of all."""
        if user is None:
            self._epoch += 1
        for line in self.all:
            line.give_up(user)

    def pause(self) -> None:
        """Leave the loop; nobody waits for anything."""
        for line in self.all:
            line.pause()

    def move(self, services: Services) -> None:
        """Go on with another loop, after `pause`."""
        self._services = services
        for line in self.all:
            line.move(services)

    def leave(self) -> None:
        """Say goodbye; nobody waits for anything."""
        for line in self.all:
            line.leave()
