"""Invariant: no server bytes raise but Error, none are handed out that were not sent, and splitting changes nothing.

    python fuzz/fuzz_nbd_client.py [seconds] [seed]

What a server sends in its handshake goes to the driver's `Haggling`, what it sends after that to `Replies`: valid,
nearly valid and not valid at all, whole and in pieces. The corpus has what real servers sent: NAME.handshake, and
NAME.MODE for the replies to REQUESTS in that mode. It is replayed first. A failure prints the seed and the bytes that
reproduce it.
"""

from __future__ import annotations

import pathlib
import random
import resource
import struct
import sys
import time
from collections.abc import Iterator
from functools import partial

from blkferry.drivers.nbd.haggling import MAX_REPLIES, Haggling
from blkferry.errors import Error
from blkferry.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    INIT_MAGIC,
    MAX_OPTION_REPLY,
    MAX_REQUEST,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Errno,
    Info,
    Mode,
    Opt,
    Rep,
    RepError,
)
from blkferry.wire.nbd.options import GREETING, INFO_BLOCK_SIZE, INFO_EXPORT, OPTION_REPLY
from blkferry.wire.nbd.replies import MAX_PARTS, MAX_STATUS_EXTENTS, Data, Failure, Hole, Replies, Status
from blkferry.wire.nbd.transmission import (
    ERROR,
    EXTENDED_CHUNK,
    EXTENT,
    EXTENT_EXT,
    HOLE,
    OFFSET,
    SIMPLE_REPLY,
    STATUS,
    STATUS_EXT,
    STRUCTURED_CHUNK,
    Request,
)

CORPUS = pathlib.Path(__file__).parent / "corpus" / "nbd_client"
REQUESTS = (
    Request(0, Cmd.READ, 1, 0, 8192),
    Request(0, Cmd.BLOCK_STATUS, 2, 0, 1 << 20),
    Request(0, Cmd.READ, 3, 65536 - 512, 4096),
    Request(0, Cmd.FLUSH, 4, 0, 0),
    Request(0, Cmd.WRITE_ZEROES, 5, 4096, 4096),
    Request(0, Cmd.READ, 6, 1 << 40, 512),
)
"""What the servers of the corpus were asked: the last lies outside their disk."""

LONGEST = 5  # seconds of processor time for one input; milliseconds are usual
MEMORY = 2 << 30  # bytes of address space that all of this may take
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    511,
    512,
    4096,
    65536,
    MAX_REQUEST,
    MAX_REQUEST + 8,
    MAX_REQUEST + 9,
    1 << 31,
    (1 << 32) - 1,
)


# The handshake -----------------------------------------------------------------------------------------------------


class Script:
    """A socket whose other end has said all that it will ever say, in these pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.asked = 0

    def recv(self, size):
        self.asked += 1
        piece = next(self._pieces, b"")
        assert len(piece) <= size
        return piece

    def send(self, data):
        return len(data)


def option_reply(option, kind, payload=b""):
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def any_info(rng):
    sizes = rng.choice(((1, 4096, MAX_REQUEST), (512, 4096, 65536), tuple(rng.choice(NUMBERS) for _ in range(3))))
    size = rng.choice((0, 1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63))
    match rng.randrange(4):
        case 0:
            return INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)
        case 1:
            return struct.pack(">H", rng.choice((*Info, 9))) + rng.randbytes(rng.randrange(20))
        case _:
            return INFO_EXPORT.pack(Info.EXPORT, size, rng.randrange(1 << 16))


def any_answers(rng, option):
    """The replies to one option, and whether the server did what it asks for."""
    if rng.random() < 0.3:
        return option_reply(option, rng.choice((*RepError, 1 << 31)), rng.choice((b"", b"no", b"\xff"))), False
    infos = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, MAX_REPLIES))):
        if option == Opt.SET_META_CONTEXT:
            name = rng.choice((b"base:allocation", b"x:y", b"\xff"))
            infos.append(option_reply(option, Rep.META_CONTEXT, struct.pack(">I", rng.randrange(1 << 32)) + name))
        elif option == Opt.GO:
            infos.append(option_reply(option, Rep.INFO, any_info(rng)))
    return b"".join(infos) + option_reply(option, Rep.ACK), True


def any_handshake(rng):
    told = [GREETING.pack(INIT_MAGIC, OPTION_MAGIC, rng.choice((3, 3, 3, 1, 2, rng.randrange(1 << 16))))]
    for option in (Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY):
        answers, done = any_answers(rng, option)
        told.append(answers)
        if done:
            told.append(any_answers(rng, Opt.SET_META_CONTEXT)[0])
            break
    told.append(any_answers(rng, Opt.GO)[0])
    return b"".join(told)


def shake_hands(data, context, split):
    """What the driver makes of a handshake: what was agreed, or the complaint; and what it has not read."""
    script = Script(split(data))
    haggling = Haggling(script)

    async def whole():
        await haggling.greet()
        return await haggling.agree("export", context)

    try:
        whole().send(None)
    except StopIteration as done:
        session = done.value
        assert session.maximum % session.minimum == 0
        assert 0 < session.minimum <= session.maximum <= MAX_REQUEST
        assert session.minimum.bit_count() == 1
        assert 0 <= session.size < 1 << 63
        if session.context is not None:
            assert session.mode is not Mode.SIMPLE
            assert struct.pack(">I", session.context) + (context or "base:allocation").encode() in data
        assert session.size == 0 or struct.pack(">QH", session.size, session.flags) in data
        return (session.mode, session.size, session.flags, session.minimum, session.maximum, session.context), ""
    except (Error, OSError) as error:
        return None, str(error)
    finally:
        waiting = len(haggling._incoming)  # noqa: SLF001 - a bound of its own, not of its callers
        assert waiting <= MAX_OPTION_REPLY + OPTION_REPLY.size + (1 << 16)
    raise AssertionError("the handshake waits for what is there")


def try_handshake(rng, data, context=None):
    whole = shake_hands(data, context, partial(pieces, sizes=(1 << 16,), rng=rng))
    for sizes in ((1,), (1, 2, 16, 100, 10_000)):
        parts = shake_hands(data, context, partial(pieces, sizes=sizes, rng=rng))
        # What comes after the handshake is refused if it is there already, and else by whoever reads it next.
        assert parts == whole or (parts[0] is not None and "requests that it has not got" in whole[1]), (whole, parts)
    return whole[0] is not None


# Replies -----------------------------------------------------------------------------------------------------------


def any_requests(rng):
    requests = []
    for cookie in range(rng.randrange(1, 8)):
        command = rng.choice((Cmd.READ, Cmd.READ, Cmd.READ, Cmd.BLOCK_STATUS, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM))
        length = rng.choice((1, 512, 1000, 4096, 20_000))
        requests.append(Request(0, command, cookie, rng.choice((0, 512, 1 << 40)), length))
    return tuple(requests)


def chunk(mode, request, kind, payload, *, done):
    if mode is Mode.EXTENDED:
        head = EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, done, kind, request.cookie, request.offset, len(payload))
    else:
        head = STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, done, kind, request.cookie, len(payload))
    return head + payload


def any_reply(rng, mode, request):
    failed = rng.random() < 0.1
    if mode is Mode.SIMPLE or (mode is Mode.STRUCTURED and request.type not in {Cmd.READ, Cmd.BLOCK_STATUS}):
        data = rng.randbytes(request.length) if request.type == Cmd.READ and not failed else b""
        error = rng.choice((*Errno, 77)) if failed else 0
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie) + data
    contents = []
    if request.type == Cmd.READ:
        contents = any_content(rng, request)
    elif request.type == Cmd.BLOCK_STATUS:
        contents = [any_status(rng, mode) for _ in range(rng.choice((1, 1, 2)))]
    if failed:
        contents.append((rng.choice((Chunk.ERROR, Chunk.ERROR_OFFSET)), ERROR.pack(rng.choice(list(Errno)), 2) + b"no"))
    if not contents or rng.random() < 0.3:
        contents.append((Chunk.NONE, b""))
    last = len(contents) - 1
    return b"".join(chunk(mode, request, *each, done=number == last) for number, each in enumerate(contents))


def any_content(rng, request):
    """Chunks that fill a READ, in any order, now and then of single bytes."""
    size = rng.choice((1, 3, 512, 512, 4096, 100_000) if request.length <= 1000 else (512, 4096, 100_000))
    contents = []
    for at in range(request.offset, request.offset + request.length, size):
        length = min(size, request.offset + request.length - at)
        if rng.random() < 0.2:
            contents.append((Chunk.OFFSET_HOLE, HOLE.pack(at, length)))
        else:
            contents.append((Chunk.OFFSET_DATA, OFFSET.pack(at) + rng.randbytes(length)))
    if rng.random() < 0.5:
        rng.shuffle(contents)
    if rng.random() < 0.1:
        contents[rng.randrange(len(contents))] = rng.choice(contents)
    if rng.random() < 0.1:
        contents.pop(rng.randrange(len(contents)))
    return contents


def any_status(rng, mode):
    extents = [(rng.choice((1, 512, 65536, (1 << 32) - 1)), rng.randrange(4)) for _ in range(rng.choice((1, 2, 50)))]
    extents *= rng.choice((1,) * 200 + (10_000,))
    context = rng.randrange(3)
    if mode is Mode.EXTENDED:
        packed = b"".join(EXTENT_EXT.pack(*each) for each in extents)
        return Chunk.BLOCK_STATUS_EXT, STATUS_EXT.pack(context, len(extents)) + packed
    return Chunk.BLOCK_STATUS, STATUS.pack(context) + b"".join(EXTENT.pack(*each) for each in extents)


def any_replies(rng, mode, requests):
    """Whole replies in any order, the chunks of different ones not mixed."""
    order = list(requests)
    rng.shuffle(order)
    return b"".join(any_reply(rng, mode, request) for request in order)


def hear(mode, requests, parts):
    """The replies and the complaint that ended them."""
    stream = Replies(mode)
    for request in requests:
        stream.expect(request)
    heard, complaint = [], ""
    try:
        for part in parts:
            heard += stream.receive(part)
            for pending in stream._pending.values():  # noqa: SLF001 - a bound of its own, not of its callers
                assert len(pending.parts) <= MAX_PARTS
    except Error as error:
        complaint = str(error)
    return heard, complaint


def judge(data, heard):
    """Fail if there is anything in the replies that was not sent, or does not belong there."""
    filled: dict[int, list[tuple[int, int]]] = {}
    failed = set()
    ended = set()
    for request, done, content in heard:
        assert request.cookie not in ended
        match content:
            case Data(offset, sent):
                assert request.offset <= offset <= offset + len(sent) <= request.offset + request.length
                assert sent in data
                filled.setdefault(request.cookie, []).append((offset, offset + len(sent)))
            case Hole(offset, length):
                assert request.offset <= offset <= offset + length <= request.offset + request.length
                assert HOLE.pack(offset, length) in data
                filled.setdefault(request.cookie, []).append((offset, offset + length))
            case Status(_, extents):
                assert request.type == Cmd.BLOCK_STATUS
                assert len(extents) <= MAX_STATUS_EXTENTS
                assert all(length for length, _ in extents)
            case Failure(error, _):
                assert struct.pack(">I", error) in data
                failed.add(request.cookie)
        if done:
            ended.add(request.cookie)
            if request.type == Cmd.READ and request.cookie not in failed:
                end = request.offset
                for first, last in sorted(filled.get(request.cookie, ())):
                    assert first == end
                    end = last
                assert end == request.offset + request.length


def try_replies(rng, mode, requests, data):
    whole, complaint = hear(mode, requests, [data])
    judge(data, whole)
    for sizes in ((1,), (1, 2, 16, 100, 10_000)):
        if len(data) > 5000 and sizes == (1,):
            continue
        parts, other = hear(mode, requests, pieces(data, sizes=sizes, rng=rng))
        judge(data, parts)
        # What came in one piece with the fault that ends the connection is lost with it.
        assert complaint == other, (complaint, other)
        assert parts == whole if not complaint else parts[: len(whole)] == whole
    return not complaint


# All of it ---------------------------------------------------------------------------------------------------------


def pieces(data, *, sizes, rng):
    start = 0
    while start < len(data):
        end = start + rng.choice(sizes)
        yield data[start:end]
        start = end


def damaged(rng, data, *, most=3):
    damage = bytearray(data)
    for _ in range(rng.randrange(most)):
        position = rng.randrange(len(damage) + 1)
        word = position & ~1
        match rng.randrange(6):
            case 0 if position < len(damage):
                damage[position] ^= 1 << rng.randrange(8)
            case 1:
                del damage[position : position + rng.randrange(4)]
            case 2:
                damage[position:position] = rng.randbytes(rng.randrange(4))
            case 3:
                damage[word : word + 4] = struct.pack(">I", rng.choice(NUMBERS))
            case 4:
                del damage[position:]
            case _:
                damage[position:position] = damage[position : position + rng.randrange(100)]
    return bytes(damage)


def corpus():
    """Handshakes, and replies with their modes."""
    handshakes = [path.read_bytes() for path in sorted(CORPUS.glob("*.handshake"))]
    replies = [
        (mode, REQUESTS, path.read_bytes()) for mode in Mode for path in sorted(CORPUS.glob(f"*.{mode.name.lower()}"))
    ]
    return handshakes, replies


def attempt(rng, handshakes, replies):
    """One input. Returns what it was, whether it was taken, and the bytes."""
    if rng.random() < 0.5:
        data = damaged(rng, rng.choice(handshakes) if rng.random() < 0.3 else any_handshake(rng))
        return partial(try_handshake, rng, data, rng.choice((None, None, "x:y"))), data
    mode, requests, data = rng.choice(replies)
    if rng.random() < 0.8:
        mode, requests = rng.choice(list(Mode)), any_requests(rng)
        data = any_replies(rng, mode, requests)
    data = damaged(rng, data)
    return partial(try_replies, rng, mode, requests, data), data


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng = random.Random(seed)
    handshakes, replies = corpus()
    for data in handshakes:
        assert try_handshake(rng, data), "a real server's handshake is not understood"
    for mode, requests, data in replies:
        assert try_replies(rng, mode, requests, data), "a real server's replies are not understood"
    deadline = time.monotonic() + seconds
    inputs = taken = 0
    while time.monotonic() < deadline:
        work, data = attempt(rng, handshakes, replies)
        began = time.thread_time()
        try:
            taken += work()
            assert time.thread_time() - began < LONGEST, "it took too long"
        except BaseException:
            how = [each for each in work.args[1:] if each is not data]
            sys.stderr.write(f"seed {seed}, input {inputs}, {work.func.__name__} {how}: {data[:4000].hex()}\n")
            raise
        inputs += 1
    sys.stdout.write(f"seed {seed}: {inputs} inputs, of which {taken} were taken\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
