"""Invariant: no client bytes raise, little is kept, every line out is JSON, and how bytes are split changes nothing.

    python fuzz/fuzz_qmp.py [seconds] [seed]

Joins, cuts and damages pieces of real conversations, and feeds each whole, byte by byte and in random pieces. After
each, a client that starts afresh must be understood. A failure prints the seed and the stream that reproduce it.
"""

from __future__ import annotations

import json
import random
import sys
import time

from blkferry.wire.qmp.session import Answered, CommandReceived, Session
from blkferry.wire.qmp.text import SHOWN

PIECES = (
    b'{"execute": "qmp_capabilities"}',
    b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": [{"a": null}]}\r\n',
    b'{"execute": "query-version", "id": 1}',
    b"{'execute': 'it''s', 'arguments': {}}\n",
    b'{\n    "execute": "x",\n    "arguments": {\n        "a": [1, -2.5e3, true]\n    }\n}\n',
    b'{"exec-oob": "x", "id": "\\ud83d\\ude00"}',
    b'{"execute": 1, "execute": 2}',
    b'"\\ud83d"',
    b"[" * 70,
    b"]" * 70,
    b'{"a":' * 1100,
    b"}" * 1100,
    b"9" * 700,
    *(b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b",", b":", b" ", b"\n", b"\r\n", b"\n{", b"\xff", b"\x00", b"\xc3"),
    *(b"true", b"nul", b"NaN", b"-", b"1e999", b"\\u0000", b"\\u12", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b'"id": '),
)
FRESH = b'\xff{"execute": "fresh"}'
LONGEST_DESC = 200 + 5 * SHOWN


def any_stream(rng):
    stream = bytearray(b"".join(rng.choices(PIECES, k=rng.randrange(1, 12))))
    for _ in range(rng.choice((0, 0, 1, 5))):
        at = rng.randrange(len(stream))
        match rng.randrange(3):
            case 0:
                stream[at] = rng.randrange(256)
            case 1:
                del stream[at : at + rng.randrange(1, 9)]
            case 2:
                stream[at:at] = rng.choice(PIECES)
        if not stream:
            return b""
    return bytes(stream)


def converse(pieces):
    session = Session()
    found = []
    for piece in pieces:
        session.receive(piece)
        while event := session.next_event():
            found.append(event)
            line = event.data if isinstance(event, Answered) else session.reply(event.id, {})
            assert line.endswith(b"\r\n")
            assert line.count(b"\n") == 1
            answer = json.loads(line)
            assert isinstance(event, CommandReceived) or len(answer.get("error", {}).get("desc", "")) <= LONGEST_DESC
    return found


def split(rng, stream):
    cuts = sorted(rng.sample(range(len(stream) + 1), k=min(len(stream), rng.randrange(1, 6))))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def run(seconds, seed):
    rng = random.Random(seed)
    streams = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stream = any_stream(rng) + FRESH
        try:
            whole = converse([stream])
            assert converse(stream[at : at + 1] for at in range(len(stream))) == whole
            assert converse(split(rng, stream)) == whole
            last = whole[-1]
            fresh = CommandReceived("fresh", {})
            assert last == fresh or (isinstance(last, Answered) and b"Expecting capabilities" in last.data)
        except Exception:
            sys.stderr.write(f"seed {seed}, stream {stream!r}\n")
            raise
        streams += 1
    return streams


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    sys.stdout.write(f"{run(seconds, seed)} streams, seed {seed}\n")
