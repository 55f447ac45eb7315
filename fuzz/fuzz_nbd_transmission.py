"""Invariant: whatever a client sends after its handshake, others are served, nothing stays behind, nothing escapes.

    python fuzz/fuzz_nbd_transmission.py [seconds] [seed]

Plays sessions of requests that are right, nearly right and not right at all against a whole daemon, in random pieces,
and those that real clients had (fuzz/corpus/nbd_transmission), whole and damaged. A session of ours that was not
damaged must get exactly the answers that the rules demand. A failure prints seed and session.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import random
import socket
import sys
import time

from complaints import Complaints

from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import ConnectionEnded
from blkferry.wire.nbd.constants import MAX_REQUEST, Cmd, CmdFlag, Errno, Mode
from blkferry.wire.nbd.transmission import ProtocolError, Request, StatusFilter, check

SIZE = (1 << 20) + 512
MAX_REQUESTS = 40
CORPUS = [
    (Mode[file.suffix[1:].upper()], file.read_bytes())
    for file in sorted((pathlib.Path(__file__).parent / "corpus" / "nbd_transmission").iterdir())
]


def any_request(rng, mode, cookie):
    """A request, the payload that goes with it, and the refusal that it deserves."""
    command = rng.choice([*Cmd, *Cmd, 8, rng.randrange(1 << 16)])
    if command == Cmd.DISC:
        command = Cmd.READ
    flags = rng.choice([0, 0, 0, *CmdFlag, rng.randrange(1 << 16)])
    length = rng.choice([0, 1, 511, 512, 4096, 40_000, rng.randrange(1 << 18)])
    offset = rng.choice([0, 1, 512, rng.randrange(SIZE), SIZE - length, SIZE, (1 << 64) - 1 - length])
    offset = max(offset, 0)
    if mode is Mode.EXTENDED and command == Cmd.WRITE:
        flags |= CmdFlag.PAYLOAD_LEN
    payload = b""
    request = Request(flags, command, cookie, offset, length)
    checked = request
    if mode is Mode.EXTENDED and command == Cmd.BLOCK_STATUS and flags & CmdFlag.PAYLOAD_LEN:
        payload = StatusFilter(length, rng.choice([(), (0,), (0, 0), (1,)])).build()
        request = request._replace(length=len(payload))
        valid = payload[8:] == bytes(4)
        checked = checked._replace(flags=flags & ~int(CmdFlag.PAYLOAD_LEN)) if valid else None
    elif request.payload_length(mode):
        payload = rng.randbytes(length)
        if command != Cmd.WRITE:
            checked = None  # no other command takes any
    return request, payload, checked


def any_session(rng, mode):
    parts, wanted = [], {}
    for cookie in range(rng.randrange(1, MAX_REQUESTS)):
        request, payload, checked = any_request(rng, mode, cookie)
        if request.payload_length(mode) > MAX_REQUEST:
            continue
        selected = (0,) if mode is not Mode.SIMPLE else ()
        refusal = None
        if checked is not None:
            refusal = check(checked, size=SIZE, read_only=False, mode=mode, selected=selected)
        wanted[cookie] = (request, checked is None or refusal is not None)
        parts.append(request.build(mode) + payload)
    return b"".join(parts), wanted


def damaged(rng, data):
    damage = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        position = rng.randrange(len(damage) + 1)
        match rng.randrange(3):
            case 0 if position < len(damage):
                damage[position] ^= 1 << rng.randrange(8)
            case 1:
                del damage[position : position + rng.randrange(4)]
            case _:
                damage[position:position] = rng.randbytes(rng.randrange(4))
    return bytes(damage[: rng.randrange(len(damage) + 1)] if rng.random() < 0.3 else damage)


def send_in_pieces(rng, client, data):
    start = 0
    while start < len(data):
        end = start + rng.choice([1, 20, 1000, 100_000, 1 << 20])
        client.send(data[start:end])
        start = end


def play(rng, daemon, export, mode):
    """One session. Returns what was sent, for the report."""
    data, wanted = any_session(rng, mode)
    spoil = rng.random() < 0.5
    if spoil:
        data = damaged(rng, data)
    with daemon.client(export, mode=mode, timeout=10) as client:
        for request, _ in wanted.values():
            client.expect(request)
        if spoil:
            with contextlib.suppress(ConnectionEnded, ProtocolError):
                send_in_pieces(rng, client, data)
            return data
        send_in_pieces(rng, client, data)
        for cookie, (request, refused) in wanted.items():
            result = client.wait(cookie)
            if result.error == Errno.ENOTSUP and request.flags & CmdFlag.FAST_ZERO:
                continue
            assert bool(result.error) == refused, f"{request}: {result.error} {result.text}"
            if request.type == Cmd.READ and not refused:
                assert len(result.data) == request.length
    return data


def replay(rng, daemon, mode, data):
    """What a client that nobody here wrote has sent, to its end. Returns what was sent, for the report."""
    with daemon.client("m", mode=mode, timeout=10) as client, contextlib.suppress(ConnectionEnded, ProtocolError):
        send_in_pieces(rng, client, data)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.ended(), "the daemon waits for a client that will say no more"
    return data


def quiet(daemon):
    server = daemon.daemon.nbd_server
    return not server._connections and not daemon.daemon.services.buffers.used  # noqa: SLF001 - it must be so inside


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    logging.getLogger("blkferry").setLevel(logging.ERROR)
    sessions = 0
    data = b""
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        daemon.execute("blockdev-add", driver="null-co", node_name="n", size=SIZE, latency_ns=1)
        daemon.export("m", "m", "m")
        daemon.export("n", "n", "n")
        deadline = time.monotonic() + seconds
        try:
            for mode, data in CORPUS:
                replay(rng, daemon, mode, data)
            while time.monotonic() < deadline:
                if rng.random() < 0.2:
                    mode, said = rng.choice(CORPUS)
                    data = replay(rng, daemon, mode, damaged(rng, said))
                else:
                    data = play(rng, daemon, rng.choice("mn"), rng.choice(list(Mode)))
                sessions += 1
                if sessions % 50 == 0:
                    patience = time.monotonic() + 5
                    while not quiet(daemon):
                        assert time.monotonic() < patience, "something of a session stays behind"
                        time.sleep(0.01)
                assert not complaints.texts, complaints.texts
        except BaseException:
            sys.stderr.write(f"seed {seed}, session {sessions}: {data[:4000].hex()}\n")
            raise
    sys.stdout.write(f"seed {seed}: {sessions} sessions\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
