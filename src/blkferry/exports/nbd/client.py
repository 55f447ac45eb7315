"""One NBD client after its handshake: requests in, replies out, on the loop of the exported node.

Theory of operation. A turn starts when the socket is readable. One recv fills the loop's shared scratch memory;
every whole request in it is executed in order (rule R2), and the replies are gathered in the loop's other scratch
memory and sent with one call. A request takes one of three roads:

- inline: reads that cannot sleep, and buffered writes, right here (R3); large reads go by sendfile (R4);
- engine: what may sleep (cold reads, O_DIRECT, FUA, flush), finished by a callback; its replies are queued and leave
  together at the end of a batch of completions;
- task: everything that needs more than one step (`slow`): zeroes, discards, unaligned or split ranges.

The inline and engine roads need `_run`, the one resolved extent that covers the export; a node that has none takes the
task road. What does not fit into a turn waits: an incomplete request in `_stash`, the payload of a large write in a
buffer of its own, replies in the outbox. While replies wait for the socket, or too much is in flight, nothing new
is read.

Invariants: every request gets exactly one final reply unless the connection ends; the stream stays in step or the
connection ends; nothing of a request is executed before its payload is complete.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from blkferry.exports.nbd import slow
from blkferry.extent import Content
from blkferry.plane.buffers import Buffer
from blkferry.plane.drain import InFlight
from blkferry.plane.outbox import Outbox
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_REQUEST,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    ReplyFlag,
)
from blkferry.wire.nbd.handshake import Negotiated

if TYPE_CHECKING:
    from blkferry.exports.nbd.export import NbdExport
    from blkferry.plane.storage import Storage

log = logging.getLogger(__name__)

SENDFILE_FROM = 32 << 10
"""Reads of at least this many bytes are sent from the page cache; below it one copy is cheaper than two more calls."""

MAX_IN_FLIGHT = 256
"""Requests of one client that may wait for the engine or a task."""

MAX_IN_FLIGHT_BYTES = 64 << 20
"""Their payload: two of the largest requests."""

TURN_BYTES = 8 << 20
"""What one client may read in a turn, so that it does not starve the others of its loop."""

STALL_SECONDS = 0.005
"""A turn with inline writes that takes longer was throttled by the kernel: writes then go by the engine for a while."""

STALL_PENALTY = 1.0

_ZEROES = memoryview(bytes(SENDFILE_FROM))
_DONE = int(ReplyFlag.DONE)
_OFFSET_DATA = int(Chunk.OFFSET_DATA)
_READ, _WRITE, _FLUSH, _DISC = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.FLUSH), int(Cmd.DISC)
_FUA, _DF = int(CmdFlag.FUA), int(CmdFlag.DF)
_PAYLOAD_LEN = int(CmdFlag.PAYLOAD_LEN)
_SIMPLE, _STRUCTURED, _EXTENDED = Mode.SIMPLE, Mode.STRUCTURED, Mode.EXTENDED


class _Payload:
    """A write whose payload is still coming, or one that is being thrown away (`buffer` is None)."""

    __slots__ = ("buffer", "have", "length", "request")

    def __init__(self, request: wire.Request, length: int, buffer: Buffer | None) -> None:
        self.request = request
        self.length = length
        self.buffer = buffer
        self.have = 0


class NbdClient:
    """One connection in its transmission phase; owned by the loop of the export's node.

    `on_closed` is called once, on that loop, when the socket is closed and nothing is in flight any more.
    """

    def __init__(
        self,
        export: NbdExport,
        sock: socket.socket,
        negotiated: Negotiated,
        leftover: bytes,
        peer: str,
        on_closed: Callable[[NbdClient], None],
    ) -> None:
        self.export = export
        self.root = export.root
        self.mode = negotiated.mode
        self.contexts = negotiated.contexts
        self.peer = peer
        self.size = export.size
        self.read_only = not export.options.writable
        self._selected = tuple(number for number, _ in negotiated.contexts)
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed = on_closed
        self._magic, self._layout = wire.REQUEST_LAYOUT[self.mode]
        self._stash = bytes(leftover)
        self._payload: _Payload | None = None
        self._moving: bytes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight_bytes = 0
        self._reading = False
        self._paused = True  # until resume()
        self._ending = False  # no more requests; the connection closes when what is in flight has been answered
        self._closed = False
        self._close_waiters: list[asyncio.Future[None]] = []
        self._flush_scheduled = False
        self._operations = InFlight()
        self.services = export.root.services
        self._outbox = Outbox(sock, self.services, self._go_on)
        self.invalidate()

    # The resolved extent ---------------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """Forget what lookups said; the next turn asks again."""
        self._run_known = False
        self._run_end = 0
        self._write_end = 0
        self._storage: Storage | None = None

    def _resolve(self) -> None:
        """Take the shortcut where the whole export is one piece of one descriptor."""
        self._run_known = True
        runs = self.root.runs(0, self.size) if self.size else None
        if not runs or len(runs) != 1 or runs[0].content is not Content.DATA or runs[0].storage is None:
            return
        run = runs[0]
        storage = run.storage
        assert storage is not None
        self._storage = storage
        self._run_end = run.length
        self._run_offset = run.offset
        if (
            run.in_place
            and not self.read_only
            and not self.root.detects_zeroes
            and self.root.node.flush_target() is storage
        ):
            self._write_end = run.length

    # Life ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Serve, on the loop where the node lives now."""
        if self._closed:
            return
        if asyncio.get_running_loop() is not self.root.services.loop:  # the node moved while this call was on its way
            self.root.services.loop.call_soon_threadsafe(self.resume)
            return
        self.services = self.root.services
        self._outbox.attach(self.services)
        payload = self._payload
        if payload is not None and self._moving is not None:
            payload.buffer = self.services.buffers.acquire(payload.length)
            payload.buffer.view[: payload.have] = self._moving
            self._moving = None
        self.invalidate()
        self._paused = False
        self._go_on()

    async def pause(self) -> None:
        """Stop serving; return when nothing is in flight. The connection stays."""
        self._paused = True
        self._stop_reading()
        await self.idle()
        while self._flush_scheduled:  # noqa: ASYNC110 - it is one turn of the loop away
            await asyncio.sleep(0)
        self.services.buffers.forget(self._go_on)
        self._outbox.detach()
        payload = self._payload
        if payload is not None and payload.buffer is not None:
            # Buffers belong to the loop: what has come of a write waits in plain memory while the client moves.
            self._moving = bytes(payload.buffer.view[: payload.have])
            payload.buffer.release()
            payload.buffer = None

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._operations.idle()

    async def finished(self) -> None:
        """Wait until the connection is closed and nothing is in flight."""
        while not self._closed:
            waiter = asyncio.get_running_loop().create_future()
            self._close_waiters.append(waiter)
            await waiter
        await self.idle()

    def end(self) -> None:
        """Take no more requests; close when what is in flight has been answered."""
        self._ending = True
        self._stop_reading()
        if not self._operations.count and not self._outbox.blocked:
            self.close()

    def close(self, why: str = "") -> None:
        """Close the socket at once. What is in flight runs to its end; its replies are dropped."""
        if self._closed:
            return
        self._closed = self._ending = True
        if why:
            log.info("%s: export '%s': disconnecting: %s", self.peer, self.export.name, why)
        self._stop_reading()
        self._outbox.broken = True
        self._outbox.discard()
        if self._payload is not None and self._payload.buffer is not None:
            self._payload.buffer.release()
        self._payload = None
        self._sock.close()
        for waiter in self._close_waiters:
            if not waiter.done():
                waiter.set_result(None)
        if not self._operations.count:
            self._on_closed(self)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.services.loop.remove_reader(self._fd)

    def _go_on(self) -> None:
        """Serve what waits in the stash, then read again; called when a reason not to has gone."""
        if self._closed:
            return
        if self._ending:
            if not self._operations.count and not self._outbox.blocked:
                self.close()
            return
        if self._paused or self._must_wait():
            return
        if self._stash and self._payload is None:
            stash, self._stash = self._stash, b""
            self._serve(memoryview(stash), len(stash))
            if self._closed or self._ending or self._paused or self._must_wait():
                return
        if not self._reading:
            self._reading = True
            self.services.loop.add_reader(self._fd, self._readable)

    def _must_wait(self) -> bool:
        if (
            self._outbox.blocked
            or self._operations.count >= MAX_IN_FLIGHT
            or self._in_flight_bytes >= MAX_IN_FLIGHT_BYTES
        ):
            return True
        if self.services.buffers.exhausted:
            self.services.buffers.wait(self._go_on)
            return True
        return False

    # Receiving -------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            payload = self._payload
            if payload is not None:
                self._receive_payload(payload)
                return
            scratch = self.services.scratch_in
            have = len(self._stash)
            if have:
                scratch[:have] = self._stash
                self._stash = b""
            count = self._sock.recv_into(scratch[have:])
        except BlockingIOError:
            if self._payload is None and have:
                self._stash = bytes(scratch[:have])
            return
        except OSError as error:
            self.close(error.strerror or "receive failed")
            return
        if not count:
            self._hang_up(have)
            return
        self._serve(scratch, have + count)

    def _hang_up(self, unparsed: int) -> None:
        """The client closed its side: requests in flight run to their end, there is nobody to answer."""
        self.close("the client went away in the middle of a request" if unparsed else "the client went away")

    def _receive_payload(self, payload: _Payload) -> None:
        """Straight into the write's own buffer, without a copy."""
        if payload.buffer is None:
            room = min(payload.length - payload.have, len(self.services.scratch_in))
            count = self._sock.recv_into(self.services.scratch_in[:room])
        else:
            count = self._sock.recv_into(payload.buffer.view[payload.have : payload.length])
        if not count:
            self._hang_up(1)
            return
        payload.have += count
        if payload.have == payload.length:
            self._payload = None
            if payload.buffer is not None:
                self._execute_buffer(payload.request, payload.buffer)
                self.services.engine.kick()

    # The turn --------------------------------------------------------------------------------------------------

    def _serve(self, data: memoryview, end: int) -> None:
        """Execute every whole request in data[:end], and keep the rest for later."""
        if not self._run_known:
            self._resolve()
        storage = self._storage
        run_end, write_end = self._run_end, self._write_end
        inline_flags, read_end = 0, 0
        if storage is not None and storage.inline_read_flags is not None:
            inline_flags, read_end = storage.inline_read_flags, run_end
        fd = -1 if storage is None else storage.fd
        delta = self._run_offset if storage is not None else 0
        started = 0.0
        if write_end and storage is not None:
            started = time.monotonic()
            if storage.direct or self.root.writethrough or started < storage.inline_writes_from:
                write_end = 0
        wrote = False
        mode, magic = self.mode, self._magic
        unpack, header = self._layout.unpack_from, self._layout.size
        out = self.services.scratch_out
        view = memoryview(out)
        room = len(out)
        preadv, pwritev = os.preadv, os.pwritev
        structured = mode != _SIMPLE
        data_layout, data_header = wire.STRUCTURED_DATA.pack_into, wire.STRUCTURED_DATA.size
        if mode == _EXTENDED:
            data_layout, data_header = wire.EXTENDED_DATA.pack_into, wire.EXTENDED_DATA.size
        elif mode == _SIMPLE:
            data_header = wire.SIMPLE_REPLY.size
        simple = wire.SIMPLE_REPLY.pack_into
        pos = filled = 0
        budget = TURN_BYTES
        while end - pos >= header and budget > 0:
            got, flags, command, cookie, offset, length = unpack(data, pos)
            if got != magic:
                self._send(view, filled)
                self._bad_magic(got, cookie)
                return
            if command == _READ and offset + length <= read_end and not flags & ~_DF and 0 < length < SENDFILE_FROM:
                if filled + data_header + length > room:
                    self._send(view, filled)
                    budget -= filled
                    filled = 0
                    if self._outbox.blocked:
                        break
                start = filled + data_header
                try:
                    count = preadv(fd, (view[start : start + length],), offset + delta, inline_flags)
                except BlockingIOError:
                    count = -1
                except OSError as error:
                    pos += header
                    filled = self._append(
                        view, filled, self._error(wire.Request(flags, command, cookie, offset, length), error)
                    )
                    continue
                if count == length:
                    pos += header
                    if not structured:
                        simple(out, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                    elif not out[start] and not flags and out.startswith(_ZEROES[:length], start):
                        request = wire.Request(flags, command, cookie, offset, length)
                        filled = self._append(view, filled, wire.hole_chunk(mode, request, offset, length, done=True))
                        continue
                    elif mode == _STRUCTURED:
                        data_layout(
                            out, filled, STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset
                        )
                    else:
                        data_layout(
                            out, filled, EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, length + 8, offset
                        )
                    filled = start + length
                    continue
            elif (
                command == _WRITE
                and offset + length <= write_end
                and (not flags or flags == _PAYLOAD_LEN)
                and 0 < length <= end - pos - header
            ):
                pos += header
                try:
                    count = pwritev(fd, (data[pos : pos + length],), offset + delta)
                    while count < length:
                        count += pwritev(fd, (data[pos + count : pos + length],), offset + delta + count)
                except OSError as error:
                    pos += length
                    filled = self._append(
                        view, filled, self._error(wire.Request(flags, command, cookie, offset, length), error)
                    )
                    continue
                pos += length
                wrote = True
                if filled + header + 40 > room:
                    self._send(view, filled)
                    filled = 0
                if mode != _EXTENDED:
                    simple(out, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                    filled += 16
                else:
                    request = wire.Request(flags, command, cookie, offset, length)
                    filled = self._append(view, filled, wire.success_reply(mode, request))
                continue
            # Everything that is not the common case leaves the straight line here.
            if filled:
                self._send(view, filled, more=command == _READ and length >= SENDFILE_FROM)
                filled = 0
            if self._must_wait():
                break
            budget -= length
            pos = self._dispatch(data, pos + header, end, wire.Request(flags, command, cookie, offset, length))
            if self._closed or self._ending:
                return
            if self._payload is not None:
                break
            if self._outbox.blocked:
                break
        if filled:
            self._send(view, filled)
        if wrote and storage is not None:
            storage.dirty += 1
            now = time.monotonic()
            if now - started > STALL_SECONDS:
                storage.inline_writes_from = now + STALL_PENALTY
        if self._operations.count:
            self.services.engine.kick()
        if self._closed:
            return
        if self._outbox.broken:
            self.close("the client went away")
            return
        if pos < end:
            self._stash = bytes(data[pos:end])
        if self._must_wait():
            self._stop_reading()
        elif budget <= 0 and self._stash:
            self._stop_reading()
            self.services.loop.call_soon(self._go_on)

    def _send(self, view: memoryview, filled: int, *, more: bool = False) -> None:
        if filled:
            self._outbox.send(view[:filled], more=more)

    def _append(self, view: memoryview, filled: int, reply: bytes) -> int:
        end = filled + len(reply)
        if end > len(view):
            self._send(view, filled)
            filled, end = 0, len(reply)
        view[filled:end] = reply
        return end

    def _bad_magic(self, got: int, cookie: int) -> None:
        """The stream is out of step: nothing after this can be trusted."""
        request = wire.Request(0, 0, cookie, 0, 0)
        reply = wire.error_reply(self.mode, request, Errno.EINVAL, f"invalid request magic {got:#x}")
        self._outbox.send(memoryview(reply))
        self.close(f"request magic is {got:#010x} instead of {self._magic:#010x}")

    # The other roads -------------------------------------------------------------------------------------------

    def _dispatch(self, data: memoryview, pos: int, end: int, request: wire.Request) -> int:
        """Execute one request whose header ends at `pos`; return where the next one begins."""
        command = request.type
        if command == _READ:
            refusal = self.check(request)
            if refusal is not None:
                self.reply(wire.error_reply(self.mode, request, *refusal))
            else:
                self._read(request)
            return pos
        if command == _DISC:
            self.end()
            return pos
        carried = request.payload_length(self.mode)
        if carried:
            return self._with_payload(data, pos, end, request, carried)
        refusal = self.check(request)
        if refusal is not None:
            self.reply(wire.error_reply(self.mode, request, *refusal))
        elif command == _FLUSH and self._storage is not None and self._write_end:
            self._start(0)
            self._storage.flush(lambda result: self._finished(request, result, 0))
        else:
            self._spawn(slow.execute(self, request), 0)
        return pos

    def _with_payload(self, data: memoryview, pos: int, end: int, request: wire.Request, carried: int) -> int:
        """A request that brings bytes along: take them all, or step over them when it is refused anyway."""
        if request.type == Cmd.BLOCK_STATUS and carried <= wire.max_status_filter(self._selected):
            wanted = True
            refusal = None
        else:
            refusal = self.check(request)
            wanted = refusal is None and request.type == _WRITE
        if carried > MAX_REQUEST:
            self.reply(
                wire.error_reply(
                    self.mode, request, Errno.EINVAL, f"len ({carried}) is larger than max len ({MAX_REQUEST})"
                )
            )
            self._outbox.flush()
            self.close(f"a payload of {carried} bytes is larger than {MAX_REQUEST}")
            return end
        if not wanted:
            refusal = refusal or wire.Refusal(Errno.EINVAL, "this command takes no payload")
            self.reply(wire.error_reply(self.mode, request, *refusal))
        payload = _Payload(request, carried, self.services.buffers.acquire(carried) if wanted else None)
        payload.have = min(carried, end - pos)
        if payload.buffer is not None:
            payload.buffer.view[: payload.have] = data[pos : pos + payload.have]
        if payload.have < carried:
            self._payload = payload
        elif payload.buffer is not None:
            self._execute_buffer(request, payload.buffer)
        return pos + payload.have

    def _execute_buffer(self, request: wire.Request, buffer: Buffer) -> None:
        """A request whose whole payload lies in a buffer of its own."""
        if request.type == Cmd.BLOCK_STATUS:
            parsed = wire.parse_status_filter(buffer.view[: request.length], self._selected)
            buffer.release()
            if isinstance(parsed, wire.Refusal):
                self.reply(wire.error_reply(self.mode, request, *parsed))
                return
            request = request._replace(length=parsed.length, flags=request.flags & ~_PAYLOAD_LEN)
            refusal = self.check(request)
            if refusal is not None:
                self.reply(wire.error_reply(self.mode, request, *refusal))
            else:
                self._spawn(slow.execute(self, request, ids=parsed.ids), 0)
            return
        storage = self._storage
        length = request.length
        at = request.offset
        if storage is None or at + length > self._write_end:
            self._spawn(slow.write(self, request, buffer), length)
            return
        fua = bool(request.flags & _FUA) or self.root.writethrough
        now = time.monotonic()
        if not fua and not storage.direct and now >= storage.inline_writes_from:
            self._write_inline(storage, request, buffer, now)
            return
        place = at + self._run_offset
        if storage.alignment > 1 and ((place | length) % storage.alignment or not storage.write_shortcut):
            self._spawn(slow.write(self, request, buffer), length)
            return
        self._start(length)

        def written(result: int) -> None:
            buffer.release()
            self._finished(request, result, length)

        storage.fast_write(buffer, length, place, fua, written)

    def _write_inline(self, storage: Storage, request: wire.Request, buffer: Buffer, now: float) -> None:
        done = 0
        try:
            while done < request.length:
                done += os.pwritev(
                    storage.fd, (buffer.view[done : request.length],), request.offset + self._run_offset + done
                )
        except OSError as error:
            self.reply(self._error(request, error))
        else:
            self.reply(wire.success_reply(self.mode, request))
        finally:
            storage.dirty += 1
            buffer.release()
        if time.monotonic() - now > STALL_SECONDS:
            storage.inline_writes_from = now + STALL_PENALTY

    def _read(self, request: wire.Request) -> None:
        """A read that is large, cold, unaligned, flagged or not within the run."""
        storage = self._storage
        length, at = request.length, request.offset
        if storage is None or not length or request.flags & _FUA or at + length > self._run_end:
            self._spawn(slow.execute(self, request), length)
            return
        place = at + self._run_offset
        if storage.direct:
            if (place | length) % storage.alignment:
                self._spawn(slow.execute(self, request), length)
                return
        elif length >= SENDFILE_FROM and self._send_cached(storage, request, place):
            return
        buffer = self.services.buffers.acquire(length)
        self._start(length)

        def have_read(result: int) -> None:
            if result == length:
                self._answer_read(request, buffer)
                self._finished(None, 0, length)
            else:
                buffer.release()
                if result >= 0:  # the end of the file: the task knows what may be zero there and what may not
                    self._spawn(slow.execute(self, request), length)
                    result = 0
                    self._finished(None, 0, length)
                else:
                    self._finished(request, result, length)

        storage.read(buffer, 0, length, place, have_read)

    def _send_cached(self, storage: Storage, request: wire.Request, place: int) -> bool:
        """Send a large read from the page cache, its holes as holes; False when it is not all there."""
        length = request.length
        holes = self.mode != _SIMPLE and not request.flags & _DF
        pieces = None
        if holes and storage.seek_inline and not storage.known_data(place, length):
            pieces = storage.allocation(place, length, slow.MAX_READ_PIECES)
            if len(pieces) == 1 and pieces[0][1]:
                pieces = None
        if pieces is not None:
            return self._send_sparse(storage, request, place, pieces)
        if not storage.in_memory and not self.services.cache.resident(storage.fd, place, length):
            return False
        header = wire.data_header(self.mode, request, request.offset, length, done=True)
        self._outbox.send(memoryview(header), more=True)
        self._outbox.send_file(storage.fd, place, length)
        return True

    def _send_sparse(self, storage: Storage, request: wire.Request, place: int, pieces: list[tuple[int, bool]]) -> bool:
        if sum(length for length, _ in pieces) < request.length:
            return False  # too fragmented to be worth it: one chunk of data is
        if not storage.in_memory:
            at = place
            for length, is_data in pieces:
                if is_data and not self.services.cache.resident(storage.fd, at, length):
                    return False
                at += length
        offset = request.offset
        for number, (length, is_data) in enumerate(pieces, 1):
            last = number == len(pieces)
            if is_data:
                header = wire.data_header(self.mode, request, offset, length, done=last)
                self._outbox.send(memoryview(header), more=True)
                self._outbox.send_file(storage.fd, place + offset - request.offset, length)
            else:
                chunk = wire.hole_chunk(self.mode, request, offset, length, done=last)
                self._outbox.send(memoryview(chunk), more=not last)
            offset += length
        return True

    def _answer_read(self, request: wire.Request, buffer: Buffer) -> None:
        """Queue the bytes in `buffer` as the whole answer; small ones are copied so that the buffer is free at once."""
        length = request.length
        if length < SENDFILE_FROM:
            payload = buffer.view[:length]
            if self.mode != _SIMPLE and not request.flags & _DF and payload == _ZEROES[:length]:
                self._queue(wire.hole_chunk(self.mode, request, request.offset, length, done=True))
            else:
                header = wire.data_header(self.mode, request, request.offset, length, done=True)
                self._queue(b"".join((header, payload)))
            buffer.release()
            return
        self._queue(wire.data_header(self.mode, request, request.offset, length, done=True))
        self._outbox.queue(buffer.view[:length], buffer)

    # Counting and answering ------------------------------------------------------------------------------------

    def check(self, request: wire.Request) -> wire.Refusal | None:
        return wire.check(request, size=self.size, read_only=self.read_only, mode=self.mode, selected=self._selected)

    def reply(self, data: bytes) -> None:
        """Send a whole reply from within a turn."""
        self._outbox.send(memoryview(data))

    def _queue(self, data: bytes) -> None:
        """Send a reply that is ready outside of a turn, together with the others of its batch."""
        if self._closed:
            return
        self._outbox.queue(data)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self.services.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._closed:
            return
        self._outbox.flush()
        if self._outbox.broken:
            self.close("the client went away")
        elif not self._outbox.blocked:
            self._go_on()

    def _start(self, length: int) -> None:
        self._operations.begin()
        self._in_flight_bytes += length
        self.root.in_flight.begin()

    def _finished(self, request: wire.Request | None, result: int, length: int) -> None:
        """An operation of `length` payload bytes is over; `request` is answered here unless it already was."""
        if request is not None and not self._closed:
            if result < 0:
                self._queue(self._error(request, OSError(-result, os.strerror(-result))))
            else:
                self._queue(wire.success_reply(self.mode, request))
        self._operations.end()
        self._in_flight_bytes -= length
        self.root.in_flight.end()
        if not self._flush_scheduled:  # also resumes reading, once per batch
            self._flush_scheduled = True
            self.services.loop.call_soon(self._flush)
        if self._closed and not self._operations.count:
            self._on_closed(self)

    def _spawn(self, work: Coroutine[Any, Any, bytes], length: int) -> None:
        """Execute a request as a task; `work` returns the reply."""
        self._start(length)
        task = self.services.loop.create_task(self._perform(work, length))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, work: Coroutine[Any, Any, bytes], length: int) -> None:
        try:
            self._queue(await work)
        finally:
            self._finished(None, 0, length)

    def _error(self, request: wire.Request, error: OSError) -> bytes:
        return slow.error_reply(self, request, error)
