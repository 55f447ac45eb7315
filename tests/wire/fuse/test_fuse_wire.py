"""FUSE messages: what Linux 6.18 sent and took, bounds, and what the negotiation makes of other kernels."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.wire.fuse import init, replies
from blkferry.wire.fuse.constants import MINOR, OLDEST_MINOR, Fattr, InitFlag, Opcode
from blkferry.wire.fuse.replies import ERRNO_OF_KIND, Attributes, errno_of
from blkferry.wire.fuse.requests import (
    HEAD,
    IN_HEADER,
    READ_SIZE,
    Fallocate,
    Flush,
    Fsync,
    Getattr,
    InHeader,
    Init,
    Interrupt,
    Lseek,
    Open,
    ProtocolError,
    Release,
    Setattr,
    Statx,
    Transfer,
    parse,
)

CAPTURED = Path(__file__).parents[3] / "fuzz" / "corpus" / "fuse" / "linux-6.18.bin"
INIT_IN = Init(7, 45, 1 << 17, 0x73FFFFFB, 0x5FD)
ATTRIBUTES = Attributes(
    size=1 << 20,
    blocks=8,
    atime=1_795_597_267_000_000_001,
    mtime=1_795_597_268_000_000_002,
    ctime=1_795_597_269_000_000_003,
    mode=stat.S_IFREG | 0o640,
    uid=12,
    gid=34,
    blksize=4096,
)


def message(opcode, body="", unique=0x0A):
    """A message as the kernel had it: the header with inode 1 and process 0x2248, and what follows in hex."""
    payload = bytes.fromhex(body)
    return IN_HEADER.pack(IN_HEADER.size + len(payload), opcode, unique, 1, 0, 0, 0x2248, 0, 0) + payload


@pytest.mark.parametrize(
    ("opcode", "payload", "body"),
    [
        (Opcode.INIT, "070000002d00000000000200fbffff73fd050000" + "00" * 44, INIT_IN),
        (Opcode.INIT, "070000001f00000000000200fbffff73", Init(7, 31, 1 << 17, 0x73FFFFFB, 0)),
        (Opcode.GETATTR, "01000000000000000300000000000000", Getattr(1, 0, 3)),
        (Opcode.OPEN, "0280000000000000", Open(os.O_RDWR | 0x8000, 0)),
        (
            Opcode.READ,
            "0100000000000000000200000000000064000000020000002f216418b70610db0280000000000000",
            Transfer(1, 512, 100, 2, 0xDB1006B71864212F, 0x8002),
        ),
        (Opcode.LSEEK, "010000000000000000100000000000000300000000000000", Lseek(1, 4096, os.SEEK_DATA)),
        (
            Opcode.FALLOCATE,
            "0100000000000000001000000000000000200000000000000300000000000000",
            Fallocate(1, 4096, 8192, 3),
        ),
        (
            Opcode.SETATTR,
            "480200000000000001000000000000000000010000000000" + "2f216418b70610db" + "00" * 56,
            Setattr(Fattr.SIZE | Fattr.FH | Fattr.LOCKOWNER, 1, 65536, 0xDB1006B71864212F, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        ),
        (
            Opcode.SETATTR,
            "0700000000000000" + "00" * 60 + "a0810000" + "00000000" + "0c000000" + "22000000" + "00000000",
            Setattr(Fattr.MODE | Fattr.UID | Fattr.GID, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o100640, 12, 34),
        ),
        (Opcode.FSYNC, "01000000000000000100000000000000", Fsync(1, 1)),
        (Opcode.STATX, "0000000000000000000000000000000000000000ff0f0000", Statx(0, 0, 0, 0xFFF)),
        (
            Opcode.FLUSH,
            "010000000000000000000000000000002f216418b70610db",
            Flush(1, 0xDB1006B71864212F),
        ),
        (Opcode.RELEASE, "010000000000000002800000000000000000000000000000", Release(1, 0x8002, 0, 0)),
        (Opcode.INTERRUPT, "0c00000000000000", Interrupt(12)),
        (Opcode.STATFS, "", None),
        (Opcode.GETXATTR, "000000000000000073656375726974792e6361706162696c69747900", None),
    ],
)
def test_requests_of_the_kernel(opcode, payload, body):
    data = message(opcode, payload)
    request = parse(memoryview(data))
    assert request.header == InHeader(len(data), opcode, 10, 1, 0, 0, 0x2248, 0, 0)
    assert request.body == body
    assert not request.data


def test_a_write_brings_its_data():
    head = "0100000000000000000200000000000006000000020000002f216418b70610db0280000000000000"
    request = parse(memoryview(message(Opcode.WRITE, head + b"vector".hex())))
    assert request.body == Transfer(1, 512, 6, 2, 0xDB1006B71864212F, 0x8002)
    assert request.data == b"vector"


def test_all_that_a_session_of_the_kernel_had():
    data, seen = memoryview(CAPTURED.read_bytes()), set()
    while data:
        length = struct.unpack_from("=I", data)[0]
        seen.add(parse(data[:length]).header.opcode)
        data = data[length:]
    assert {Opcode.INIT, Opcode.READ, Opcode.WRITE, Opcode.STATX, Opcode.COPY_FILE_RANGE_64} <= seen


@given(st.integers(0, 1 << 62), st.integers(0, 1 << 20), st.integers(1, (1 << 63) - 1))
def test_the_hot_loop_reads_the_same(offset, size, unique):
    body = struct.pack("=QQIIQI4x", 7, offset, size, 0, 0, 0)
    data = message(Opcode.READ, body.hex(), unique)
    header, transfer, _ = parse(memoryview(data))
    assert len(data) == READ_SIZE
    assert HEAD.unpack_from(data) == (
        *(header.length, header.opcode, header.unique, header.nodeid),
        *(transfer.fh, transfer.offset, transfer.size),
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        message(Opcode.GETATTR, "00" * 16)[:39],
        message(Opcode.GETATTR, "00" * 15),
        message(Opcode.GETATTR, "00" * 17),
        message(Opcode.INIT, "00" * 15),
        message(Opcode.READ, "00" * 41),
        message(Opcode.WRITE, "00" * 41),
        message(Opcode.WRITE, "00" * 16 + "02000000" + "00" * 20 + "aa"),
        message(Opcode.STATFS) + b"x",
    ],
    ids=len,
)
def test_messages_that_do_not_fit_are_refused(data):
    with pytest.raises(ProtocolError) as caught:
        parse(memoryview(data))
    assert caught.value.unique in (0, 10)


@given(st.binary(max_size=200))
def test_junk_is_refused_or_understood(data):
    try:
        request = parse(memoryview(data))
    except ProtocolError:
        return
    assert request.header.length == len(data)


# INIT ----------------------------------------------------------------------------------------------------------------


def test_what_a_kernel_of_today_is_answered():
    reply, agreed = init.answer(2, INIT_IN, page_size=4096, passthrough=False)
    wanted = "50000000000000000200000000000000070000002d0000000000020029804440"
    assert reply.hex().startswith(wanted)
    assert len(reply) == 80
    major_minor, background, max_write, max_pages = (reply[16:24], reply[32:36], reply[36:40], reply[44:46])
    assert struct.unpack("=II", major_minor) == (7, 45)
    assert struct.unpack("=HH", background) == (256, 192)
    assert struct.unpack("=I", max_write) == (1 << 20,)
    assert struct.unpack("=H", max_pages) == (256,)
    assert struct.unpack("=II", reply[48:56]) == (1 << (36 - 32), 0)
    assert agreed.minor == MINOR
    assert InitFlag.ASYNC_DIO | InitFlag.DIRECT_IO_ALLOW_MMAP in agreed.flags


def test_passthrough_is_taken_where_it_is_offered():
    reply, agreed = init.answer(2, INIT_IN, page_size=4096, passthrough=True)
    assert InitFlag.PASSTHROUGH in agreed.flags
    assert struct.unpack("=II", reply[48:56]) == (1 << (36 - 32) | 1 << (37 - 32), 1)
    reply, agreed = init.answer(2, INIT_IN._replace(flags2=0), page_size=4096, passthrough=True)
    assert InitFlag.PASSTHROUGH not in agreed.flags
    assert struct.unpack("=II", reply[48:56]) == (0, 0)


def test_older_and_newer_kernels():
    assert init.too_old(Init(6, 99, 0, 0, 0))
    assert init.too_old(Init(7, OLDEST_MINOR - 1, 0, 0, 0))
    assert not init.too_old(Init(7, OLDEST_MINOR, 0, 0, 0))
    _, agreed = init.answer(2, Init(7, OLDEST_MINOR, 0, 0, 0), page_size=4096, passthrough=False)
    assert agreed == (OLDEST_MINOR, InitFlag(0))
    reply, agreed = init.answer(2, Init(8, 0, 0, 0, 0), page_size=4096, passthrough=False)
    assert agreed is None
    assert struct.unpack_from("=II", reply, 16) == (7, MINOR)


# Replies -------------------------------------------------------------------------------------------------------------


def test_attributes_by_getattr():
    reply = replies.attr_reply(4, ATTRIBUTES, 1)
    assert len(reply) == 16 + 16 + 88
    assert reply[:16] == struct.pack("=IiQ", 120, 0, 4)
    assert struct.unpack_from("=QII", reply, 16) == (1, 0, 0)
    attr = struct.unpack_from("=QQQQQQIIIIIIIIII", reply, 32)
    times = (1_795_597_267, 1_795_597_268, 1_795_597_269, 1, 2, 3)
    assert attr == (1, 1 << 20, 8, *times, stat.S_IFREG | 0o640, 1, 12, 34, 0, 4096, 0)


def test_attributes_by_statx():
    reply = replies.statx_reply(4, ATTRIBUTES, 1)
    assert len(reply) == 16 + 32 + 256
    assert struct.unpack_from("=IIQIIIHHQQQQ", reply, 48) == (
        *(0x7FF, 4096, 0, 1, 12, 34, stat.S_IFREG | 0o640, 0),
        *(1, 1 << 20, 8, 0),
    )
    assert struct.unpack_from("=" + "qIi" * 4, reply, 48 + 64) == (
        *(1_795_597_267, 1, 0, 0, 0, 0),
        *(1_795_597_269, 3, 0, 1_795_597_268, 2, 0),
    )


def test_other_replies():
    assert replies.failure(9, errno.ENOENT).hex() == "10000000feffffff0900000000000000"
    assert replies.success(9, b"ab").hex() == "120000000000000009000000000000006162"
    assert replies.open_reply(8, 1, 0x41).hex() == "2000000000000000080000000000000001000000000000004100000000000000"
    assert replies.lseek_reply(16, 4096).hex() == "180000000000000010000000000000000010000000000000"
    assert replies.statfs_reply(6, 4096, 256, 255)[16:].hex() == (
        "0001000000000000ff00000000000000ff00000000000000010000000000000000000000000000000010"
        "0000ff00000000100000" + "00" * 28
    )
    changed = replies.attributes_changed()
    assert changed.hex() == "280000000200000000000000000000000100000000000000ffffffffffffffff0000000000000000"


def test_every_kind_of_error_has_its_errno():
    assert set(ERRNO_OF_KIND) == set(ErrorKind)
    assert errno_of(Error(ErrorKind.NO_SPACE, "full")) == errno.ENOSPC
    assert errno_of(Error.from_oserror("no", OSError(errno.EFBIG, "too big"))) == errno.EFBIG
