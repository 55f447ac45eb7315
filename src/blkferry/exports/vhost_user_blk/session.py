"""What one front end has set up, and what each of its messages does to it.

Messages are executed one after the other, on the loop of the node. Whatever changes under the rings (their addresses,
memory that goes) is changed while they stand still. A message that makes no sense is a ProtocolError: the front end is
cut off, and the device is as it was before it came.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final, NamedTuple, TypeVar

from blkferry.errors import Error
from blkferry.exports.vhost_user_blk.backend_channel import BackendChannel
from blkferry.exports.vhost_user_blk.dirty_log import DirtyLog
from blkferry.exports.vhost_user_blk.inflight import InflightBuffer
from blkferry.exports.vhost_user_blk.memory import MemoryTable
from blkferry.exports.vhost_user_blk.vring import Vring, can_be_polled
from blkferry.exports.virtio_blk.device import Device
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import (
    LOG_ALL,
    MAX_MEM_SLOTS,
    PROTOCOL_FEATURES,
    ConfigFlag,
    ProtocolFeature,
    Request,
    VringFlag,
)
from blkferry.wire.vhost_user.messages import Message
from blkferry.wire.vhost_user.payloads import Payload, ProtocolError
from blkferry.wire.virtio.chain import MAX_SIZE
from blkferry.wire.virtio_blk import CONFIG_WRITEBACK

log = logging.getLogger(__name__)

OFFERED: Final = int(
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

OF_TRANSPORT: Final = LOG_ALL | PROTOCOL_FEATURES
"""Feature bits that are the protocol's own business."""


NEEDS_RESET: Final = 64
"""The bit of the device status by which a device says that it cannot go on (virtio 1.3, section 2.1)."""


class Reply(NamedTuple):
    """What a message that asks for something is answered with."""

    payload: Payload
    fds: tuple[int, ...] = ()


Kind = TypeVar("Kind")


class Session:
    """The state of one front end. `name` is what log lines call it, `cut_off` ends its connection."""

    def __init__(self, device: Device, name: str, cut_off: Callable[[str], None]) -> None:
        self.device = device
        self._name = name
        self._cut_off = cut_off
        self._memory = MemoryTable()
        self.vrings = [Vring(index, device, self._memory, self._ring_failed) for index in range(device.queues)]
        self.protocol_features = ProtocolFeature(0)
        self._features = 0
        self._status = 0
        self._log: DirtyLog | None = None
        self._inflight: InflightBuffer | None = None
        self._backend: BackendChannel | None = None

    async def execute(self, message: Message, fds: list[int]) -> Reply | None:
        """Do what a message says. Descriptors that it keeps are taken out of `fds`. Raises ProtocolError."""
        return await self._HANDLERS[message.request](self, message.payload, fds)

    async def end(self) -> None:
        """Serve no ring, and forget everything when nothing is in flight and all that was written is durable."""
        await self.halt()
        if await self._flush() and self._inflight is not None:
            self._inflight.release()
        for vring in self.vrings:
            vring.reset()
        self._memory.clear()
        self._set_log(None)
        self._set_inflight(None)
        self._set_backend(None)
        self.device.reset()

    # Rings, all at once --------------------------------------------------------------------------------------------

    async def halt(self) -> None:
        """Serve no ring; return when nothing is in flight."""
        for vring in self.vrings:
            await vring.halt()

    async def pause(self) -> None:
        """Let go of the loop, and keep the rings."""
        for vring in self.vrings:
            if vring.queue is not None:
                await vring.queue.pause()
        self.device.drop()

    def resume(self) -> None:
        """Go on, on the loop where the node lives now."""
        for vring in self.vrings:
            if vring.queue is not None:
                vring.queue.resume()

    @property
    def requests(self) -> int:
        return sum(vring.requests for vring in self.vrings)

    def _ring_failed(self) -> None:
        self._status |= NEEDS_RESET

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ProtocolError(f"there is no vring {index}, but {len(self.vrings)} of them")
        return self.vrings[index]

    # Features ------------------------------------------------------------------------------------------------------

    async def _get_features(self, _payload: Payload, _fds: list[int]) -> Reply:
        return Reply(wire.U64(self.device.offered | OF_TRANSPORT))

    async def _set_features(self, payload: Payload, _fds: list[int]) -> None:
        features = _of(wire.U64, payload).value
        wanted = features & ~OF_TRANSPORT
        running = any(vring.queue is not None for vring in self.vrings)
        if running and (features ^ self._features) & ~LOG_ALL:
            raise ProtocolError("features other than the dirty log's change while rings run")
        if not running:
            try:
                self.device.accept(wanted)
            except Error as error:
                raise ProtocolError(error.message) from error
        self._features = features
        self._log_or_not()
        if not features & PROTOCOL_FEATURES:
            for vring in self.vrings:
                vring.enabled = True
                vring.run()

    async def _get_protocol_features(self, _payload: Payload, _fds: list[int]) -> Reply:
        return Reply(wire.U64(OFFERED))

    async def _set_protocol_features(self, payload: Payload, _fds: list[int]) -> None:
        features = _of(wire.U64, payload).value
        if features & ~OFFERED:
            raise ProtocolError(f"protocol features are accepted that are not offered: {features & ~OFFERED:#x}")
        self.protocol_features = ProtocolFeature(features)

    async def _nothing(self, _payload: Payload, _fds: list[int]) -> None:
        """SET_OWNER begins what has begun; RESET_OWNER is best ignored, says the specification; nobody has to be told
        by SET_LOG_FD that a log has changed.
        """

    async def _get_queue_num(self, _payload: Payload, _fds: list[int]) -> Reply:
        return Reply(wire.U64(self.device.queues))

    async def _reset_device(self, _payload: Payload, _fds: list[int]) -> None:
        await self.halt()
        for vring in self.vrings:
            vring.reset()
        self._features = self._status = 0
        self._log_or_not()
        self.device.reset()

    async def _set_status(self, payload: Payload, _fds: list[int]) -> None:
        self._status = _of(wire.U64, payload).value & 0xFF
        if not self._status:
            await self.halt()
            for vring in self.vrings:
                vring.started = False

    async def _get_status(self, _payload: Payload, _fds: list[int]) -> Reply:
        return Reply(wire.U64(self._status))

    # Memory --------------------------------------------------------------------------------------------------------

    async def _set_mem_table(self, payload: Payload, fds: list[int]) -> None:
        await self.halt()
        self._memory.replace(_of(wire.MemoryTable, payload).regions, fds)
        self._run()

    async def _get_max_mem_slots(self, _payload: Payload, _fds: list[int]) -> Reply:
        return Reply(wire.U64(MAX_MEM_SLOTS))

    async def _add_mem_reg(self, payload: Payload, fds: list[int]) -> None:
        self._memory.add(_of(wire.SingleRegion, payload).region, fds[0])

    async def _rem_mem_reg(self, payload: Payload, _fds: list[int]) -> None:
        await self.halt()
        self._memory.remove(_of(wire.SingleRegion, payload).region)
        self._run()

    def _run(self) -> None:
        """Let the rings go on that were stopped for a moment."""
        for vring in self.vrings:
            vring.run()

    async def _set_log_base(self, payload: Payload, fds: list[int]) -> Reply:
        self._set_log(DirtyLog(_of(wire.Log, payload), fds[0], self._cut_off))
        fds.pop()
        return Reply(wire.U64(0))

    def _set_log(self, dirty: DirtyLog | None) -> None:
        before, self._log = self._log, dirty
        self._log_or_not()
        if before is not None:
            before.close()

    def _log_or_not(self) -> None:
        logging_wanted = self._log is not None and self._features & LOG_ALL
        self._memory.guest.log = self._log.mark if logging_wanted and self._log is not None else None

    # Vrings --------------------------------------------------------------------------------------------------------

    async def _set_vring_num(self, payload: Payload, _fds: list[int]) -> None:
        index, size = _of(wire.VringState, payload)
        self._vring(index).resize(size)

    async def _set_vring_base(self, payload: Payload, _fds: list[int]) -> None:
        index, base = _of(wire.VringState, payload)
        self._vring(index).set_base(base)

    async def _get_vring_base(self, payload: Payload, _fds: list[int]) -> Reply:
        vring = self._vring(_of(wire.VringState, payload).vring)
        await vring.halt()
        vring.started = False
        vring.take_fd("kick", -1)
        return Reply(wire.VringState(vring.index, vring.base))

    async def _set_vring_addr(self, payload: Payload, _fds: list[int]) -> None:
        where = _of(wire.VringAddr, payload)
        vring = self._vring(where.vring)
        if (
            where.flags & VringFlag.LOG
            and self._log is not None
            and not self._log.covers(where.log, 6 + 8 * vring.size)
        ):
            raise ProtocolError(f"vring {vring.index} is logged at {where.log:#x}, beyond the end of the log")
        await vring.halt()
        vring.where = where
        vring.run()

    async def _set_vring_enable(self, payload: Payload, _fds: list[int]) -> None:
        index, enabled = _of(wire.VringState, payload)
        vring = self._vring(index)
        if enabled > 1:
            raise ProtocolError(f"vring {index} is to be enabled by {enabled}")
        vring.enabled = bool(enabled)
        if enabled:
            vring.run()
        else:
            await vring.halt()

    async def _set_vring_kick(self, payload: Payload, fds: list[int]) -> None:
        index, has_fd = _of(wire.VringFd, payload)
        vring = self._vring(index)
        if not has_fd:
            raise ProtocolError(f"vring {index} is to be polled, without kicks")
        await vring.halt()
        vring.take_fd("kick", _event(fds))
        vring.started = True
        vring.run()

    async def _set_vring_call(self, payload: Payload, fds: list[int]) -> None:
        index, has_fd = _of(wire.VringFd, payload)
        self._vring(index).take_fd("call", _event(fds) if has_fd else -1)

    async def _set_vring_err(self, payload: Payload, fds: list[int]) -> None:
        index, has_fd = _of(wire.VringFd, payload)
        self._vring(index).take_fd("err", _event(fds) if has_fd else -1)

    # Configuration -------------------------------------------------------------------------------------------------

    async def _get_config(self, payload: Payload, _fds: list[int]) -> Reply:
        wanted = _of(wire.Config, payload)
        config = self.device.config()
        end = wanted.offset + len(wanted.data)
        if end > len(config):
            return Reply(None)  # "zero length of payload to indicate an error"
        return Reply(wanted._replace(data=config[wanted.offset : end]))

    async def _set_config(self, payload: Payload, _fds: list[int]) -> None:
        offset, flags, data = _of(wire.Config, payload)
        if (offset, len(data)) != (CONFIG_WRITEBACK, 1) or data[0] > 1 or flags not in set(ConfigFlag):
            raise ProtocolError(f"{len(data)} bytes at {offset} of the configuration cannot be written")
        self.device.set_writeback(bool(data[0]))
        if not data[0]:
            await self._flush()

    async def _flush(self) -> bool:
        """Make what was written durable; whether that went well."""
        try:
            await self.device.root.flush()
        except OSError as error:
            self.device.complain(f"flush failed: {error.strerror}")
            return False
        return True

    async def _set_backend_req_fd(self, _payload: Payload, fds: list[int]) -> None:
        channel = BackendChannel(fds[0], self._name)
        fds.pop()
        self._set_backend(channel)

    def _set_backend(self, channel: BackendChannel | None) -> None:
        before, self._backend = self._backend, channel
        if before is not None:
            before.close()

    def config_changed(self) -> None:
        """Have the front end read the configuration again, if it wants to hear of that."""
        if self._backend is not None and self.protocol_features & ProtocolFeature.CONFIG:
            self._backend.config_changed()

    # What is in flight ---------------------------------------------------------------------------------------------

    async def _get_inflight_fd(self, payload: Payload, _fds: list[int]) -> Reply:
        wanted = _of(wire.Inflight, payload)
        if not 0 < wanted.num_queues <= len(self.vrings) or not 0 < wanted.queue_size <= MAX_SIZE:
            raise ProtocolError(f"{wanted.num_queues} vrings of {wanted.queue_size} are to be remembered")
        made = InflightBuffer.make(wanted.num_queues, wanted.queue_size)
        self.device.lost_writes = False  # a guest that begins anew has nothing to lose
        self._set_inflight(made)
        return Reply(made.described, (made.fd,))

    async def _set_inflight_fd(self, payload: Payload, fds: list[int]) -> None:
        described = _of(wire.Inflight, payload)
        if any(vring.queue is not None for vring in self.vrings):
            raise ProtocolError("another buffer for what is in flight comes while rings run")
        if not 0 < described.num_queues <= len(self.vrings) or not 0 < described.queue_size <= MAX_SIZE:
            raise ProtocolError(f"the buffer for what is in flight is for {described.num_queues} vrings")
        buffer = InflightBuffer(described, fds[0])
        fds.pop()
        unflushed = self.device.writable and self.device.writeback
        if buffer.abandoned and unflushed and self.device.root.node.flush_target() is None:
            # The page cache has survived, but not what a format keeps in memory between flushes.
            log.warning("%s: what was not flushed before the crash may be lost: the next flush fails", self._name)
            self.device.lost_writes = True
        self._set_inflight(buffer)

    def _set_inflight(self, buffer: InflightBuffer | None) -> None:
        before, self._inflight = self._inflight, buffer
        for vring in self.vrings:
            vring.inflight = buffer
        if buffer is not None:
            buffer.claim()
        if before is not None:
            before.close()

    _HANDLERS: ClassVar[dict[Request, Callable[[Session, Payload, list[int]], Awaitable[Reply | None]]]] = {
        Request.GET_FEATURES: _get_features,
        Request.SET_FEATURES: _set_features,
        Request.SET_OWNER: _nothing,
        Request.RESET_OWNER: _nothing,
        Request.SET_MEM_TABLE: _set_mem_table,
        Request.SET_LOG_BASE: _set_log_base,
        Request.SET_LOG_FD: _nothing,
        Request.SET_VRING_NUM: _set_vring_num,
        Request.SET_VRING_ADDR: _set_vring_addr,
        Request.SET_VRING_BASE: _set_vring_base,
        Request.GET_VRING_BASE: _get_vring_base,
        Request.SET_VRING_KICK: _set_vring_kick,
        Request.SET_VRING_CALL: _set_vring_call,
        Request.SET_VRING_ERR: _set_vring_err,
        Request.GET_PROTOCOL_FEATURES: _get_protocol_features,
        Request.SET_PROTOCOL_FEATURES: _set_protocol_features,
        Request.GET_QUEUE_NUM: _get_queue_num,
        Request.SET_VRING_ENABLE: _set_vring_enable,
        Request.SET_BACKEND_REQ_FD: _set_backend_req_fd,
        Request.GET_CONFIG: _get_config,
        Request.SET_CONFIG: _set_config,
        Request.GET_INFLIGHT_FD: _get_inflight_fd,
        Request.SET_INFLIGHT_FD: _set_inflight_fd,
        Request.RESET_DEVICE: _reset_device,
        Request.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
        Request.ADD_MEM_REG: _add_mem_reg,
        Request.REM_MEM_REG: _rem_mem_reg,
        Request.SET_STATUS: _set_status,
        Request.GET_STATUS: _get_status,
    }


def _of(kind: type[Kind], payload: Payload) -> Kind:
    """The payload, which is what `FORMS` says of its message."""
    assert isinstance(payload, kind)
    return payload


def _event(fds: list[int]) -> int:
    """Take the one descriptor, on which events are told. Neither reading nor writing it may ever wait."""
    if not can_be_polled(fds[0]):
        raise ProtocolError("a descriptor for events is a file")
    fd = fds.pop()
    os.set_blocking(fd, False)
    return fd
