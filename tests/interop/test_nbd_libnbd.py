"""libnbd's own API: each command, each flag, each mode, many in flight, two connections.

The scripts run where the binding lives, which may be another Python; they assert by themselves and say "fine".
"""

from __future__ import annotations

import pytest

import peers
from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread

SIZE = 4 << 20

pytestmark = peers.requires(peers.LIBNBD)

PRELUDE = """
import errno, nbd, random, sys
path, mode = sys.argv[1:]
SIZE = 4 << 20

def connect(contexts=("base:allocation",)):
    h = nbd.NBD()
    h.set_strict_mode(nbd.STRICT_AUTO_FLAG)  # let wrong requests pass, with right headers
    h.set_request_structured_replies(mode != "simple")
    h.set_request_extended_headers(mode == "extended")
    if mode != "simple":
        for context in contexts:
            h.add_meta_context(context)
    h.connect_unix(path)
    assert h.get_protocol() == "newstyle-fixed"
    assert h.get_structured_replies_negotiated() == (mode != "simple")
    assert h.get_extended_headers_negotiated() == (mode == "extended")
    assert h.get_size() == SIZE
    return h

def refused(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        return error.errnum
    raise AssertionError("it was not refused")

h = connect()
"""


@pytest.fixture(params=nodes.KINDS)
def run(request, tmp_path):
    with DaemonThread(engine="threads" if request.param == "threads" else "auto") as daemon:
        place = nodes.add(daemon, request.param, tmp_path, SIZE)
        daemon.export(place.node)

        def script(mode, source):
            done = peers.libnbd_script(PRELUDE + source + "\nprint('fine')\n", daemon.socket, mode, timeout=60)
            assert done.stdout.endswith("fine\n"), done.stdout + done.stderr

        yield script


MODES = pytest.mark.parametrize("mode", ["simple", "structured", "extended"])

EVERY_COMMAND = """
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero() and h.can_cache()
assert h.can_multi_conn() and not h.is_read_only() and h.can_df() == (mode != "simple")
assert h.can_block_status_payload() == (mode == "extended")
model = bytearray(SIZE)
rng = random.Random(1)
def put(offset, length, flags=0):
    data = rng.randbytes(length)
    h.pwrite(data, offset, flags)
    model[offset:offset + length] = data
def zero(offset, length, flags=0):
    h.zero(length, offset, flags)
    model[offset:offset + length] = bytes(length)
put(0, 1 << 20)
put(77, 1)
put(100_001, 333_333, nbd.CMD_FLAG_FUA)
zero(50_000, 60_000)
zero(511, 2, nbd.CMD_FLAG_FUA)
zero(300_000, 65_536, nbd.CMD_FLAG_NO_HOLE)
try:
    zero(1 << 20, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as error:
    assert error.errnum == errno.ENOTSUP
h.flush()
h.cache(1 << 20, 0)
assert h.pread(SIZE, 0) == model
assert h.pread(1, 77) == model[77:78]
h.trim(1 << 19, 3 << 20)
h.trim(3, (2 << 20) + 1, nbd.CMD_FLAG_FUA)
h.pwrite(b"", 0)
assert h.pread(SIZE, 0, nbd.CMD_FLAG_DF if mode != "simple" else 0) == model
assert refused(h.pread, 512, SIZE) == errno.EINVAL
assert refused(h.pwrite, b"x", SIZE) == errno.ENOSPC
assert refused(h.zero, 2, SIZE - 1) == errno.ENOSPC
assert refused(h.trim, 2, SIZE - 1) == errno.EINVAL
assert refused(h.pread, 33 << 20, 0) in (errno.EINVAL, errno.ERANGE)
assert refused(h.pread, 512, 0, 1 << 9) == errno.EINVAL
assert h.pread(512, 0) == model[:512]
h.shutdown()
"""

STATUS_AND_HOLES = """
h.pwrite(b"x" * (1 << 20), 1 << 20)
h.zero(1 << 20, 0)
h.zero(2 << 20, 2 << 20)
def chart(call, length=SIZE, offset=0, flags=0):
    seen = []
    def note(context, start, entries, error):
        assert context == "base:allocation"
        if not isinstance(entries[0], tuple):
            entries = list(zip(entries[::2], entries[1::2]))
        for length, status in entries:
            seen.append((start, start + length, status))
            start += length
        return 0
    call(length, offset, note, flags)
    return seen
for call in (h.block_status, h.block_status_64):
    whole = chart(call)
    assert whole[-1][1] <= SIZE and whole[0][0] == 0
    assert all(status in (0, 3) for _, _, status in whole)
    data = [entry for entry in whole if not entry[2]]
    assert any(start <= 1 << 20 and end >= 2 << 20 for start, end, _ in data), whole
    assert sum(end - start for start, end, _ in data) <= (1 << 20) + 16384, whole  # whole blocks
    assert all(a[1] == b[0] for a, b in zip(whole, whole[1:]))
    assert chart(call, flags=nbd.CMD_FLAG_REQ_ONE) == whole[:1]
    assert chart(call, 1, 512 << 10) == [(512 << 10, (512 << 10) + 1, 3)]
    assert chart(call, 1000, (1 << 20) + 5, nbd.CMD_FLAG_REQ_ONE) == [((1 << 20) + 5, (1 << 20) + 1005, 0)]
if mode == "extended":
    def filtered(length, offset, note, flags):
        h.block_status_filter(length, offset, ["base:allocation"], note, flags)
    assert chart(filtered) == whole, (chart(filtered), whole)
chunks = []
def note(data, offset, status, error):
    chunks.append((offset, len(data), status))
    if status == nbd.READ_DATA:
        assert set(bytes(data)) <= set(b"x\\0")
got = h.pread_structured(SIZE, 0, note)
assert got == bytes(1 << 20) + b"x" * (1 << 20) + bytes(2 << 20)
chunks.sort()
pieces = [(start, end - start, nbd.READ_HOLE if status else nbd.READ_DATA) for start, end, status in whole]
assert chunks in (pieces, [(0, SIZE, nbd.READ_DATA)]), (chunks, pieces)  # O_DIRECT reads it all
assert sum(chunk[1] for chunk in chunks) == SIZE
chunks.clear()
def note_kind(data, offset, status, error):
    chunks.append(status)
got = h.pread_structured(8192, (1 << 20) - 4096, note_kind, nbd.CMD_FLAG_DF)
assert got == bytes(4096) + b"x" * 4096
assert chunks == [nbd.READ_DATA]
h2 = connect(contexts=())
assert refused(h2.block_status, 512, 0, lambda *a: 0) == errno.EINVAL
assert h2.pread(512, 1 << 20) == b"x" * 512
"""

MANY_IN_FLIGHT = """
rng = random.Random(5)
two = [h, connect()]
model = bytearray(rng.randbytes(SIZE))
h.pwrite(model, 0)
BLOCK = 16 << 10
finished = []
for turn in range(12):
    blocks = rng.sample(range(SIZE // BLOCK), 128)
    waiting = []
    for number, block in enumerate(blocks):
        client = two[number % 2]
        offset = block * BLOCK + rng.randrange(512)
        length = rng.choice((1, 512, 4096, BLOCK - 512))
        kind = rng.choice("rrwwzt")
        def done(error, number=number):
            assert error.value == 0, error.value
            finished.append(number)
            return 1
        if kind == "r":
            buffer = nbd.Buffer(length)
            client.aio_pread(buffer, offset, done)
            waiting.append((offset, length, buffer))
        elif kind == "w":
            data = rng.randbytes(length)
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            client.aio_pwrite(buffer, offset, done)
            model[offset:offset + length] = data
        elif kind == "z":
            client.aio_zero(length, offset, done)
            model[offset:offset + length] = bytes(length)
        else:
            client.aio_flush(done)
    while any(client.aio_in_flight() for client in two):
        for client in two:
            if client.aio_in_flight():
                client.poll(1000)
    for offset, length, buffer in waiting:
        assert buffer.to_bytearray() == model[offset:offset + length], (turn, offset, length)
assert len(finished) == 12 * 128
assert two[0].pread(SIZE, 0) == model
two[1].pwrite(b"seen by the other", 1000)
two[1].flush()
assert two[0].pread(17, 1000) == b"seen by the other"
"""


@MODES
def test_every_command_and_flag(run, mode):
    run(mode, EVERY_COMMAND)


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_block_status_and_holes(run, mode):
    run(mode, STATUS_AND_HOLES)


@MODES
def test_128_in_flight_on_two_connections(run, mode):
    run(mode, MANY_IN_FLIGHT)
