"""The connection of a front end: messages come in, are executed one at a time, and answered.

Requests of the guest do not come this way: see `exports.virtio_blk`. While a message is being executed, which may take
as long as the slowest request in flight, nothing is read.

Invariants: every descriptor that arrives is closed by whoever has it; a front end that breaks the protocol, or goes,
leaves no ring running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from blkferry.exports.vhost_user_blk.session import Reply, Session
from blkferry.exports.virtio_blk.device import Device
from blkferry.plane.loops import ended_unseen
from blkferry.plane.services import Services
from blkferry.wire.vhost_user.constants import ProtocolFeature
from blkferry.wire.vhost_user.messages import FORMS, Answer, Message, Receiver, build_reply
from blkferry.wire.vhost_user.payloads import U64, ProtocolError

log = logging.getLogger(__name__)

MOST_FDS: Final = 32
"""Room for descriptors in one receive: more than any message has, so that too many are seen and not lost."""

NOT_DONE: Final = U64(1)
DONE: Final = U64(0)


class Connection:
    """One front end; owned by the loop of the device's node.

    `on_closed` is called once, on that loop, when the socket is closed and nothing is in flight any more. `peer` says
    who it is, `received` and `sent` count the bytes of messages.
    """

    def __init__(self, device: Device, sock: socket.socket, peer: str, on_closed: Callable[[Connection], None]) -> None:
        self.device = device
        self.peer = peer
        self.received = 0
        self.sent = 0
        self.closed = False
        self._name = f"{device.name}: {peer}"
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed = on_closed
        self._receiver = Receiver()
        self._task: asyncio.Task[None] | None = None
        self._services: Services = device.root.services
        self._reading = False
        self._paused = True  # until resume()
        self._gone = asyncio.Event()
        self.session = Session(device, self._name, self._cut_off)
        sock.setblocking(False)
        log.info("%s: connected", self._name)

    @property
    def requests(self) -> int:
        """Requests of the guest, not messages."""
        return self.session.requests

    # Life ----------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on, on the loop where the node lives now."""
        if self.closed:
            return
        if asyncio.get_running_loop() is not self.device.root.services.loop:  # it moved while this was on its way
            self.device.root.services.loop.call_soon_threadsafe(self.resume)
            return
        self._services = self.device.root.services
        self._paused = False
        self.session.resume()
        self._read()

    async def pause(self) -> None:
        """Let go of the loop, and keep the front end; return when nothing is in flight."""
        self._paused = True
        self._stop_reading()
        await self._settled()
        await self.session.pause()

    async def drain(self) -> None:
        """Take no more requests; return when what was taken is answered."""
        self._paused = True
        self._stop_reading()
        await self._settled()
        await self.session.halt()

    async def _settled(self) -> None:
        """Wait until nothing is being done, neither for a message nor because the end has come."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    def close(self, why: str = "") -> None:
        """Close the socket, and let what is in flight run to its end."""
        if self.closed:
            return
        self.closed = True
        log.info("%s: %s", self._name, f"disconnecting: {why}" if why else "gone")
        self._stop_reading()
        self._sock.close()
        self._close_fds(self._receiver.fds)
        self._task = asyncio.get_running_loop().create_task(self._end(self._task))

    async def _end(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self.session.end()
        self._gone.set()
        self._on_closed(self)

    async def gone(self) -> None:
        """Wait until it is closed and nothing is in flight."""
        await self._gone.wait()

    def _cut_off(self, why: str) -> None:
        """Close because of something that cannot go on."""
        if not self.closed:
            log.warning("%s: %s", self._name, why)
            self.close("it cannot be served")

    # Messages ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if not self._reading and not self._paused and not self.closed and self._task is None:
            self._reading = True
            self._services.loop.add_reader(self._fd, self._readable)
            self._services.loop.call_soon(self._readable)  # what is there already may not be told of again

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._services.loop.remove_reader(self._fd)

    def _readable(self) -> None:
        while self._reading:
            try:
                data, fds, flags, _ = socket.recv_fds(self._sock, self._receiver.wanted, MOST_FDS)
            except BlockingIOError:
                if ended_unseen(self._sock):
                    self.close()
                return
            except OSError as error:
                self.close(error.strerror or "receive failed")
                return
            if not data:
                self.close("" if self._receiver.empty else "it went away in the middle of a message")
                return
            self.received += len(data)
            try:
                message = self._receiver.receive(data, fds)
                if flags & socket.MSG_CTRUNC:
                    raise ProtocolError("there are more descriptors with a message than could be received")
            except ProtocolError as error:
                self._violated(error)
                return
            if message is not None:
                self._stop_reading()
                self._task = self._services.loop.create_task(self._execute(message))

    async def _execute(self, message: Message) -> None:
        log.debug("%s: %s %s", self._name, message.request.name, message.payload)
        fds = list(message.fds)
        reply = None
        try:
            reply = await self.session.execute(message, fds)
        except ProtocolError as error:
            if self._acknowledges(message):
                self._send(message, Reply(NOT_DONE))
            self._violated(error)
        except Exception:
            log.exception("%s: %s failed", self._name, message.request.name)
            self._cut_off("this is a bug")
        finally:
            self._close_fds(fds)
        if reply is None and self._acknowledges(message):
            reply = Reply(DONE)
        if reply is not None:
            self._send(message, reply)
        if not self.closed:
            self._task = None
            self._read()

    def _acknowledges(self, message: Message) -> bool:
        """Whether the front end waits for a message to be acknowledged that has no answer of its own."""
        return (
            message.need_reply
            and FORMS[message.request].answer is Answer.ACK
            and bool(self.session.protocol_features & ProtocolFeature.REPLY_ACK)
        )

    def _send(self, message: Message, reply: Reply) -> None:
        if self.closed:
            return
        log.debug("%s: answered with %s", self._name, reply.payload)
        data = build_reply(message.request, reply.payload)
        try:
            sent = socket.send_fds(self._sock, [data], reply.fds, socket.MSG_NOSIGNAL)
        except OSError as error:  # one that is full has answers in it that nobody reads
            self.close(error.strerror or "send failed")
            return
        self.sent += sent
        if sent < len(data):
            self.close("it does not read its answers")

    def _violated(self, error: ProtocolError) -> None:
        log.warning("%s: protocol violation: %s", self._name, error.message)
        self.close("it broke the protocol")

    @staticmethod
    def _close_fds(fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        fds.clear()
