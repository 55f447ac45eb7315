"""The driver's reading of replies: however the stream is cut into pieces, the bytes are where they belong."""

from __future__ import annotations

import random

import pytest

from blkferry.drivers.nbd.answers import MAX_TAIL, Answers, Call
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import Cmd, Errno, Mode
from blkferry.wire.nbd.transmission import ProtocolError, Request

SIZE = 4 << 20
DISK = random.Random(1).randbytes(SIZE)
CONTEXT = 7
MODES = pytest.mark.parametrize("mode", list(Mode))


def data_reply(mode: Mode, request: Request) -> bytes:
    end = request.offset + request.length
    return wire.data_header(mode, request, request.offset, request.length, done=True) + DISK[request.offset : end]


def split_reply(mode: Mode, request: Request) -> list[bytes]:
    """Two chunks of data, the second one first."""
    half = request.length // 2
    middle, end = request.offset + half, request.offset + request.length
    second = wire.data_header(mode, request, middle, end - middle, done=False) + DISK[middle:end]
    first = wire.data_header(mode, request, request.offset, half, done=True) + DISK[request.offset : middle]
    return [second, first]


def answered(mode: Mode, request: Request, chance: random.Random) -> tuple[list[bytes], int]:
    """The messages that answer a request, and the error they mean."""
    if chance.random() < 0.1:
        return [wire.error_reply(mode, request, Errno.ENOSPC, "full")], Errno.ENOSPC
    match request.type:
        case Cmd.READ if mode is not Mode.SIMPLE and chance.random() < 0.2:
            return split_reply(mode, request), 0
        case Cmd.READ:
            return [data_reply(mode, request)], 0
        case Cmd.BLOCK_STATUS:
            return [wire.status_chunk(mode, request, CONTEXT, [(request.length, 3)], done=True)], 0
        case _:
            return [wire.success_reply(mode, request)], 0


class Asked(Call):
    """A call that keeps what it was told."""

    def __init__(self, request: Request) -> None:
        self.told: list[int] = []
        view = memoryview(bytearray(request.length)) if request.type == Cmd.READ else None
        super().__init__(request.type, request.offset, request.length, view, self.told.append)


def feed(answers: Answers, stream: bytes, chance: random.Random, most: int) -> None:
    """Give the stream as a socket would, with what was left coming again."""
    tail = b""
    while stream:
        count = chance.randint(1, most)
        have = tail + stream[:count]
        stream = stream[count:]
        left = answers.receive(memoryview(have))
        assert left <= MAX_TAIL
        tail = have[len(have) - left :]
    assert not tail


@MODES
@pytest.mark.parametrize("most", [40, 5000, 300_000])
@pytest.mark.parametrize("seed", range(4))
def test_any_replies_cut_anywhere(mode, most, seed):
    chance = random.Random(seed)
    commands = [Cmd.READ, Cmd.WRITE, Cmd.FLUSH] + ([] if mode is Mode.SIMPLE else [Cmd.BLOCK_STATUS])
    answers = Answers(mode, CONTEXT)
    calls: list[tuple[Request, Asked, int]] = []
    messages: list[list[bytes]] = []
    for cookie in range(1, 60):
        length = chance.choice([2, 512, 4096, 70_000] + ([200_000] if most > 40 else []))
        request = Request(0, chance.choice(commands), cookie, chance.randrange(SIZE - length), length)
        said, error = answered(mode, request, chance)
        answers.calls[cookie] = call = Asked(request)
        calls.append((request, call, error))
        messages.append(said)
    stream = b""
    while messages:  # those of one reply stay in order, replies come as they like
        said = chance.choice(messages)
        stream += said.pop(0)
        if not said:
            messages.remove(said)
    feed(answers, stream, chance, most)
    assert not answers.calls
    assert not answers._replies.in_flight
    for request, call, error in calls:
        assert call.told == [-error]
        if request.type == Cmd.READ and not error:
            assert call.view == DISK[request.offset : request.offset + request.length]
        if request.type == Cmd.BLOCK_STATUS and not error:
            assert call.extents == ((request.length, 3),)


@MODES
def test_a_stream_out_of_step_is_noticed_wherever_that_is(mode):
    """Each byte of a header changed in turn: an error, or a call that is not done; never a call with wrong bytes."""
    request = Request(0, Cmd.READ, 1, 4096, 512)
    good = data_reply(mode, request)
    for at in range(len(good) - request.length):
        bad = bytearray(good)
        bad[at] ^= 0x40
        answers = Answers(mode, CONTEXT)
        answers.calls[1] = call = Asked(request)
        try:
            answers.receive(memoryview(bad))
        except ProtocolError:
            assert not call.told
        else:
            assert call.error or not call.told or call.view == DISK[4096:4608]


def test_a_simple_reply_among_chunks_does_not_wait_for_more():
    """It is shorter than the header of a chunk."""
    answers = Answers(Mode.STRUCTURED, CONTEXT)
    answers.calls[1] = call = Asked(Request(0, Cmd.WRITE, 1, 0, 512))
    assert answers.receive(memoryview(wire.simple_reply(1))) == 0
    assert call.told == [0]


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
def test_what_was_answered_in_part_is_not_answered_as_a_whole(mode):
    request = Request(0, Cmd.READ, 1, 4096, 512)
    answers = Answers(mode, CONTEXT)
    answers.calls[1] = call = Asked(request)
    answers.receive(memoryview(split_reply(mode, request)[0]))
    with pytest.raises(ProtocolError, match="repeats what was sent before"):
        answers.receive(memoryview(data_reply(mode, request)))
    assert not call.told
