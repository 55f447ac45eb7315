"""Invariant: no client bytes raise, nothing grows unbounded, and how the bytes are split changes nothing.

    python fuzz/fuzz_nbd_handshake.py [seconds] [seed]

Builds sessions of options that are valid, nearly valid and not valid at all, takes those that real clients had
(fuzz/corpus/nbd_handshake), and feeds each whole, byte by byte and in random pieces. Some are with servers that require
TLS: these have two phases, before and after it. A failure prints the seed and the session that reproduce it.
"""

from __future__ import annotations

import pathlib
import random
import sys
import time
from functools import partial
from typing import NamedTuple

from blkferry.wire.nbd.client import build_flags, build_info, build_option, build_queries
from blkferry.wire.nbd.constants import MAX_META_OPTION, MAX_STRING, Opt, TransmissionFlag
from blkferry.wire.nbd.handshake import MAX_OUTGOING, ExportInfo, Handshake, State

CORPUS = [
    file.read_bytes() for file in sorted((pathlib.Path(__file__).parent / "corpus" / "nbd_handshake").glob("*.bin"))
]
CONTEXTS = ((0, "base:allocation"), (1, "qemu:allocation-depth"), (2, "qemu:dirty-bitmap:b"))
EXPORTS = {
    name: ExportInfo(name, text, 1 << 20, TransmissionFlag.HAS_FLAGS, 512, 4096, 1 << 25, CONTEXTS)
    for name, text in (("", ""), ("disk", "d" * 100), ("\u00e9", ""))
}
MAX_ONE_ANSWER = 4096  # the longest reply these exports can give to one option
NAMES = [*EXPORTS, "nothing", "d\0", "n" * MAX_STRING, "n" * (MAX_STRING + 1)]
QUERIES = ["", ":", "base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:b", "x:y"]


class Directory:
    def list(self):
        return list(EXPORTS.values())

    def find(self, name):
        return EXPORTS.get(name)


def any_payload(rng):
    name = rng.choice(NAMES)
    match rng.randrange(5):
        case 0:
            return b""
        case 1:
            return rng.randbytes(rng.randrange(64))
        case 2:
            return name.encode()
        case 3:
            return build_info(name, [rng.randrange(5) for _ in range(rng.randrange(5))])
        case _:
            return build_queries(name, [rng.choice(QUERIES) for _ in range(rng.randrange(5))])


def any_option(rng):
    option = rng.choice([*Opt, rng.randrange(1 << 32)])
    if option in {Opt.EXPORT_NAME, Opt.ABORT, Opt.GO} and rng.random() < 0.7:
        option = Opt.INFO  # these end a session, and long ones find more
    return build_option(option, any_payload(rng))


def damaged(rng, data):
    """The same bytes with some flipped, lost or inserted."""
    damage = bytearray(data)
    for _ in range(rng.randrange(3)):
        position = rng.randrange(len(damage) + 1)
        match rng.randrange(3):
            case 0 if position < len(damage):
                damage[position] ^= 1 << rng.randrange(8)
            case 1:
                del damage[position : position + rng.randrange(4)]
            case _:
                damage[position:position] = rng.randbytes(rng.randrange(4))
    return bytes(damage)


def any_options(rng):
    options = [any_option(rng) for _ in range(rng.randrange(12))]
    if rng.random() < 0.05:
        options.append(options[-1] * 500 if options else b"")
    if rng.random() < 0.5:
        options = [damaged(rng, option) for option in options]
    return b"".join(options)


class Session(NamedTuple):
    """What a client sends, before TLS and after it; there is no after where there is no TLS."""

    before: bytes
    after: bytes | None
    denial: str

    @classmethod
    def any(cls, rng):
        if rng.random() < 0.2:
            return cls(damaged(rng, rng.choice(CORPUS)), None, "")
        flags = build_flags(rng.choice([3, 3, 3, 3, 1, 0, rng.randrange(1 << 32)]))
        if rng.random() < 0.5:
            return cls(flags + any_options(rng), None, "")
        before = flags + (any_options(rng) if rng.random() < 0.3 else b"")
        starttls = build_option(Opt.STARTTLS)
        if rng.random() < 0.1:
            starttls += any_options(rng)
        return cls(before + starttls, any_options(rng), rng.choice(["", "", "no"]))


def pieces(rng, data):
    start = 0
    while start < len(data):
        end = start + rng.choice([1, 2, 16, 100, 10_000])
        yield data[start:end]
        start = end


def converse(session, split):
    machine = Handshake(Directory(), tls_required=session.after is not None)
    sent = bytearray()
    feed(machine, split(session.before), sent)
    if machine.state is State.STARTTLS:
        machine.secured(session.denial)
        feed(machine, split(session.after), sent)
        assert not session.denial or machine.result is None
    elif session.after is not None:
        assert machine.result is None
    assert (machine.state is State.DONE) == (machine.result is not None)
    assert (machine.state is State.CLOSED) == bool(machine.closed_reason)
    return bytes(sent), machine.state, machine.result, machine.closed_reason, machine.leftover


def feed(machine, parts, sent):
    for part in parts:
        machine.receive(part)
        waiting = len(machine._incoming)  # noqa: SLF001 - a bound of its own, not of its callers
        assert waiting <= MAX_META_OPTION + len(part) or machine.state is State.DONE
        while True:
            assert machine.outgoing_size <= MAX_OUTGOING + MAX_ONE_ANSWER
            data = machine.outgoing()
            if not data:
                break
            sent += data


def check(rng, session):
    """Have a session in all ways; the state it ends in."""
    whole = converse(session, lambda data: [data])
    assert converse(session, partial(pieces, rng)) == whole
    if len(session.before) + len(session.after or b"") < 5000:
        assert converse(session, lambda data: (data[i : i + 1] for i in range(len(data)))) == whole
    return whole[1]


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    sessions = 0
    session = Session(b"", None, "")
    ends = dict.fromkeys(State, 0)
    try:
        for said in CORPUS:
            session = Session(said, None, "")
            assert check(rng, session) in {State.DONE, State.CLOSED, State.OPTION}
        while time.monotonic() < deadline:
            session = Session.any(rng)
            ends[check(rng, session)] += 1
            sessions += 1
    except Exception:
        sys.stderr.write(f"seed {seed}, session {sessions}: {session}\n")
        raise
    counts = ", ".join(f"{count} {state.name}" for state, count in ends.items())
    sys.stdout.write(f"seed {seed}: {sessions} sessions, which ended {counts}\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
