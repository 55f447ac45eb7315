"""Clients that are broken, malicious or merely slow. The fixture checks after each that others do not notice."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time

import pytest
from serving import SIZE, eventually, in_flight

from blkferry.exports.limits import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES, TURN_BYTES
from blkferry.exports.nbd.lobby import MOST
from blkferry.plane.services import BUFFER_LIMIT, MAX_SLOTS
from blkferry.schema.control import MonitorOptions
from blkferry.schema.visit import visit
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.client import build_info, build_option
from blkferry.wire.nbd.constants import (
    MAX_OPTION,
    MAX_REQUEST,
    OPTION_MAGIC,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    Opt,
    RepError,
)
from blkferry.wire.nbd.transmission import ProtocolError, Request, check

CHUNKED = [Mode.STRUCTURED, Mode.EXTENDED]


def expected(offset, length):
    start = offset // 8
    return b"".join(n.to_bytes(8) for n in range(start, (offset + length) // 8 + 1))[offset - 8 * start :][:length]


# --- The handshake ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0\0\0\3" + b"\0" * 16,
        b"\0\0\0\3" + struct.pack(">QII", OPTION_MAGIC, Opt.INFO, MAX_OPTION + 1),
        b"\0\0\0\3" + struct.pack(">QII", OPTION_MAGIC, 0xFFFFFFFF, 0xFFFFFFFF),
        b"\0\0\0\0" + struct.pack(">QII", OPTION_MAGIC, Opt.LIST, 0),
        b"\0\0\0\3" + struct.pack(">QII", OPTION_MAGIC, Opt.EXPORT_NAME, 4097),
    ],
    ids=["flags", "http", "magic", "option", "length", "oldstyle", "name"],
)
def test_garbage_in_the_handshake_ends_it(served, garbage):
    with Client.open(served.daemon.socket) as client:
        client.sock.setblocking(True)
        client.sock.sendall(garbage)
        client.sock.setblocking(False)
        assert client.ended()


def test_the_longest_option_is_thrown_away_unkept(served):
    with Client.open(served.daemon.socket) as client:
        client.greet()
        (reply,) = client.option(99, bytes(MAX_OPTION))
        assert reply.kind == RepError.UNSUP
        (reply,) = client.option(Opt.LIST, bytes(MAX_OPTION))
        assert reply.kind == RepError.INVALID
        client.go("")
        assert client.read(8000, 64) == expected(8000, 64)


def test_a_client_that_takes_no_replies_in_the_handshake(served):
    with Client.open(served.daemon.socket) as client:
        client.greet()
        client.sock.setblocking(False)
        asking = build_option(Opt.INFO, build_info("")) * 1000
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 64 << 20:
                sent += client.sock.send(asking)
        assert sent < 8 << 20, "the daemon took options whose replies nobody takes"
        (negotiation,) = served.inside(lambda d: list(d.nbd_server._lobby))
        assert negotiation._machine.outgoing_size + len(negotiation._unsent) < 1 << 20
        served_meanwhile = served.client()
        assert served_meanwhile.read(8000, 8) == expected(8000, 8)
        served_meanwhile.close()


def test_slow_haggling_is_cut():
    with DaemonThread() as daemon:
        daemon.serve(handshake_max_seconds=1)
        began = time.monotonic()
        with Client.open(daemon.socket) as client:
            client.greet()
            assert client.ended()
        assert 0.8 < time.monotonic() - began < 3
        eventually(lambda: in_flight(daemon.daemon) == {})


def test_a_flood_of_silent_connections(served):
    silent = []
    kept = served.client()
    for _ in range(MOST + 50):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(served.daemon.socket)
        silent.append(sock)
    eventually(lambda: served.inside(lambda d: len(d.nbd_server._lobby)) == MOST)
    with served.client() as late:
        assert late.read(8000, 8) == kept.read(8000, 8) == expected(8000, 8)
    kept.close()
    for sock in silent:
        sock.close()


def test_connections_that_die_at_every_step(served):
    steps = [
        b"",
        b"\0\0",
        b"\0\0\0\3",
        b"\0\0\0\3IHAVE",
        b"\0\0\0\3" + build_option(Opt.GO, build_info(""))[:-1],
        b"\0\0\0\3" + build_option(Opt.GO, build_info("")),
        b"\0\0\0\3" + build_option(Opt.GO, build_info("")) + Request(0, Cmd.READ, 1, 0, SIZE).build(Mode.SIMPLE),
    ]
    for step in steps * 20:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(served.daemon.socket)
        sock.sendall(step)
        sock.close()


def test_requests_that_come_with_the_choice_of_an_export(served):
    with Client.open(served.daemon.socket) as client:
        client.greet()
        requests = [Request(0, Cmd.READ, n, 800 * n, 700) for n in range(1000)]
        client.send(build_option(Opt.GO, build_info("")) + b"".join(r.build(Mode.SIMPLE) for r in requests))
        assert not client.option_replies()[-1].failed
        client.transmit(requests)
        for request in requests:
            assert client.wait(request.cookie).data == expected(request.offset, 700)


def test_no_more_than_max_connections():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE)
        daemon.serve(max_connections=2)
        daemon.export("m")
        first, second = daemon.client(), Client.open(daemon.socket)  # one that only negotiates counts too
        second.greet()
        third = Client.open(daemon.socket, timeout=0.3)
        with pytest.raises(TimeoutError):
            third.greet()
        assert first.read(0, 512) == bytes(512)
        second.close()
        third.timeout = 5
        third.greet()
        third.go("")
        assert third.read(0, 512) == bytes(512)
        fourth = Client.open(daemon.socket, timeout=0.3)
        with pytest.raises(TimeoutError):
            fourth.greet()
        first.close()
        fourth.timeout = 5
        fourth.greet()
        for client in (third, fourth):
            client.close()


def test_one_connection_is_told_not_to_share():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE)
        daemon.serve(max_connections=1)
        daemon.export("m", writable=False)
        with daemon.client(mode=Mode.SIMPLE) as client:
            assert client.flags == 0x40F


# --- Requests that must be refused ------------------------------------------------------------------------------

FAR = 1 << 63
REFUSED = [
    (Cmd.READ, 0, SIZE, 1, Errno.EINVAL),
    (Cmd.READ, 0, SIZE - 100, 101, Errno.EINVAL),
    (Cmd.READ, 0, 0, MAX_REQUEST + 1, Errno.EINVAL),
    (Cmd.READ, 0, 2**64 - 1, 1, Errno.EINVAL),
    (Cmd.READ, 0, FAR, 4096, Errno.EINVAL),
    (Cmd.READ, 0x8000, 0, 512, Errno.EINVAL),
    (Cmd.READ, CmdFlag.NO_HOLE, 0, 512, Errno.EINVAL),
    (Cmd.FLUSH, CmdFlag.FAST_ZERO, 0, 0, Errno.EINVAL),
    (Cmd.FLUSH, 0, SIZE, 1, Errno.EINVAL),
    (Cmd.TRIM, 0, SIZE, 1, Errno.EINVAL),
    (Cmd.TRIM, CmdFlag.NO_HOLE, 0, 1, Errno.EINVAL),
    (Cmd.WRITE_ZEROES, 0, SIZE - 1, 2, Errno.ENOSPC),
    (Cmd.WRITE_ZEROES, CmdFlag.DF, 0, 1, Errno.EINVAL),
    (Cmd.CACHE, 0, 0, MAX_REQUEST + 1, Errno.EINVAL),
    (Cmd.CACHE, 0, SIZE, 1, Errno.EINVAL),
    (Cmd.WRITE, 0, SIZE - 100, 200, Errno.ENOSPC),
    (Cmd.WRITE, 0, FAR, 70_000, Errno.ENOSPC),
    (Cmd.WRITE, CmdFlag.DF, 0, 200, Errno.EINVAL),
    (Cmd.WRITE, 0x4000, 0, 300_000, Errno.EINVAL),
    (Cmd.BLOCK_STATUS, 0, 0, 0, Errno.EINVAL),
    (Cmd.BLOCK_STATUS, 0, SIZE, 512, Errno.EINVAL),
    (Cmd.BLOCK_STATUS, CmdFlag.DF, 0, 512, Errno.EINVAL),
    (8, 0, 0, 512, Errno.EINVAL),
    (0xFFFF, 0, 0, 512, Errno.EINVAL),
]


@pytest.mark.parametrize("mode", Mode)
def test_refused_requests_leave_the_stream_in_step(served, mode):
    with served.client(mode=mode) as client:
        refused = list(REFUSED)
        if mode is not Mode.EXTENDED:
            refused += [(Cmd.WRITE, CmdFlag.PAYLOAD_LEN, 0, 512, Errno.EINVAL)]
        if mode is Mode.SIMPLE:
            refused += [(Cmd.READ, CmdFlag.DF, 0, 512, Errno.EINVAL), (Cmd.BLOCK_STATUS, 0, 0, 512, Errno.EINVAL)]
        wanted = []
        for command, flags, offset, length, error in refused:
            payload = bytes(length) if command == Cmd.WRITE else b""
            wanted.append((client.submit(command, offset, length, flags, payload), error))
            wanted.append((client.submit(Cmd.READ, 8000, 512), 0))
        for cookie, error in wanted:
            result = client.wait(cookie)
            assert result.error == error, f"{result.request}: {result.text}"
            if not error:
                assert result.data == expected(8000, 512)
        assert served.path.read_bytes()[:8192] == expected(0, 8192)


def test_refusals_name_the_reason(served):
    with served.client() as client:
        texts = [client.call(command, offset, length, flags).text for command, flags, offset, length, _ in REFUSED[:7]]
    assert texts[0] == f"operation past EOF; From: {SIZE}, Len: 1, Size: {SIZE}"
    assert texts[2] == f"len ({MAX_REQUEST + 1}) is larger than max len ({MAX_REQUEST})"
    assert texts[5] == "unsupported flags for command read (got 0x8000)"


@pytest.mark.parametrize("mode", Mode)
def test_the_short_cuts_obey_the_same_rules(served, mode):
    """Whatever small request comes, the answer is what the plain statement of the rules says."""
    rng = random.Random(mode)
    with served.client(mode=mode) as client:
        selected = tuple(client.contexts.values())
        wanted = {}
        for _ in range(600):
            command = rng.choice([*Cmd, 8, 300])
            if command == Cmd.DISC:
                continue
            flags = rng.choice([0, 0, *CmdFlag, rng.randrange(1 << 16)])
            if mode is Mode.EXTENDED and command != Cmd.WRITE:
                flags &= ~int(CmdFlag.PAYLOAD_LEN)
            length = rng.choice([0, 1, 511, 512, 4096, 33_000])
            offset = rng.choice([0, 512, 1000, SIZE - length, SIZE - length + 1, SIZE])
            payload = bytes(length) if command == Cmd.WRITE else b""
            cookie = client.submit(command, offset, length, flags, payload)
            if mode is Mode.EXTENDED and command == Cmd.WRITE:
                flags |= CmdFlag.PAYLOAD_LEN
            request = Request(flags, command, cookie, offset, length)
            refusal = check(request, size=SIZE, read_only=False, mode=mode, selected=selected)
            wanted[cookie] = (request, refusal)
        for cookie, (request, refusal) in wanted.items():
            result = client.wait(cookie)
            if refusal is None and request.flags & CmdFlag.FAST_ZERO and result.error == Errno.ENOTSUP:
                continue
            assert result.error == (refusal.error if refusal else 0), f"{request}: {result.text}, {refusal}"


@pytest.mark.parametrize("length", [1, 512, 40_000, 600_000])
@pytest.mark.parametrize("command", [Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, 99])
def test_payload_where_none_belongs(served, command, length):
    with served.client(mode=Mode.EXTENDED) as client:
        cookie = client.submit(command, 0, length, CmdFlag.PAYLOAD_LEN, b"\xaa" * length)
        after = client.submit(Cmd.READ, 8000, 64)
        assert client.wait(cookie).error == Errno.EINVAL
        assert client.wait(after).data == expected(8000, 64)
        assert served.path.read_bytes()[:64] == expected(0, 64)


@pytest.mark.parametrize("payload", [b"", b"\0" * 7, struct.pack(">Q", 512), struct.pack(">QI", 512, 7), b"\0" * 4096])
def test_status_filters_that_are_not_valid(served, payload):
    with served.client(mode=Mode.EXTENDED) as client:
        cookie = client.submit(Cmd.BLOCK_STATUS, 0, len(payload), CmdFlag.PAYLOAD_LEN, payload)
        after = client.submit(Cmd.BLOCK_STATUS, 0, 12, CmdFlag.PAYLOAD_LEN, struct.pack(">QI", 512, 0))
        assert client.wait(cookie).error == Errno.EINVAL
        assert client.wait(after).status == {0: ((512, 0),)}


@pytest.mark.parametrize(("command", "mode"), [*((Cmd.WRITE, mode) for mode in Mode), (Cmd.READ, Mode.EXTENDED)])
def test_an_oversized_payload_ends_the_connection_after_its_error(served, mode, command):
    with served.client(mode=mode) as client:
        cookie = client.submit(command, 0, MAX_REQUEST + 1, CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0)
        assert client.wait(cookie).error == Errno.EINVAL
        assert client.ended()


@pytest.mark.parametrize("mode", Mode)
def test_a_bad_magic_ends_the_connection_after_what_came_before(served, mode):
    with served.client(mode=mode) as client:
        cookies = [client.submit(Cmd.READ, 8 * n, 8) for n in range(1000, 1010)]
        wrong = Request(0, Cmd.READ, 4711, 0, 512)
        client.push()
        client.expect(wrong)
        client.send(b"\xde\xad\xbe\xef" + wrong.build(mode)[4:] + bytes(100))
        assert client.wait(4711).error == Errno.EINVAL
        with contextlib.suppress(ConnectionEnded):  # answers that were not ready are cut off
            for n, cookie in zip(range(1000, 1010), cookies, strict=True):
                assert client.wait(cookie).data == n.to_bytes(8)
        assert client.ended()


def test_writes_to_a_read_only_export(served):
    served.daemon.export("f", "ro", "ro", writable=False)
    with served.client("ro") as client:
        assert not client.flags & 0x20
        for command, payload in ((Cmd.WRITE, bytes(512)), (Cmd.WRITE, bytes(100_000)), (Cmd.TRIM, b""), (6, b"")):
            result = client.call(command, 0, len(payload) or 512, 0, payload)
            assert (result.error, result.text) == (Errno.EPERM, "Export is read-only")
        assert client.read(8000, 64) == expected(8000, 64)
        client.flush()
    assert served.path.read_bytes()[:8192] == expected(0, 8192)
    served.daemon.execute("block-export-del", id="ro", mode="hard")


# --- Clients that stop half-way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1024, 300_000])
@pytest.mark.parametrize("sent", [0, 1, 500, -1])
@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.EXTENDED])
def test_nothing_of_a_write_happens_before_all_of_it_is_there(served, length, sent, mode):
    with served.client(mode=mode) as client:
        flags = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0
        payload = b"\xbb" * length
        client.send(Request(flags, Cmd.WRITE, 7, 8000, length).build(mode) + payload[:sent])
        assert client.sock.fileno() >= 0
    eventually(lambda: not served.export().clients)
    assert served.path.read_bytes()[8000 : 8000 + length] == expected(8000, length)


@pytest.mark.parametrize("mode", Mode)
def test_bytes_one_by_one(served, mode):
    with served.client(mode=mode) as client:
        for command, flags, payload in ((Cmd.WRITE, 0, b"slowly"), (Cmd.READ, 0, b""), (Cmd.WRITE, 2, b"no")):
            if command == Cmd.WRITE and mode is Mode.EXTENDED:
                flags |= CmdFlag.PAYLOAD_LEN
            request = Request(flags, command, client.in_flight + 100, 70, len(payload) or 6)
            client.expect(request)
            for byte in request.build(mode) + payload:
                client.send(bytes([byte]))
            result = client.wait(request.cookie)
            assert result.error == (Errno.EINVAL if flags & 2 else 0)
        assert client.read(70, 6) == b"slowly"


def test_the_end_of_the_road_in_one_direction(served):
    """A client that shuts down its sending half has said goodbye."""
    with served.client() as client:
        client.submit(Cmd.READ, 0, 4096)
        client.push()
        client.sock.shutdown(socket.SHUT_WR)
        assert client.ended()


# --- Clients that take without giving ---------------------------------------------------------------------------


def waiting_bytes(daemon):
    """Bytes that the daemon holds for clients who do not take them."""
    total = 0
    for export in daemon.nbd_server.exports:
        for client in export.clients:
            total += len(client._stash)
            total += sum(len(piece[0]) for piece in client.outbox._pieces if isinstance(piece, tuple))
    return total


@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.EXTENDED])
@pytest.mark.parametrize("length", [16, 32_000, 100_000, SIZE])
def test_a_client_that_asks_and_never_takes(served, length, mode):
    with served.client(mode=mode) as greedy, served.client() as other:
        asking = b"".join(Request(0, Cmd.READ, n, 0, length).build(mode) for n in range(20_000))
        sent = 0
        idle = time.monotonic()
        while time.monotonic() - idle < 0.3 and sent < len(asking):
            try:
                sent += greedy.sock.send(asking[sent:])
                idle = time.monotonic()
            except BlockingIOError:
                assert other.read(8000, 8) == expected(8000, 8)
        held = served.inside(waiting_bytes)
        assert held <= TURN_BYTES + MAX_IN_FLIGHT_BYTES + MAX_REQUEST
        for client in served.inside(lambda d: list(d.nbd_server.exports[0].clients)):
            assert client.in_flight.count <= MAX_IN_FLIGHT
            assert client._in_flight_bytes <= MAX_IN_FLIGHT_BYTES + MAX_REQUEST
        assert served.inside(lambda d: d.services.buffers.used) <= 3 * MAX_IN_FLIGHT_BYTES
        began = time.monotonic()
        for n in range(100):
            assert other.read(8 * n, 8) == n.to_bytes(8)
        assert time.monotonic() - began < 20


def test_many_small_reads_never_taken_are_not_collected(served):
    """A receive buffer holds thousands of requests; their answers may not all be made at once."""
    with served.client(mode=Mode.SIMPLE) as greedy:
        greedy.sock.setblocking(True)
        greedy.sock.sendall(b"".join(Request(0, Cmd.READ, n, 0, 32_000).build(Mode.SIMPLE) for n in range(3000)))
        time.sleep(0.2)
        assert served.inside(waiting_bytes) < 3 * TURN_BYTES


def test_odd_lengths_do_not_fill_the_memory(served):
    """Whatever lengths a client mixes, what the daemon keeps to be faster stays small."""
    rng = random.Random(9)
    with served.client(mode=Mode.SIMPLE) as client:
        for _ in range(10):
            for _ in range(1000):
                client.submit(Cmd.READ, 0, rng.randrange(1, 3000))
                client.submit(Cmd.READ, 0, 4096)
            while client.in_flight or client._finished:
                assert client.wait_any().error == 0
    kept = served.inside(lambda d: sum(len(slots) for slots in d.services._slots.values()))
    assert kept <= MAX_SLOTS


def test_promised_payloads_do_not_lock_others_out(served):
    """Clients that announce the largest writes and never send them hold memory, but not the daemon."""
    held = []
    for _ in range(BUFFER_LIMIT // MAX_REQUEST + 2):
        client = served.client(mode=Mode.EXTENDED)
        held.append(client)
        served.daemon.call(lambda: served.daemon.daemon.execute("query-block-exports"))
    served.inside(lambda d: setattr(d.services.buffers, "limit", 256 << 10))
    for client in held:
        client.send(Request(CmdFlag.PAYLOAD_LEN, Cmd.WRITE, 1, 0, SIZE).build(Mode.EXTENDED) + b"x")
    eventually(lambda: served.inside(lambda d: d.services.buffers.exhausted))
    with served.client(timeout=3) as other:
        for offset in (0, 4096, 100_000):
            assert other.read(offset, 300_000) == expected(offset, 300_000)
            other.write(offset, expected(offset, 300_000))
            other.flush()
        cookies = [other.submit(Cmd.READ, 0, 300_000) for _ in range(20)]
        for cookie in cookies:
            assert other.wait(cookie).data == expected(0, 300_000)
    for client in held:
        client.close()


# --- A great many requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", Mode)
def test_thousands_of_requests_in_one_burst(served, mode):
    rng = random.Random(1)
    with served.client(mode=mode) as client:
        wanted = {}
        for n in range(5000):
            offset = rng.randrange(SIZE // 2, SIZE - 600)
            wanted[client.submit(Cmd.READ, offset, 512)] = expected(offset, 512)
            if n % 50 == 0:
                client.submit(Cmd.WRITE, n * 64, 64, 0, expected(n * 64, 64))
            if n % 500 == 0:
                client.submit(Cmd.FLUSH)
        while client.in_flight or client._finished:
            result = client.wait_any()
            assert result.error == 0
            if result.request.cookie in wanted:
                assert result.data == wanted.pop(result.request.cookie)
        assert not wanted


def test_a_burst_of_one_client_does_not_starve_another(served):
    with served.client() as greedy, served.client() as other:
        for n in range(3000):
            greedy.submit(Cmd.READ, 0, 30_000 + n % 7)
        greedy.push()
        began = time.monotonic()
        assert other.read(8000, 8) == expected(8000, 8)
        assert time.monotonic() - began < 1
        for _ in range(3000):
            assert greedy.wait_any().error == 0


def test_disconnect_answers_what_came_before(served):
    with served.client() as client:
        for n in range(200):
            client.submit(Cmd.READ, n * 512, 5000)
        client.send(Request(0, Cmd.DISC, 0, 0, 0).build(client.mode))
        for _ in range(200):
            assert client.wait_any().error == 0
        assert client.ended()


def test_random_bytes_after_the_handshake(served):
    rng = random.Random(5)
    for n in range(60):
        mode = list(Mode)[n % 3]
        with served.client(mode=mode) as client, contextlib.suppress(ConnectionEnded, ProtocolError):
            for _ in range(rng.randrange(5)):
                magic = {Mode.EXTENDED: 0x21E41C71}.get(mode, 0x25609513)
                client.send(struct.pack(">IHH", magic, rng.randrange(64), rng.randrange(1, 10)) + rng.randbytes(40))
    content = served.path.read_bytes()
    assert len(content) == SIZE


# --- Peers that die with our bytes unread -----------------------------------------------------------------------
# The kernel then reports an error besides what is left to read, and uvloop calls the reader for the last time.


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("last", ["header", "payload", "refused payload", "whole refused payload"])
def test_death_in_the_middle_with_replies_unread(served, mode, last):
    flags = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0
    offset = SIZE if "refused" in last else 0
    request = Request(flags, Cmd.WRITE, 9, offset, 300_000).build(mode)
    for _ in range(10):
        client = served.client(mode=mode)
        client.sock.setblocking(True)
        client.sock.sendall(Request(0, Cmd.READ, 1, 0, 4096).build(mode))
        time.sleep(0.001)
        if last == "header":
            client.sock.sendall(request[:9])
        else:
            client.sock.sendall(request + bytes(300_000 if last.startswith("whole") else 100_000))
        client.close()
    eventually(lambda: not served.export().clients)


def test_a_monitor_survives_half_a_command_with_its_greeting_unread(sockets):
    path = str(sockets / "qmp")
    address = {"type": "unix", "data": {"path": path}}
    with DaemonThread() as daemon:
        backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        daemon.execute("chardev-add", id="c", backend=backend)
        daemon.call(lambda: daemon.daemon.add_monitor(visit(MonitorOptions, {"chardev": "c"})))
        for pause in (0, 0.01) * 5:
            with socket.socket(socket.AF_UNIX) as hasty:
                hasty.connect(path)
                time.sleep(pause)
                hasty.sendall(b'{"exec')
        with socket.socket(socket.AF_UNIX) as patient:
            patient.settimeout(5)
            patient.connect(path)
            assert patient.recv(100).startswith(b'{"QMP"')
