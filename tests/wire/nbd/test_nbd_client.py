"""The client's side: what it makes of a server's bytes, honest and otherwise."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.wire.nbd.client import (
    BlockSize,
    ExportSize,
    InfoText,
    OptionReply,
    build_flags,
    build_info,
    build_option,
    build_queries,
    parse_info,
    parse_meta_context,
    parse_server,
    take_export_name_reply,
    take_greeting,
    take_option_reply,
)
from blkferry.wire.nbd.constants import (
    MAX_OPTION_REPLY,
    MAX_REPLY_PAYLOAD,
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    Cmd,
    Errno,
    HandshakeFlag,
    Info,
    Mode,
    Opt,
    Rep,
    RepError,
    TransmissionFlag,
)
from blkferry.wire.nbd.replies import MAX_PARTS, MAX_STATUS_EXTENTS, Data, Failure, Hole, Replies, Reply, Status
from blkferry.wire.nbd.transmission import (
    ProtocolError,
    Request,
    chunk_header,
    data_header,
    error_reply,
    hole_chunk,
    simple_reply,
    status_chunk,
    success_reply,
)

GREETING = bytes.fromhex("4e42444d41474943 49484156454f5054 0003")
READ = Request(0, Cmd.READ, 7, 4096, 1024)
WRITE = READ._replace(type=Cmd.WRITE, cookie=8)
STATUS = READ._replace(type=Cmd.BLOCK_STATUS, cookie=9)
CHUNKED = [Mode.STRUCTURED, Mode.EXTENDED]


# --- Handshake -------------------------------------------------------------------------------------


def test_what_a_client_sends_golden_vectors():
    assert build_flags(3) == bytes.fromhex("00000003")
    assert build_option(Opt.GO, build_info("disk", [Info.NAME, Info.BLOCK_SIZE])) == bytes.fromhex(
        "49484156454f5054 00000007 0000000e 00000004 6469736b 0002 0001 0003"
    )
    assert build_option(Opt.SET_META_CONTEXT, build_queries("d", ["x:", "y"])) == bytes.fromhex(
        "49484156454f5054 0000000a 00000014 00000001 64 00000002 00000002 783a 00000001 79"
    )


def test_greeting():
    buffer = bytearray(GREETING[:-1])
    assert take_greeting(buffer) is None
    buffer += b"\x03rest"
    assert take_greeting(buffer) == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    assert buffer == b"rest"
    assert take_greeting(bytearray(GREETING[:-2] + b"\xff\xff")) == HandshakeFlag(3), "unknown flags are ignored"


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.2p1\r\n", GREETING[:8] + bytes.fromhex("00420281861253") + bytes(3)]
)
def test_what_is_not_a_newstyle_server(greeting):
    with pytest.raises(ProtocolError, match="magic"):
        take_greeting(bytearray(greeting))


def test_option_replies():
    buffer = bytearray()
    first = bytes.fromhex("0003e889045565a9 00000063 80000001 00000002") + b"no"
    for byte in first[:-1]:
        buffer.append(byte)
        assert take_option_reply(buffer) is None
    buffer += first[-1:] + bytes.fromhex("0003e889045565a9 00000002 00000001 00000000 ff")
    reply = take_option_reply(buffer)
    assert reply == OptionReply(99, RepError.UNSUP, b"no")
    assert reply.failed
    assert reply.text == "no"
    reply = take_option_reply(buffer)
    assert reply == OptionReply(Opt.ABORT, Rep.ACK, b"")
    assert not reply.failed
    assert take_option_reply(buffer) is None
    assert buffer == b"\xff"


def test_option_replies_that_cannot_be():
    with pytest.raises(ProtocolError, match="magic"):
        take_option_reply(bytearray(20))
    header = struct.pack(">QIII", OPTION_REPLY_MAGIC, Opt.LIST, Rep.SERVER, MAX_OPTION_REPLY + 1)
    with pytest.raises(ProtocolError, match=f"at most {MAX_OPTION_REPLY}"):
        take_option_reply(bytearray(header))


def test_export_name_replies():
    answer = bytes.fromhex("0000000040000000 0d6d")
    expected = ExportSize(1 << 30, TransmissionFlag(0xD6D))
    buffer = bytearray(answer)
    assert take_export_name_reply(buffer, no_zeroes=False) is None
    assert take_export_name_reply(buffer, no_zeroes=True) == expected
    assert buffer == b""
    buffer = bytearray(answer + bytes(124) + b"rest")
    assert take_export_name_reply(buffer, no_zeroes=False) == expected
    assert buffer == b"rest"


def test_payloads():
    assert parse_server(bytes.fromhex("00000001 61 6263")) == ("a", "bc")
    assert parse_server(bytes.fromhex("00000000")) == ("", "")
    assert parse_meta_context(bytes.fromhex("00000002 783a79")) == (2, "x:y")
    assert parse_info(bytes.fromhex("0000 0000000000000400 050f")) == ExportSize(1024, 0x50F)
    assert parse_info(bytes.fromhex("0003 00000001 00001000 02000000")) == BlockSize(1, 4096, 32 << 20)
    assert parse_info(bytes.fromhex("0002 6162")) == InfoText(Info.DESCRIPTION, "ab")
    assert parse_info(bytes.fromhex("0001")) == InfoText(Info.NAME, "")
    assert parse_info(bytes.fromhex("0063 6162")) is None


@pytest.mark.parametrize(
    ("parse", "payload"),
    [
        (parse_server, ""),
        (parse_server, "00000002 61"),
        (parse_server, "00000001 ff"),
        (parse_server, "00000000 c328"),
        (parse_meta_context, "000000"),
        (parse_meta_context, "00000000 ff"),
        (parse_info, "00"),
        (parse_info, "0000 0000000000000400"),
        (parse_info, "0003 00000001 00001000"),
        (parse_info, "0003 00000003 00001000 02000000"),
        (parse_info, "0003 00000000 00001000 02000000"),
        (parse_info, "0003 00002000 00001000 02000000"),
        (parse_info, "0003 00000001 00001000 00000800"),
        (parse_info, "0001 ff"),
    ],
)
def test_payloads_that_cannot_be(parse, payload):
    with pytest.raises(ProtocolError):
        parse(bytes.fromhex(payload))


def test_strings_are_bounded():
    with pytest.raises(ProtocolError, match="at most 4096"):
        parse_info(b"\0\1" + b"x" * (MAX_STRING + 1))


@given(st.binary(max_size=80), st.sampled_from(["", GREETING.hex(), "0003e889045565a9"]))
def test_junk_from_a_server_is_a_value_or_a_protocol_error(junk, prefix):
    data = bytes.fromhex(prefix) + junk
    for parse in (parse_server, parse_info, parse_meta_context):
        with contextlib.suppress(ProtocolError):
            parse(data)
    for take in (take_greeting, take_option_reply):
        buffer = bytearray(data)
        with contextlib.suppress(ProtocolError):
            taken = take(buffer)
            assert (taken is None) == (buffer == data)


# --- Transmission ----------------------------------------------------------------------------------


def replies(mode, *requests):
    stream = Replies(mode)
    for request in requests:
        stream.expect(request)
    return stream


def whole_and_bytewise(mode, requests, data):
    """The replies in `data`, which must not depend on how it is split; all requests must be answered."""
    whole = replies(mode, *requests)
    answer = whole.receive(data)
    bytewise = replies(mode, *requests)
    assert [reply for i in range(len(data)) for reply in bytewise.receive(data[i : i + 1])] == answer
    assert whole.in_flight == bytewise.in_flight == 0
    return answer


def test_simple_replies():
    payload = bytes(range(256)) * 4
    failed = READ._replace(cookie=10)
    data = (
        success_reply(Mode.SIMPLE, WRITE)
        + data_header(Mode.SIMPLE, READ, READ.offset, READ.length, done=True)
        + payload
        + error_reply(Mode.SIMPLE, failed, Errno.EIO)
    )
    assert whole_and_bytewise(Mode.SIMPLE, [READ, WRITE, failed], data) == [
        Reply(WRITE, True, None),
        Reply(READ, True, Data(READ.offset, payload)),
        Reply(failed, True, Failure(Errno.EIO, "")),
    ]


@pytest.mark.parametrize("mode", CHUNKED)
def test_chunks_of_several_requests_interleave(mode):
    data = (
        data_header(mode, READ, 4096 + 512, 256, done=False)
        + b"d" * 256
        + success_reply(mode, WRITE)
        + hole_chunk(mode, READ, 4096, 512, done=False)
        + status_chunk(mode, STATUS, 0, [(512, 3), (512, 0)], done=False)
        + data_header(mode, READ, 4096 + 768, 256, done=True)
        + b"e" * 256
        + status_chunk(mode, STATUS, 2, [(1024, 1)], done=True)
    )
    assert whole_and_bytewise(mode, [READ, WRITE, STATUS], data) == [
        Reply(READ, False, Data(4096 + 512, b"d" * 256)),
        Reply(WRITE, True, None),
        Reply(READ, False, Hole(4096, 512)),
        Reply(STATUS, False, Status(0, ((512, 3), (512, 0)))),
        Reply(READ, True, Data(4096 + 768, b"e" * 256)),
        Reply(STATUS, True, Status(2, ((1024, 1),))),
    ]


@pytest.mark.parametrize("mode", CHUNKED)
def test_errors_end_a_reply_whatever_is_missing(mode):
    with_offset = chunk_header(mode, READ, 0x8002, 17, done=False)
    with_offset += struct.pack(">IH3sQ", Errno.EIO, 3, b"bad", 4096)
    data = with_offset + error_reply(mode, READ, Errno.EIO, "reading from file failed")
    data += error_reply(mode, STATUS, Errno.EINVAL, "no")
    assert whole_and_bytewise(mode, [READ, STATUS], data) == [
        Reply(READ, False, Failure(Errno.EIO, "bad")),
        Reply(READ, True, Failure(Errno.EIO, "reading from file failed")),
        Reply(STATUS, True, Failure(Errno.EINVAL, "no")),
    ]


def test_a_read_of_nothing_is_plain_success():
    nothing = READ._replace(length=0)
    for mode in CHUNKED:
        data = success_reply(mode, nothing)
        assert whole_and_bytewise(mode, [nothing], data) == [Reply(nothing, True, None)]
    simple = simple_reply(nothing.cookie)
    assert replies(Mode.SIMPLE, nothing).receive(simple) == [Reply(nothing, True, Data(4096, b""))]


def test_a_cookie_is_free_again_after_its_reply():
    stream = replies(Mode.STRUCTURED, WRITE)
    stream.receive(simple_reply(WRITE.cookie))
    stream.expect(WRITE)
    assert stream.in_flight == 1
    with pytest.raises(AssertionError, match="in flight"):
        stream.expect(WRITE)


@pytest.mark.parametrize("mode", CHUNKED)
def test_what_is_remembered_of_a_read_does_not_grow_with_its_chunks(mode):
    long = READ._replace(length=4 * MAX_PARTS)
    chunks = [data_header(mode, long, long.offset + at, 1, done=False) + b"x" for at in range(long.length)]
    assert len(replies(mode, long).receive(b"".join(chunks))) == long.length
    assert len(replies(mode, long).receive(b"".join(reversed(chunks)))) == long.length
    stream = replies(mode, long)
    stream.receive(b"".join(chunks[: 2 * MAX_PARTS : 2]))
    with pytest.raises(ProtocolError, match=f"more than {MAX_PARTS} scattered parts"):
        stream.receive(chunks[2 * MAX_PARTS])


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_parts_come_in_any_order_and_only_once(mode, order):
    parts = [data_header(mode, READ, READ.offset + at * 256, 256, done=False) + bytes(256) for at in range(4)]
    stream = replies(mode, READ)
    for heard, number in enumerate(order):
        stream.receive(parts[number])
        for again in order[: heard + 1]:
            copy = replies(mode, READ)
            copy.receive(b"".join(parts[each] for each in order[: heard + 1]))
            with pytest.raises(ProtocolError, match="repeats what was sent before"):
                copy.receive(parts[again])
    assert stream.receive(success_reply(mode, READ)) == [Reply(READ, True, None)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_of_millions_of_extents_the_first_are_told(mode):
    data = status_chunk(mode, STATUS, 0, [(1, 3)] * (MAX_STATUS_EXTENTS + 5), done=True)
    (reply,) = replies(mode, STATUS).receive(data)
    assert reply.content == Status(0, ((1, 3),) * MAX_STATUS_EXTENTS)


S, X = Mode.STRUCTURED, Mode.EXTENDED
IMPOSSIBLE = {
    "unknown magic": (S, bytes(4)),
    "chunk in simple mode": (Mode.SIMPLE, success_reply(S, READ)),
    "simple reply in extended mode": (X, simple_reply(WRITE.cookie)),
    "structured chunk in extended mode": (X, success_reply(S, READ)),
    "extended chunk in structured mode": (S, success_reply(X, READ)),
    "simple reply to a read": (S, simple_reply(READ.cookie)),
    "simple reply to a status": (S, simple_reply(STATUS.cookie)),
    "unknown cookie, simple": (S, simple_reply(99)),
    "unknown cookie, chunk": (X, success_reply(X, READ._replace(cookie=99))),
    "wrong offset echoed": (X, success_reply(X, WRITE._replace(offset=1))),
    "huge payload": (S, chunk_header(S, READ, 1, MAX_REPLY_PAYLOAD + 1, done=True)),
    "huge payload, 64 bits": (X, chunk_header(X, READ, 1, 1 << 60, done=True)),
    "nothing done": (S, chunk_header(S, WRITE, 0, 0, done=False)),
    "none with payload": (S, chunk_header(S, WRITE, 0, 1, done=True) + b"x"),
    "unknown type": (S, chunk_header(S, READ, 3, 0, done=True)),
    "data for a write": (S, data_header(S, WRITE, 4096, 4, done=True) + b"data"),
    "data of length 0": (S, data_header(S, READ, 4096, 0, done=False)),
    "data before the request": (S, data_header(S, READ, 4095, 4, done=False) + b"data"),
    "data past the request": (S, data_header(S, READ, 5117, 4, done=False) + b"data"),
    "data twice": (S, 2 * (data_header(S, READ, 4096, 1000, done=False) + bytes(1000))),
    "data missing": (S, data_header(S, READ, 4096, 1000, done=True) + bytes(1000)),
    "read without content": (S, success_reply(S, READ)),
    "hole of length 0": (S, hole_chunk(S, READ, 4096, 0, done=False)),
    "hole too long": (S, hole_chunk(S, READ, 4096, 1025, done=False)),
    "hole of odd size": (S, chunk_header(S, READ, 2, 11, done=True) + bytes(11)),
    "error 0": (S, error_reply(S, READ, 0)),
    "error without text": (S, chunk_header(S, READ, 0x8001, 6, done=True) + b"\0\0\0\5\0\1"),
    "error too short": (S, chunk_header(S, READ, 0x8001, 5, done=True) + bytes(5)),
    "status for a read": (S, status_chunk(S, READ, 0, [(1, 0)], done=True)),
    "status without extents": (S, status_chunk(S, STATUS, 0, [], done=True)),
    "status with half an extent": (S, chunk_header(S, STATUS, 5, 16, done=True) + bytes(16)),
    "status extent of length 0": (S, status_chunk(S, STATUS, 0, [(0, 1)], done=True)),
    "narrow status in extended mode": (X, chunk_header(X, STATUS, 5, 12, done=True) + b"\1" * 12),
    "wide status in structured mode": (S, chunk_header(S, STATUS, 6, 24, done=True) + b"\1" * 24),
    "wrong extent count": (X, chunk_header(X, STATUS, 6, 24, done=True) + struct.pack(">IIQQ", 0, 2, 1, 1)),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_replies_that_cannot_be(what):
    mode, data = IMPOSSIBLE[what]
    with pytest.raises(ProtocolError):
        replies(mode, READ, WRITE, STATUS).receive(data)


@given(
    st.sampled_from(Mode),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([data for _, data in IMPOSSIBLE.values()]),
            st.sampled_from([success_reply(mode, WRITE) for mode in Mode]),
        ),
        max_size=4,
    ).map(b"".join),
)
def test_junk_replies_are_values_or_a_protocol_error(mode, data):
    def outcome(pieces):
        stream = replies(mode, READ, WRITE, STATUS)
        seen = []
        for piece in pieces:
            try:
                seen += stream.receive(piece)
            except ProtocolError as error:
                return error.message
        return seen

    assert outcome([data]) == outcome(data[i : i + 1] for i in range(len(data)))
