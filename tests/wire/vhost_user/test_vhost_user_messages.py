"""Vhost-user messages, against what QEMU 10.0 and libblkio really send (fuzz/corpus/vhost_user)."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import MAX_FDS, MAX_PAYLOAD, BackendRequest, Request
from blkferry.wire.vhost_user.messages import (
    FORMS,
    HEADER,
    Message,
    Receiver,
    build,
    build_backend_request,
    build_reply,
)
from blkferry.wire.vhost_user.payloads import ProtocolError

CORPUS = Path(__file__).parents[3] / "fuzz" / "corpus" / "vhost_user"


def conversation(name: str) -> list[tuple[int, bytes]]:
    """How many descriptors came with each message, and its bytes."""
    lines = (line.split() for line in (CORPUS / name).read_text().splitlines())
    return [(int(fds), bytes.fromhex(data)) for fds, data in lines]


def receive(receiver: Receiver, data: bytes, fds: tuple[int, ...], step: int = MAX_PAYLOAD) -> list[Message]:
    """Give it all the data, at most `step` bytes at a time; the descriptors come with the first."""
    found = []
    while data:
        count = min(receiver.wanted, step)
        message = receiver.receive(data[:count], fds)
        data, fds = data[count:], ()
        if message is not None:
            found.append(message)
    return found


def parse(data: bytes, fds: int = 0) -> Message:
    (message,) = receive(Receiver(), data, tuple(range(100, 100 + fds)))
    return message


@pytest.mark.parametrize("name", ["qemu.txt", "libblkio.txt"])
@pytest.mark.parametrize("step", [1, 5, MAX_PAYLOAD])
def test_what_front_ends_say(name, step):
    said = conversation(name)
    assert len(said) > 15
    receiver = Receiver()
    for fds, data in said:
        descriptors = tuple(range(100, 100 + fds))
        (message,) = receive(receiver, data, descriptors, step)
        assert receiver.empty
        assert message.fds == descriptors
        assert build(message.request, message.payload, need_reply=message.need_reply) == data


def test_a_conversation_in_words():
    said = [parse(data, fds) for fds, data in conversation("libblkio.txt")]
    assert [message.request.name for message in said[:8]] == [
        *("SET_OWNER", "GET_FEATURES", "SET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"),
        *("GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS", "GET_CONFIG"),
    ]
    assert said[2].payload == wire.U64(0x160007E46)
    assert said[7].payload == wire.Config(0, 0, bytes(60))
    (region,) = said[10].payload
    assert (region.guest_start, region.length, region.mmap_offset) == (
        region.user_start,
        said[10].payload.region.length,
        0,
    )
    assert said[14].payload == wire.VringFd(0, has_fd=True)


def u64s(*values: int) -> str:
    return "".join(f"{value:02x}00000000000000" for value in values)


@pytest.mark.parametrize(
    ("payload", "data"),
    [
        (wire.U64(0x1234), "3412000000000000"),
        (wire.VringFd(7, has_fd=False), "0701000000000000"),
        (wire.VringState(1, 0x80008000), "0100000000800080"),
        (wire.VringAddr(2, 1, 3, 4, 5, 6), "0200000001000000" + u64s(3, 4, 5, 6)),
        (
            wire.MemoryTable((wire.MemoryRegion(1, 2, 3, 4),)),
            "0100000000000000" + u64s(1, 2, 3, 4),
        ),
        (wire.SingleRegion(wire.MemoryRegion(1, 2, 3, 4)), u64s(0, 1, 2, 3, 4)),
        (wire.Log(4096, 8192), "00100000000000000020000000000000"),
        (wire.Config(32, 0, b"\1"), "20000000010000000000000001"),
        (wire.Inflight(64, 0, 2, 128), "400000000000000000000000000000000200800000000000"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_payloads(payload, data):
    assert payload.build().hex() == data
    assert type(payload).parse(bytes.fromhex(data)) == payload


def test_replies_and_requests_of_ours():
    assert build_reply(Request.GET_QUEUE_NUM, wire.U64(4)).hex() == "1100000005000000080000000400000000000000"
    assert build_backend_request(BackendRequest.CONFIG_CHANGE_MSG).hex() == "020000000100000000000000"


def test_the_unpadded_description_of_what_is_in_flight():
    assert wire.Inflight.parse(wire.Inflight(64, 0, 2, 128).build()[:20]) == wire.Inflight(64, 0, 2, 128)


def message(request: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return HEADER.pack(request, flags, len(payload)) + payload


REGION = wire.REGION.pack(0, 4096, 0, 0)


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (message(1, flags=2), 0, "a message has version 2 instead of 1"),
        (message(1, flags=5), 0, "a message (1) is a reply, which nobody asked for"),
        (
            HEADER.pack(25, 1, MAX_PAYLOAD + 1),
            0,
            f"{MAX_PAYLOAD + 1} bytes, above {MAX_PAYLOAD}",
        ),
        (message(200), 0, "request 200 is unknown"),
        (message(19, bytes(8)), 0, "request 19 is unknown"),
        (message(1, bytes(8)), 0, "GET_FEATURES has 8 bytes of payload instead of none"),
        (message(2, bytes(4)), 0, "SET_FEATURES has 4 bytes of payload"),
        (message(1), 1, "1 descriptors come with GET_FEATURES"),
        (message(3), MAX_FDS + 1, f"{MAX_FDS + 1} descriptors come with one message"),
        (message(21), 0, "0 descriptors come with SET_BACKEND_REQ_FD"),
        (message(12, wire.NUMBER.pack(0x200)), 0, "0x200 is no vring's index and flag"),
        (message(12, wire.NUMBER.pack(0x100)), 1, "1 descriptors come with SET_VRING_KICK"),
        (message(12, wire.NUMBER.pack(0)), 0, "0 descriptors come with SET_VRING_KICK"),
        (message(9, wire.ADDRESSES.pack(3, 2, 0, 0, 0, 0)), 0, "vring 3 has flags 0x2"),
        (message(5, bytes(4)), 0, "a memory table has 4 bytes"),
        (message(5, wire.TABLE.pack(9, 0) + REGION * 9), 8, "a memory table has 9 regions, more than 8"),
        (message(5, wire.TABLE.pack(2, 0) + REGION), 2, "a memory table of 2 regions has 40 bytes"),
        (message(5, wire.TABLE.pack(2, 0) + REGION * 2), 1, "1 descriptors come with SET_MEM_TABLE"),
        (message(37, wire.SINGLE.pack(0, 4096, 0, 0, 0)), 1, "the memory region at 0x1000 is empty"),
        (message(37, wire.SINGLE.pack(0, 1 << 63, 1 << 63 | 1, 0, 0)), 1, "overflows"),
        (message(37, wire.SINGLE.pack(0, 0, 4096, 0, (1 << 64) - 1)), 1, "overflows"),
        (message(6, wire.LOG.pack(1 << 63, 1 << 63 | 1)), 1, "overflows"),
        (message(24, bytes(8)), 0, "a request about the configuration space has 8 bytes"),
        (message(24, wire.CONFIG.pack(0, 60, 0)), 0, "0 bytes come for 60 of the configuration space"),
        (message(31, bytes(16)), 0, "a description of what is in flight has 16 bytes"),
        (message(32, wire.INFLIGHT.pack(1 << 63, 1 << 63 | 1, 1, 1)), 1, "overflows"),
    ],
)
def test_what_breaks_the_protocol(data, fds, why):
    receiver = Receiver()
    with pytest.raises(ProtocolError) as error:
        receive(receiver, data, tuple(range(fds)))
    assert error.value.message.endswith(why)
    assert len(receiver.fds) == fds  # they are still to be closed


def test_every_request_has_a_form():
    assert set(FORMS) == set(Request)


@given(st.binary(max_size=200))
def test_any_junk_is_messages_or_an_error(data):
    receiver = Receiver()
    try:
        receive(receiver, data, ())
    except ProtocolError:
        return
    assert receiver.wanted > 0
