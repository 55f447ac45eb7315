"""The control side of a device without a kernel: what Linux 6.12 asks of a device, and what it might ask."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.wire.vduse.machine import Effect, Machine, State
from blkferry.wire.vduse.messages import (
    REQUEST_SIZE,
    RESPONSE_SIZE,
    DeviceStatus,
    GetVqState,
    SetStatus,
    Unknown,
    UpdateIotlb,
    parse_request,
)


@dataclass
class Queue:
    avail_index: int


def request(kind: int, number: int, payload: bytes) -> bytes:
    return (struct.pack("<II16x", kind, number) + payload).ljust(REQUEST_SIZE, b"\0")


def status(number: int, value: int) -> bytes:
    return request(1, number, bytes([value]))


def response(number: int, result: int = 0, payload: bytes = b"") -> bytes:
    return (struct.pack("<II16x", number, result) + payload).ljust(RESPONSE_SIZE, b"\0")


@pytest.fixture
def machine() -> Machine:
    return Machine([Queue(5), Queue(0xFFFF)])


def test_requests_are_told_apart():
    assert parse_request(request(0, 9, struct.pack("<I", 1))) == GetVqState(9, 1)
    assert parse_request(status(3, 0x0B)) == SetStatus(3, DeviceStatus(11))
    assert parse_request(request(2, 4, struct.pack("<QQ", 1, (1 << 64) - 1))) == UpdateIotlb(4, 1, (1 << 64) - 1)
    assert parse_request(request(3, 5, b"")) == Unknown(5, 3)


@pytest.mark.parametrize("length", [0, 1, REQUEST_SIZE - 1, REQUEST_SIZE + 1])
def test_what_is_not_a_request_is_refused(length):
    with pytest.raises(ValueError, match=f"a request of {length} bytes"):
        parse_request(bytes(length))


def test_a_device_of_the_bus_from_its_arrival_to_its_end(machine):
    seen = []
    for number, value in enumerate((0, 1, 3, 11, 15, 0, 1)):
        task = machine.receive(status(number, value))
        seen.append(task.effect)
        assert machine.answer(task) == response(number)
    assert seen == [
        *(Effect.STOP, Effect.NONE, Effect.NONE, Effect.NEGOTIATE, Effect.START),
        *(Effect.STOP, Effect.NONE),
    ]
    assert machine.state is State.RESET


def test_a_driver_that_is_ready_at_once(machine):
    task = machine.receive(status(0, 15))
    assert task.effect is Effect.START
    machine.answer(task)
    assert machine.receive(status(1, 15)).effect is Effect.NONE


def test_features_that_will_not_do_are_answered_so_and_may_be_tried_again(machine):
    task = machine.receive(status(0, 11))
    assert machine.answer(task, ok=False) == response(0, 1)
    assert machine.receive(status(1, 11)).effect is Effect.NEGOTIATE


def test_a_start_that_failed_leaves_the_device_as_it_was(machine):
    machine.answer(machine.receive(status(0, 11)))
    machine.answer(machine.receive(status(1, 15)), ok=False)
    assert machine.state is State.NEGOTIATED
    assert machine.receive(status(2, 15)).effect is Effect.START


def test_the_state_of_virtqueues(machine):
    for index, avail in enumerate((5, 0xFFFF)):
        task = machine.receive(request(0, 7, struct.pack("<I", index)))
        assert task.effect is Effect.NONE
        assert machine.answer(task) == response(7, 0, struct.pack("<IH", index, avail))


def test_there_is_no_third_virtqueue(machine):
    assert machine.answer(machine.receive(request(0, 7, struct.pack("<I", 2)))) == response(7, 1, struct.pack("<I", 2))


def test_new_memory_matters_to_a_device_that_runs(machine):
    update = request(2, 1, struct.pack("<QQ", 0, (1 << 64) - 1))
    assert machine.receive(update).effect is Effect.NONE
    machine.resume()
    task = machine.receive(update)
    assert task.effect is Effect.REMAP
    assert machine.answer(task) == response(1)
    assert machine.state is State.RUNNING


def test_requests_of_other_versions_and_ranges_that_are_none_fail(machine):
    for data in (request(3, 8, struct.pack("<II", 0, 1)), request(2, 8, struct.pack("<QQ", 2, 1))):
        assert machine.answer(machine.receive(data)) == response(8, 1)


def test_a_device_that_was_found_running_is_not_started_again(machine):
    machine.resume()
    assert machine.receive(status(0, 15)).effect is Effect.NONE
    assert machine.receive(status(1, 0)).effect is Effect.STOP


@given(st.lists(st.tuples(st.binary(min_size=REQUEST_SIZE, max_size=REQUEST_SIZE), st.integers(0, 3), st.booleans())))
def test_whatever_comes_is_answered_with_its_number(requests):
    machine = Machine([Queue(0)])
    for data, kind, ok in requests:
        data = struct.pack("<I", kind) + data[4:]
        task = machine.receive(data)
        answer = machine.answer(task, ok=ok)
        assert len(answer) == RESPONSE_SIZE
        assert answer[:4] == data[4:8]
        assert answer[8:24] == bytes(16)
        assert struct.unpack_from("<I", answer, 4)[0] == int(not (ok and task.valid))
