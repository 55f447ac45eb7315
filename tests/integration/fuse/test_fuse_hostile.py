"""A FUSE session against kernels that ask what none should, give up what they asked, or are too old or too new."""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest

from blkferry.errors import Error
from blkferry.exports.fuse import limits, session
from blkferry.testing import fault
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.fuse import Kernel
from blkferry.wire.fuse.constants import MAJOR, OLDEST_MINOR, Opcode
from blkferry.wire.fuse.init import MAX_WRITE
from blkferry.wire.fuse.requests import IN_HEADER

SIZE = 1 << 17
TRANSFER = struct.Struct("=QQIIQI4x")


@pytest.fixture
def daemon():
    with DaemonThread() as thread:
        thread.execute("blockdev-add", driver="memory", node_name="n", size=SIZE)
        yield thread


@pytest.fixture
def kernel(daemon):
    with Kernel.mount(daemon, "n") as kernel:
        yield kernel


def transfer(offset, size, data=b""):
    return TRANSFER.pack(1, offset, size, 0, 0, 0) + data


@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.WRITE])
def test_requests_that_are_larger_than_was_agreed(kernel, opcode):
    reply = kernel.ask(opcode, transfer(0, MAX_WRITE + 1))
    if opcode == Opcode.WRITE:  # it cannot have brought all that
        assert reply.error == errno.EINVAL
    else:
        assert len(reply.payload) == SIZE
    assert kernel.ask(Opcode.READ, transfer(0, 4)).payload == bytes(4)


def test_reads_at_and_far_behind_the_end(kernel):
    assert len(kernel.ask(Opcode.READ, transfer(SIZE - 10, 4096)).payload) == 10
    for offset in (SIZE, SIZE + 1, (1 << 63) - 1, (1 << 64) - 4096):
        reply = kernel.ask(Opcode.READ, transfer(offset, 4096))
        assert (reply.error, reply.payload) == (0, b"")


def test_writes_far_behind_the_end(daemon):
    with Kernel.mount(daemon, "n", growable=True) as kernel:
        assert kernel.ask(Opcode.WRITE, transfer((1 << 64) - 4, 4, b"data")).error == errno.EFBIG
        assert kernel.ask(Opcode.WRITE, transfer(SIZE, 4, b"data")).error == 0
        assert kernel.ask(Opcode.READ, transfer(SIZE, 4)).payload == b"data"


def test_writes_to_what_may_only_be_read(daemon):
    with Kernel.mount(daemon, "n", writable=False) as kernel:
        assert kernel.ask(Opcode.WRITE, transfer(0, 4, b"data")).error == errno.EACCES
        assert kernel.ask(Opcode.FALLOCATE, struct.pack("=QQQI4x", 1, 0, 4096, 3)).error == errno.EACCES


def test_another_inode_and_unknown_requests(kernel):
    assert kernel.ask(Opcode.GETATTR, bytes(16), nodeid=2).error == errno.ESTALE
    assert kernel.ask(Opcode.READ, transfer(0, 4096), nodeid=2).error == errno.ESTALE
    assert kernel.ask(Opcode.LOOKUP, b"name\0").error == errno.ENOENT
    assert kernel.ask(9999, b"what?").error == errno.ENOSYS
    assert kernel.agree().error == errno.EIO


def test_a_message_that_lies_about_its_length(kernel):
    for length in (0, 39, 1 << 31):
        kernel.send_message(IN_HEADER.pack(length, Opcode.GETATTR, 77, 1, 0, 0, 0, 0, 0) + bytes(16))
        assert kernel.receive()[:2] == (77, errno.EINVAL)
    kernel.send_message(b"short")
    assert not kernel.ask(Opcode.STATFS).error


@pytest.mark.parametrize(("major", "minor"), [(MAJOR, OLDEST_MINOR - 1), (MAJOR - 1, 99)])
def test_a_kernel_that_is_too_old(daemon, monkeypatch, major, minor):
    agree = Kernel.agree
    monkeypatch.setattr(Kernel, "agree", lambda kernel: agree(kernel, major=major, minor=minor))
    with pytest.raises(Error, match="did not agree") as caught:
        Kernel.mount(daemon, "n")
    assert caught.value.hint == "It takes Linux 5.4 or newer."


def test_a_later_major_version_asks_again(daemon, monkeypatch):
    first = Kernel.agree

    def agree_twice(kernel):
        reply = first(kernel, major=MAJOR + 1, minor=0)
        assert struct.unpack_from("=I", reply.payload)[0] == MAJOR
        return first(kernel)

    monkeypatch.setattr(Kernel, "agree", agree_twice)
    with Kernel.mount(daemon, "n") as kernel:
        assert not kernel.ask(Opcode.STATFS).error


@pytest.fixture
def slow(daemon):
    """A node whose reads and writes wait for `gate`."""
    daemon.execute("blockdev-add", driver="memory", node_name="below", size=SIZE)

    async def insert():
        node = fault.insert(daemon.daemon.graph, "slow", "below")
        node.gates = {"read": asyncio.Event(), "write": asyncio.Event()}
        return node

    node = daemon.call(insert)

    def open_gates():
        daemon.loop.call_soon_threadsafe(lambda: [gate.set() for gate in node.gates.values()])

    node.open_gates = open_gates
    yield node
    open_gates()


def test_requests_in_flight_keep_their_own_data(daemon, slow):
    """What QEMU 10.0 does not: its second write overwrites the first one's data."""
    with Kernel.mount(daemon, "slow") as kernel:
        parts = [bytes([number]) * 8192 for number in range(1, 9)]
        asked = {kernel.send(Opcode.WRITE, transfer(8192 * at, 8192, part)) for at, part in enumerate(parts)}
        slow.open_gates()
        assert {kernel.receive().unique for _ in parts} == asked
        assert kernel.ask(Opcode.READ, transfer(0, 65536)).payload == b"".join(parts)


def test_an_interrupted_request_is_given_up_after_a_while(daemon, slow, monkeypatch):
    monkeypatch.setattr(session, "INTERRUPT_SECONDS", 0.05)
    assert limits.INTERRUPT_SECONDS > 0.05
    with Kernel.mount(daemon, "slow") as kernel:
        read = kernel.send(Opcode.READ, transfer(0, 4096))
        kernel.send(Opcode.INTERRUPT, struct.pack("=Q", read))
        assert kernel.receive() == (read, errno.EINTR, b"")
        slow.open_gates()
        assert kernel.ask(Opcode.READ, transfer(0, 4)).payload == bytes(4)
        with pytest.raises(TimeoutError):  # the first read's result is dropped
            kernel.receive(0.05)


def test_a_quick_request_does_not_mind_an_interrupt(kernel):
    read = kernel.send(Opcode.READ, transfer(0, 16))
    kernel.send(Opcode.INTERRUPT, struct.pack("=Q", read))
    kernel.send(Opcode.INTERRUPT, struct.pack("=Q", 12345678))
    assert kernel.receive() == (read, 0, bytes(16))


def test_unmounted_while_requests_wait(daemon, slow):
    kernel = Kernel.mount(daemon, "slow")
    for number in range(100):
        kernel.send(Opcode.READ, transfer(number, 16))
    kernel.send(Opcode.STATFS)
    slow.open_gates()
    kernel.close()
