"""What a device has to do when the kernel asks, and what it answers: the control side of VDUSE without a kernel.

    reset --SET_STATUS with FEATURES_OK--> negotiated --with DRIVER_OK--> running --SET_STATUS 0--> reset

Whoever reads a request gives it to `receive`, carries out the effect, and sends what `answer` returns; one at a time,
in their order. A device that is found running, because another process has served it before, begins there (`resume`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blkferry.wire.vduse.messages import (
    DeviceStatus,
    GetVqState,
    Request,
    Result,
    SetStatus,
    Unknown,
    UpdateIotlb,
    build_response,
    parse_request,
)


class State(enum.Enum):
    RESET = enum.auto()
    NEGOTIATED = enum.auto()
    RUNNING = enum.auto()


class Effect(enum.Enum):
    """What is to be done before a request is answered."""

    NONE = enum.auto()
    NEGOTIATE = enum.auto()  # see whether the features that the driver has accepted will do
    START = enum.auto()  # begin to serve the virtqueues that are ready
    STOP = enum.auto()  # serve none, finish what is in flight, and forget the memory
    REMAP = enum.auto()  # forget the memory, and find the virtqueues in it anew


@dataclass(frozen=True, slots=True)
class Task:
    """A request, and what it asks for. `valid` is false for those that can only be answered with a failure."""

    request: Request
    effect: Effect
    valid: bool = True


class Queue(Protocol):
    """A virtqueue, as far as the kernel asks for it."""

    @property
    def avail_index(self) -> int:
        """The next entry of its available ring that the device will look at."""


class Machine:
    """The control side of one device with these virtqueues."""

    def __init__(self, queues: Sequence[Queue]) -> None:
        self._queues = queues
        self.state = State.RESET
        self.status = DeviceStatus(0)

    def resume(self) -> None:
        """The device is running already."""
        self.state = State.RUNNING

    def receive(self, data: bytes) -> Task:
        """Take a request. Raises ValueError when these are not the bytes of one."""
        request = parse_request(data)
        match request:
            case GetVqState(index=index):
                return Task(request, Effect.NONE, valid=index < len(self._queues))
            case SetStatus():
                return Task(request, self._transition(request.status))
            case UpdateIotlb(start=start, last=last):
                running = self.state is State.RUNNING
                return Task(request, Effect.REMAP if running else Effect.NONE, valid=start <= last)
            case Unknown():
                return Task(request, Effect.NONE, valid=False)

    def _transition(self, status: DeviceStatus) -> Effect:
        """What leads from this state to the status that the driver wants."""
        if not status:
            return Effect.STOP
        if status & DeviceStatus.DRIVER_OK and self.state is not State.RUNNING:
            return Effect.START
        if status & DeviceStatus.FEATURES_OK and self.state is State.RESET:
            return Effect.NEGOTIATE
        return Effect.NONE

    def answer(self, task: Task, *, ok: bool = True) -> bytes:
        """The bytes to send once its effect was carried out, or (not `ok`) could not be."""
        request = task.request
        if not (ok and task.valid):
            return build_response(request, Result.FAILED)
        match request:
            case GetVqState(index=index):
                return build_response(request, Result.OK, self._queues[index].avail_index)
            case SetStatus(status=status):
                self.status = status
                self.state = _AFTER.get(task.effect, self.state)
        return build_response(request, Result.OK)


_AFTER = {Effect.STOP: State.RESET, Effect.NEGOTIATE: State.NEGOTIATED, Effect.START: State.RUNNING}
