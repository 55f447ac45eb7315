"""The hot loop's view of requests and replies is the plain one's."""

from hypothesis import given
from hypothesis import strategies as st

from blkferry.wire.nbd import codec
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Mode

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
MODES = st.sampled_from(Mode)


@given(mode=MODES, flags=U16, kind=U16, cookie=U64, offset=U64, length=U32)
def test_a_request_is_the_same_request(mode, flags, kind, cookie, offset, length):
    plain = wire.Request(flags, kind, cookie, offset, length)
    data = plain.build(mode)
    fast = codec.FAST[mode]
    head, *rest = fast.unpack(data, 0)
    assert fast.header == len(data)
    assert codec.is_request(mode, head)
    assert codec.head(mode, plain) == head
    assert codec.request(head, *rest) == plain == wire.Request.parse(data, mode)
    assert (head == fast.read_head) == (kind == Cmd.READ and flags == 0)
    assert (head == fast.read_df_head) == (mode is not Mode.SIMPLE and kind == Cmd.READ and flags == CmdFlag.DF)
    write_flags = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0
    assert (head == fast.write_head) == (kind == Cmd.WRITE and flags == write_flags)


@given(mode=MODES, magic=U32, data=st.binary(min_size=24, max_size=24))
def test_anything_but_the_magic_is_no_request(mode, magic, data):
    raw = magic.to_bytes(4, "big") + data + bytes(4)
    head, *_ = codec.FAST[mode].unpack(raw, 0)
    assert codec.is_request(mode, head) == (magic == wire.REQUEST_LAYOUT[mode][0])


@given(mode=MODES, cookie=U64, offset=U64, length=st.integers(1, 4096) | st.integers(1, 32 << 20))
def test_a_data_header_is_the_same_header(mode, cookie, offset, length):
    request = wire.Request(0, Cmd.READ, cookie, offset, length)
    fast = codec.FAST[mode]
    out = bytearray(fast.data_header)
    values = {
        Mode.SIMPLE: (),
        Mode.STRUCTURED: (length + 8, offset),
        Mode.EXTENDED: (offset, length + 8, offset),
    }[mode]
    fast.pack_data(out, 0, fast.data_prefix, cookie.to_bytes(8, "big"), *values)
    assert out == wire.data_header(mode, request, offset, length, done=True)
    if length <= 4096:
        assert codec.data_reply(mode, cookie.to_bytes(8, "big"), offset, length) == out + bytes(length)


@given(mode=MODES, cookie=U64, offset=U64)
def test_a_write_reply_is_the_same_reply(mode, cookie, offset):
    request = wire.Request(0, Cmd.WRITE, cookie, offset, 512)
    assert codec.write_reply(mode, cookie.to_bytes(8, "big"), offset) == wire.success_reply(mode, request)
