"""A TLS socket that never waits: everything arrives once and in order, however little the sockets take at a time."""

import asyncio
import contextlib
import os
import random
import socket
import ssl
import threading

import pytest

from blkferry.plane.tls import TlsSocket


def anonymous(protocol):
    """TLS without certificates: what it is made with is not what is tested."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH:@SECLEVEL=0")
    return context


SERVER = anonymous(ssl.PROTOCOL_TLS_SERVER)
CLIENT = anonymous(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def pair():
    """A TlsSocket after its handshake, and the stdlib's at the other end, which blocks."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.settimeout(20)
    secured = TlsSocket(ours, SERVER)
    wrapped = []
    thread = threading.Thread(target=lambda: wrapped.append(CLIENT.wrap_socket(theirs)))
    thread.start()
    asyncio.run(secured.shake_hands())
    thread.join()
    yield secured, wrapped[0]
    secured.close()
    wrapped[0].close()


def receive_all(peer, length):
    data = bytearray()
    while len(data) < length and (part := peer.recv(1 << 16)):
        data += part
    return bytes(data)


class Receiver(threading.Thread):
    """Takes what comes, now and then a little only."""

    def __init__(self, peer, length):
        super().__init__()
        self.peer, self.length, self.data = peer, length, b""
        self.start()

    def run(self):
        self.data = receive_all(self.peer, self.length)


def test_pieces_of_all_kinds_arrive_once_and_in_order(pair, tmp_path):
    ours, theirs = pair
    rng = random.Random(5)
    content = rng.randbytes(1 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        pieces = []
        for _ in range(200):
            length = rng.choice([1, 28, 4096, 70_000, 600_000])
            start = rng.randrange(len(content) - length)
            pieces.append((rng.choice(["send", "more", "file", "gathered"]), start, length))
        pieces.append(("send", 0, 1))  # MSG_MORE needs something after it
        expected = b"".join(content[start : start + length] for _, start, length in pieces)
        receiver = Receiver(theirs, len(expected))
        refusals = 0
        for kind, start, length in pieces:
            while length:
                view = memoryview(content)[start : start + length]
                try:
                    match kind:
                        case "send":
                            sent = ours.send(view)
                        case "more":
                            sent = ours.send(view, socket.MSG_MORE)
                        case "gathered":
                            sent = ours.sendmsg([view[: length // 2], view[length // 2 :]])
                        case _:
                            sent = ours.send_file(file.fileno(), start, length)
                except BlockingIOError:
                    refusals += 1
                    continue
                assert 0 < sent <= length
                start, length = start + sent, length - sent
    receiver.join(20)
    assert receiver.data == expected
    assert refusals > 100, "the socket never was full: nothing has been tested"


def test_what_comes_is_filled_into_views_of_any_size(pair):
    ours, theirs = pair
    data = random.Random(6).randbytes(3 << 20)
    sender = threading.Thread(target=theirs.sendall, args=(data,))
    sender.start()
    got = bytearray()
    rng = random.Random(7)
    while len(got) < len(data):
        view = memoryview(bytearray(rng.choice([1, 28, 5000, 1 << 18])))
        try:
            count = ours.recv_into(view)
        except BlockingIOError:
            assert not ours.ready
            continue
        assert count == len(view) or not ours.ready
        got += view[:count]
    sender.join()
    assert got == data
    with pytest.raises(BlockingIOError):
        ours.recv(1)


@pytest.mark.parametrize("goodbye", [True, False])
def test_the_end_of_the_stream(pair, goodbye):
    ours, theirs = pair
    theirs.sendall(b"last words")
    if goodbye:
        theirs.settimeout(0)
        with contextlib.suppress(OSError):  # it sends its close_notify and does not wait for ours
            theirs.unwrap()
    theirs.close()
    assert ours.recv(100) == b"last words"
    assert ours.recv(100) == b""


def test_bytes_that_are_no_tls_are_an_error(pair):
    ours, theirs = pair
    os.write(theirs.fileno(), b"\x25\x60\x95\x13" * 20)
    with pytest.raises(OSError, match=r"(?i)wrong.version|unexpected|record"):
        ours.recv(100)


def test_a_handshake_that_fails_says_why_to_both():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(20)
    nothing_in_common = anonymous(ssl.PROTOCOL_TLS_CLIENT)
    nothing_in_common.set_ciphers("ECDHE+AESGCM")
    failures = []

    def connect():
        try:
            nothing_in_common.wrap_socket(theirs)
        except ssl.SSLError as error:
            failures.append(error.reason)

    thread = threading.Thread(target=connect)
    thread.start()
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        asyncio.run(TlsSocket(ours, SERVER).shake_hands())
    thread.join()
    assert len(failures) == 1
    assert "ALERT_HANDSHAKE_FAILURE" in failures[0]
    ours.close()
    theirs.close()


def test_a_peer_that_leaves_during_the_handshake():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.send(b"\x16\x03\x01\x02")
    theirs.close()
    with pytest.raises(OSError, match=r"went away|EOF"):
        asyncio.run(TlsSocket(ours, SERVER).shake_hands())
    ours.close()


def test_closing_during_the_handshake_leaves_openssl_to_the_thread_that_is_at_it():
    """A client that is too slow is closed by the loop; OpenSSL's objects must not be used by two threads at a time."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    secured = TlsSocket(ours, SERVER)
    entered, leave, others = threading.Event(), threading.Event(), []

    class Busy:
        def do_handshake(self):
            entered.set()
            leave.wait(20)
            raise ssl.SSLWantReadError

        def unwrap(self):
            others.append("unwrap")

    secured.tls = Busy()

    async def cut():
        shaking = asyncio.create_task(secured.shake_hands())
        await asyncio.to_thread(entered.wait)
        shaking.cancel()
        secured.close()
        leave.set()
        with contextlib.suppress(asyncio.CancelledError):
            await shaking

    asyncio.run(cut())
    assert not others
    assert theirs.recv(1) == b""
    theirs.close()
