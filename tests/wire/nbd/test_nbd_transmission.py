"""Requests and replies: layouts against the specification's bytes, and the rules a request must obey."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import ErrorKind
from blkferry.wire.nbd.constants import (
    CHUNK_ERROR_BIT,
    MAX_REQUEST,
    MAX_STRING,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    StatusFlag,
)
from blkferry.wire.nbd.transmission import (
    ERRNO_OF_KIND,
    EXTENDED_DATA,
    STRUCTURED_DATA,
    VALID_FLAGS,
    ProtocolError,
    Refusal,
    Request,
    StatusFilter,
    check,
    cut,
    data_header,
    error_reply,
    hole_chunk,
    max_status_filter,
    merge_extents,
    parse_status_filter,
    simple_reply,
    status_chunk,
    success_reply,
    wire_errno,
)

SIZE = 1 << 30
READ = Request(0, Cmd.READ, 0x1122334455667788, 0x10000, 0x1000)
STATUS = READ._replace(type=Cmd.BLOCK_STATUS)
CHUNKED = [Mode.STRUCTURED, Mode.EXTENDED]


# --- Requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "vector"),
    [
        (Mode.SIMPLE, "25609513 0000 0000 1122334455667788 0000000000010000 00001000"),
        (Mode.STRUCTURED, "25609513 0000 0000 1122334455667788 0000000000010000 00001000"),
        (Mode.EXTENDED, "21e41c71 0000 0000 1122334455667788 0000000000010000 0000000000001000"),
    ],
)
def test_request_golden_vectors(mode, vector):
    data = bytes.fromhex(vector)
    assert Request.parse(data, mode) == READ
    assert READ.build(mode) == data
    assert Request.parse(memoryview(data + b"the next request"), mode) == READ


REQUESTS = st.builds(
    Request,
    st.integers(0, 0xFFFF),
    st.one_of(st.sampled_from(Cmd), st.integers(0, 0xFFFF)),
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, 2 * SIZE), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 2 * SIZE), st.integers(0, 2**32 - 1)),
)
MODES = st.sampled_from(Mode)


@given(REQUESTS, MODES)
def test_requests_round_trip(request_, mode):
    assert Request.parse(request_.build(mode), mode) == request_


@pytest.mark.parametrize("mode", Mode)
def test_a_wrong_magic_or_a_short_header_is_a_protocol_error(mode):
    data = READ.build(mode)
    with pytest.raises(ProtocolError, match="magic"):
        Request.parse(b"\0" + data[1:], mode)
    other = Mode.SIMPLE if mode is Mode.EXTENDED else Mode.EXTENDED
    with pytest.raises(ProtocolError):
        Request.parse(READ.build(other), mode)
    with pytest.raises(ProtocolError, match="bytes long"):
        Request.parse(data[:-1], mode)


@given(st.binary(max_size=40), MODES)
def test_junk_is_a_request_or_a_protocol_error(data, mode):
    try:
        request = Request.parse(data, mode)
    except ProtocolError:
        return
    assert data.startswith(request.build(mode))


@pytest.mark.parametrize(
    ("mode", "command", "flags", "follows"),
    [
        (Mode.SIMPLE, Cmd.WRITE, 0, True),
        (Mode.EXTENDED, Cmd.WRITE, CmdFlag.PAYLOAD_LEN, True),
        (Mode.EXTENDED, Cmd.WRITE, 0, True),
        (Mode.EXTENDED, Cmd.BLOCK_STATUS, CmdFlag.PAYLOAD_LEN, True),
        (Mode.EXTENDED, Cmd.BLOCK_STATUS, 0, False),
        (Mode.EXTENDED, 99, CmdFlag.PAYLOAD_LEN, True),
        (Mode.STRUCTURED, Cmd.BLOCK_STATUS, CmdFlag.PAYLOAD_LEN, False),
        (Mode.STRUCTURED, Cmd.READ, 0, False),
        (Mode.SIMPLE, Cmd.WRITE_ZEROES, 0, False),
    ],
)
def test_what_follows_a_header(mode, command, flags, follows):
    request = Request(flags, command, 0, 0, 512)
    assert request.payload_length(mode) == (512 if follows else 0)


# --- Rules -----------------------------------------------------------------------------------------


def refusal(command, offset=0, length=512, flags=0, *, mode=Mode.EXTENDED, read_only=False, selected=(0,)):
    request = Request(flags, command, 1, offset, length)
    return check(request, size=SIZE, read_only=read_only, mode=mode, selected=selected)


@pytest.mark.parametrize("command", Cmd)
@pytest.mark.parametrize("mode", Mode)
def test_a_plain_request_is_fine_up_to_the_end(command, mode):
    assert refusal(command, SIZE - 512, mode=mode) is None
    assert refusal(command, SIZE - 512, flags=CmdFlag.FUA, mode=mode) is None


@pytest.mark.parametrize("command", [8, 99, 0xFFFF])
def test_unknown_commands(command):
    assert refusal(command) == (Errno.EINVAL, f"invalid request type ({command}) received")


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.CACHE])
def test_requests_over_32_mib(command):
    assert refusal(command, length=MAX_REQUEST) is None
    too_long = (Errno.EINVAL, "len (33554433) is larger than max len (33554432)")
    assert refusal(command, length=MAX_REQUEST + 1) == too_long
    assert refusal(command, length=MAX_REQUEST + 1, read_only=True) == too_long, "size comes first"


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, Cmd.FLUSH])
def test_what_carries_no_data_has_no_limit_but_the_end(command):
    assert refusal(command, length=SIZE) is None


@pytest.mark.parametrize("command", Cmd)
def test_read_only_exports(command):
    modifying = command in {Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES}
    expected = Refusal(Errno.EPERM, "Export is read-only") if modifying else None
    assert refusal(command, read_only=True) == expected
    if modifying:
        assert refusal(command, SIZE, read_only=True) == expected, "read-only comes before the bounds"


@pytest.mark.parametrize("command", set(Cmd) - {Cmd.DISC})
@pytest.mark.parametrize(("offset", "length"), [(SIZE - 511, 512), (SIZE + 1, 0), (2**64 - 1, 512)])
def test_requests_past_the_end(command, offset, length):
    error = Errno.ENOSPC if command in {Cmd.WRITE, Cmd.WRITE_ZEROES} else Errno.EINVAL
    text = f"operation past EOF; From: {offset}, Len: {length}, Size: {SIZE}"
    assert refusal(command, offset, length) == (error, text)
    assert refusal(command, offset, length, 0x8000) == (error, text), "the bounds come before the flags"


def test_zero_length_requests_are_fine_but_for_block_status():
    for command in (Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES):
        assert refusal(command, SIZE, 0) is None
    assert refusal(Cmd.BLOCK_STATUS, 0, 0) == (Errno.EINVAL, "need non-zero length")


def test_block_status_needs_a_context():
    expected = (Errno.EINVAL, "CMD_BLOCK_STATUS not negotiated")
    assert refusal(Cmd.BLOCK_STATUS, selected=()) == expected


ACCEPTED = {
    Cmd.READ: ({"FUA"}, {"FUA", "DF"}, {"FUA", "DF"}),
    Cmd.WRITE: ({"FUA"}, {"FUA"}, {"FUA", "PAYLOAD_LEN"}),
    Cmd.FLUSH: ({"FUA"},) * 3,
    Cmd.TRIM: ({"FUA"},) * 3,
    Cmd.CACHE: ({"FUA"},) * 3,
    Cmd.WRITE_ZEROES: ({"FUA", "NO_HOLE", "FAST_ZERO"},) * 3,
    Cmd.BLOCK_STATUS: ({"FUA", "REQ_ONE"}, {"FUA", "REQ_ONE"}, {"FUA", "REQ_ONE", "PAYLOAD_LEN"}),
}


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("command", ACCEPTED)
@pytest.mark.parametrize("bit", range(16))
def test_flags(mode, command, bit):
    flag = 1 << bit
    name = CmdFlag(flag).name if flag in list(CmdFlag) else "none"
    text = f"unsupported flags for command {command.name.lower().replace('_', ' ')} (got {flag:#x})"
    expected = None if name in ACCEPTED[command][mode] else (Errno.EINVAL, text)
    assert refusal(command, flags=flag, mode=mode) == expected


def test_disc_is_never_refused():
    assert refusal(Cmd.DISC, 2**63, 2**31, 0xFFFF, read_only=True, selected=()) is None


@given(REQUESTS, MODES, st.booleans())
def test_check_never_raises_and_what_it_passes_is_safe(request_, mode, read_only):
    refused = check(request_, size=SIZE, read_only=read_only, mode=mode, selected=(0,))
    if refused is not None:
        assert refused.text
        return
    if request_.type == Cmd.DISC:
        return
    assert request_.offset + request_.length <= SIZE
    assert request_.flags | VALID_FLAGS[mode][request_.type] == VALID_FLAGS[mode][request_.type]
    assert not read_only or request_.type not in {Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES}


# --- The payload of BLOCK_STATUS -------------------------------------------------------------------


def test_status_filter_golden_vector():
    data = bytes.fromhex("0000000200000000 00000003 00000000")
    assert StatusFilter(2 << 32, (3, 0)).build() == data
    assert parse_status_filter(data, (0, 2, 3)) == StatusFilter(2 << 32, (0, 3)), "ids in the order of replies"
    assert parse_status_filter(memoryview(data), (0, 3)) == StatusFilter(2 << 32, (0, 3))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(7),
        bytes(8),
        bytes(8) + b"\0\0\0",
        StatusFilter(512, (0, 0)).build(),
        StatusFilter(512, (0, 1)).build(),
        StatusFilter(512, (0, 2, 3, 0)).build(),
        StatusFilter(512, (0,)).build() + b"\0",
    ],
)
def test_status_filters_that_are_not_valid(payload):
    invalid = Refusal(Errno.EINVAL, "CMD_BLOCK_STATUS payload not valid")
    assert parse_status_filter(payload, (0, 2, 3)) == invalid
    assert parse_status_filter(payload, ()) == invalid


@given(st.binary(max_size=40), st.sets(st.integers(0, 5)))
def test_no_status_filter_raises(payload, selected):
    order = sorted(selected)
    parsed = parse_status_filter(payload, order)
    if isinstance(parsed, StatusFilter):
        assert len(payload) <= max_status_filter(order)
        assert list(parsed.ids) == sorted(parsed.ids)
        assert parsed.ids
        assert selected.issuperset(parsed.ids)


# --- Replies ---------------------------------------------------------------------------------------


def test_simple_reply_golden_vectors():
    assert simple_reply(READ.cookie) == bytes.fromhex("67446698 00000000 1122334455667788")
    assert simple_reply(READ.cookie, Errno.EIO) == bytes.fromhex("67446698 00000005 1122334455667788")


STRUCTURED = "668e33ef {} {} 1122334455667788 {}"
EXTENDED = "6e8a278c {} {} 1122334455667788 0000000000010000 00000000{}"


def chunk_vector(mode, flags, kind, length, payload=""):
    form = EXTENDED if mode is Mode.EXTENDED else STRUCTURED
    return bytes.fromhex(form.format(flags, kind, length) + payload)


@pytest.mark.parametrize("mode", CHUNKED)
def test_chunk_golden_vectors(mode):
    assert data_header(mode, READ, 0x10200, 512, done=False) == chunk_vector(
        mode, "0000", "0001", "00000208", "0000000000010200"
    )
    assert hole_chunk(mode, READ, 0x10400, 0xC00, done=True) == chunk_vector(
        mode, "0001", "0002", "0000000c", "0000000000010400 00000c00"
    )
    assert error_reply(mode, READ, Errno.EIO, "b\u00e4d") == chunk_vector(
        mode, "0001", "8001", "0000000a", "00000005 0004 62c3a464"
    )
    assert error_reply(mode, READ, Errno.EIO) == chunk_vector(mode, "0001", "8001", "00000006", "00000005 0000")


def test_status_golden_vectors():
    extents = [(0x200, 3), (0x400, 0)]
    assert status_chunk(Mode.STRUCTURED, STATUS, 2, extents, done=True) == chunk_vector(
        Mode.STRUCTURED, "0001", "0005", "00000014", "00000002 00000200 00000003 00000400 00000000"
    )
    assert status_chunk(Mode.EXTENDED, STATUS, 2, [(1 << 32, 3)], done=False) == chunk_vector(
        Mode.EXTENDED, "0000", "0006", "00000018", "00000002 00000001 0000000100000000 0000000000000003"
    )


@pytest.mark.parametrize("command", set(Cmd) - {Cmd.DISC})
def test_success_without_payload(command):
    request = READ._replace(type=command)
    simple = simple_reply(request.cookie)
    none = chunk_vector(Mode.STRUCTURED, "0001", "0000", "00000000")
    assert success_reply(Mode.SIMPLE, request) == simple
    assert success_reply(Mode.STRUCTURED, request) == (none if command is Cmd.READ else simple)
    assert success_reply(Mode.EXTENDED, request) == chunk_vector(Mode.EXTENDED, "0001", "0000", "00000000")


def test_simple_mode_has_no_chunks():
    assert data_header(Mode.SIMPLE, READ, READ.offset, READ.length, done=True) == simple_reply(READ.cookie)
    assert error_reply(Mode.SIMPLE, READ, Errno.EPERM, "lost") == simple_reply(READ.cookie, Errno.EPERM)


def test_hot_path_layouts_are_a_header_and_an_offset():
    structured = (0x668E33EF, 1, Chunk.OFFSET_DATA, READ.cookie, 8 + 512, 0x10200)
    assert STRUCTURED_DATA.pack(*structured) == data_header(Mode.STRUCTURED, READ, 0x10200, 512, done=True)
    extended = (0x6E8A278C, 1, Chunk.OFFSET_DATA, READ.cookie, READ.offset, 8 + 512, 0x10200)
    assert EXTENDED_DATA.pack(*extended) == data_header(Mode.EXTENDED, READ, 0x10200, 512, done=True)


def test_error_texts_are_cut_at_a_character():
    assert cut("abc", 3) == b"abc"
    assert cut("ab\u20ac", 4) == b"ab"
    assert cut("\ud800", 9) == b"?"
    reply = error_reply(Mode.STRUCTURED, READ, Errno.EIO, "\u20ac" * MAX_STRING)
    assert len(reply) == 20 + 6 + MAX_STRING - MAX_STRING % 3


def test_error_types_carry_the_error_bit():
    assert [kind for kind in Chunk if kind & CHUNK_ERROR_BIT] == [Chunk.ERROR, Chunk.ERROR_OFFSET]


# --- Extents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extents", "length", "limit", "expected"),
    [
        ([(5, 0), (5, 0), (5, 3)], 15, 9, [(10, 0), (5, 3)]),
        ([(5, 0), (5, 0), (5, 3)], 12, 9, [(10, 0), (2, 3)]),
        ([(5, 0), (5, 0), (5, 3)], 10, 9, [(10, 0)]),
        ([(5, 0), (5, 0), (5, 3)], 15, 1, [(10, 0)]),
        ([(5, 0), (0, 3), (5, 0)], 99, 9, [(10, 0)]),
        ([(100, StatusFlag.HOLE)], 7, 1, [(7, 1)]),
        ([], 7, 1, []),
    ],
)
def test_merge_extents(extents, length, limit, expected):
    assert merge_extents(extents, length=length, limit=limit) == expected


def test_merge_extents_looks_no_further_than_it_must():
    source = iter([(5, 0), (5, 1), (5, 0), (5, 1)])
    merge_extents(source, length=10, limit=9)
    assert next(source) == (5, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1))), st.integers(1, 50), st.integers(1, 5))
def test_merged_extents_describe_the_same_bytes(extents, length, limit):
    merged = merge_extents(extents, length=length, limit=limit)

    def spelt(pieces):
        return [status for size, status in pieces for _ in range(size)]

    assert spelt(extents)[: min(length, sum(size for size, _ in merged))] == spelt(merged)
    assert len(merged) <= limit
    assert all(size for size, _ in merged)
    assert all(one[1] != two[1] for one, two in itertools.pairwise(merged))
    if len(merged) < limit:
        assert len(spelt(merged)) == min(length, len(spelt(extents)))


# --- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "wire"),
    [
        (errno.EPERM, Errno.EPERM),
        (errno.EROFS, Errno.EPERM),
        (errno.EACCES, Errno.EINVAL),
        (errno.EIO, Errno.EIO),
        (errno.ENOMEM, Errno.ENOMEM),
        (errno.ENOSPC, Errno.ENOSPC),
        (errno.EDQUOT, Errno.ENOSPC),
        (errno.EFBIG, Errno.ENOSPC),
        (errno.EOVERFLOW, Errno.EOVERFLOW),
        (errno.EOPNOTSUPP, Errno.ENOTSUP),
        (errno.ESHUTDOWN, Errno.ESHUTDOWN),
        (errno.EINVAL, Errno.EINVAL),
        (0, Errno.EINVAL),
        (-5, Errno.EINVAL),
        (99999, Errno.EINVAL),
    ],
)
def test_wire_errno(host, wire):
    assert wire_errno(host) is wire


def test_every_error_kind_has_an_errno():
    assert set(ERRNO_OF_KIND) == set(ErrorKind)
