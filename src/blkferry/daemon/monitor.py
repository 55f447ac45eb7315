"""QMP monitors: what clients of a chardev say becomes commands, what happens becomes events.

Knows the conversation's flow, not the commands (`Commands` runs those), nor the bytes (`wire.qmp`).

How a client is kept from holding up the daemon:
- Replies: the next command waits until the last reply is with the kernel, and nothing is read meanwhile. Who
  does not read its replies is no longer served, that is all.
- Events: they come unasked, so that brake does not grip. A client that leaves MAX_UNSENT_EVENTS unread is
  dropped, since an event left out in silence would mislead it, and memory is finite. It may connect anew and
  query.
- A client that goes away while its command runs: the command completes, the reply is dropped, and the next
  client is welcome at once. One that only closes its sending side gets its replies first.

Descriptors that a client passes (SCM_RIGHTS) are its own: its commands find them by name, and those that none took
are closed when it goes away.

Invariants: one client at a time talks; the commands of one client run in their order, one by one; an event
emitted during a command is sent before the command's reply.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Protocol

from blkferry.errors import Error, ErrorKind
from blkferry.sockets import descriptors
from blkferry.sockets.descriptors import Descriptors
from blkferry.wire.qmp.session import Answered, CommandReceived, Mode, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from blkferry.daemon.channel import Channel
    from blkferry.daemon.chardev import Chardev

MAX_UNSENT_EVENTS = 1 << 20  # bytes: some 8000 events, far more than a client that reads leaves waiting
MAX_CONVERSATIONS = 8  # with those whose client has hung up but whose command still runs; then new ones wait
COMMAND_GRACE_S = 10.0  # how long `stop` waits for running commands
FLUSH_GRACE_S = 1.0  # how long a conversation that is over waits for its client to take the last bytes

_log = logging.getLogger(__name__)


class Commands(Protocol):
    """What a monitor needs of the daemon."""

    @property
    def version(self) -> tuple[int, int, int]: ...

    @property
    def package(self) -> str: ...

    async def execute(self, name: str, arguments: dict[str, object]) -> object:
        """Run a command. Returns what JSON can carry, raises `Error`."""

    def subscribe(self, callback: Callable[[str, dict[str, object]], None]) -> Callable[[], None]:
        """Call back with each event, on the daemon's loop. Returns the function that ends it."""


class Monitor:
    """Serves the clients of one chardev, which it starts and stops."""

    def __init__(
        self,
        chardev: Chardev,
        commands: Commands,
        *,
        pretty: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._chardev = chardev
        self._commands = commands
        self._pretty = pretty
        self._clock_ns = clock_ns
        self._serving: asyncio.Task[None] | None = None
        self._conversations: dict[asyncio.Task[None], _Conversation] = {}

    async def start(self) -> None:
        self._chardev.claim()
        try:
            await self._chardev.start()
        except BaseException:
            self._chardev.release()
            raise
        self._serving = asyncio.create_task(self._serve(), name=f"monitor on {self._chardev.id}")
        self._serving.add_done_callback(_report)

    async def stop(self) -> None:
        """Let running commands end and their replies go out, then disconnect. No command may await this."""
        if self._serving is None:
            return
        serving, self._serving = self._serving, None
        serving.cancel()
        await asyncio.wait([serving])
        self._chardev.stop()
        self._chardev.release()
        for task, conversation in self._conversations.items():
            conversation.stopping = True
            if not conversation.executing:
                task.cancel()
        if self._conversations:
            _, late = await asyncio.wait(self._conversations, timeout=COMMAND_GRACE_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _serve(self) -> None:
        while True:
            channel = await self._chardev.accept()
            session = Session(pretty=self._pretty)
            conversation = _Conversation(channel, session, self._commands, self._clock_ns)
            task = asyncio.create_task(conversation.run())
            self._conversations[task] = conversation
            task.add_done_callback(self._conversations.pop)
            task.add_done_callback(_report)
            await channel.ended.wait()
            while len(self._conversations) >= MAX_CONVERSATIONS:
                await asyncio.wait(self._conversations, return_when=asyncio.FIRST_COMPLETED)


def _report(task: asyncio.Task[None]) -> None:
    """A task that nobody awaits must not fail in silence."""
    if not task.cancelled() and (failure := task.exception()):
        _log.error("%s failed", task.get_name(), exc_info=failure)


class _Conversation:
    """One client, from greeting to farewell."""

    def __init__(self, channel: Channel, session: Session, commands: Commands, clock_ns: Callable[[], int]) -> None:
        self.executing = False
        self.stopping = False
        self._channel = channel
        self._session = session
        self._commands = commands
        self._clock_ns = clock_ns
        self._unsent_events = 0

    async def run(self) -> None:
        channel = self._channel
        passed = Descriptors(descriptors.current(), numbers=False)
        descriptors.use(passed)
        unsubscribe = self._commands.subscribe(self._on_event)
        try:
            channel.send(self._session.greeting(self._commands.version, self._commands.package))
            while data := await channel.receive():
                passed.arrive(channel.take_descriptors())
                self._session.receive(data)
                while event := self._session.next_event():
                    channel.send(await self._answer(event))
                    await channel.drained()
                    await asyncio.sleep(0)  # a thousand commands in one packet are not one turn of the loop
                    if channel.lost or self.stopping:
                        return
        finally:
            try:
                await asyncio.wait_for(channel.drained(), FLUSH_GRACE_S)
            except TimeoutError:
                pass
            finally:
                unsubscribe()
                channel.close()
                passed.close()

    async def _answer(self, event: CommandReceived | Answered) -> bytes:
        if isinstance(event, Answered):
            return event.data
        self.executing = True
        try:
            return self._session.reply(event.id, await self._commands.execute(event.name, event.arguments))
        except Error as error:
            return self._session.error(event.id, error)
        except Exception:  # noqa: BLE001 - a fault in one command must not take the monitor with it
            _log.exception("command '%s' failed", event.name)
            failure = Error(ErrorKind.IO, f"Internal error in command '{event.name}', the daemon's log has the details")
            return self._session.error(event.id, failure)
        finally:
            self.executing = False

    def _on_event(self, name: str, data: dict[str, object]) -> None:
        channel = self._channel
        if self._session.mode is not Mode.READY or channel.lost:
            return
        line = self._session.event(name, data, self._clock_ns())
        self._unsent_events = self._unsent_events + len(line) if channel.unsent else len(line)
        if channel.unsent and self._unsent_events > MAX_UNSENT_EVENTS:
            _log.warning("dropping a monitor client that does not read its events")
            channel.close()
            return
        channel.send(line)
