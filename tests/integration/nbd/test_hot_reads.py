"""Reads that are sent straight from the mapped file are the same reads."""

import os
import random
import time

import pytest

from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import Cmd, Errno, Mode

SIZE = 5 << 20


@pytest.fixture(params=["buffered", "memory", "window", "shuffled"])
def place(request, tmp_path):
    with DaemonThread() as daemon:
        made = nodes.add(daemon, request.param, tmp_path, SIZE)
        daemon.export(made.node)
        yield daemon, made


def is_hot(daemon, node="n"):
    async def look():
        graph = daemon.daemon.graph
        below = graph.find(node)
        while below.storage is None:
            below = below.children["file"].node
        window = below.storage.window()
        return window.marks.count(window.hot)

    return daemon.call(look)


def warm(daemon, client):
    """Read until something is hot; the clock may strike in between."""
    for _ in range(10):
        for offset in range(0, client.size - 4096, 1 << 18):
            client.read(offset, 4096)
            client.read(offset, 512)
        if is_hot(daemon):
            return
    raise AssertionError("nothing became hot")


@pytest.mark.parametrize("mode", Mode)
def test_the_bytes_are_right(place, mode):
    daemon, _ = place
    rng = random.Random(7)
    with daemon.client(mode=mode) as client:
        data = rng.randbytes(client.size)
        client.write(0, data)
        warm(daemon, client)
        for _ in range(40):
            cookies = {}
            for _ in range(60):
                length = rng.choice((1, 512, 4096, 31000, rng.randrange(1, 32768)))
                offset = rng.randrange(client.size - length + 1)
                cookies[client.submit(Cmd.READ, offset, length)] = (offset, length)
            client.push()
            for cookie, (offset, length) in cookies.items():
                assert client.wait(cookie).data == data[offset : offset + length]


def test_a_write_is_seen_at_once(place):
    daemon, _ = place
    with daemon.client() as client:
        client.write(0, b"a" * client.size)
        warm(daemon, client)
        for number in range(200):
            at = number * 8192
            client.write(at, bytes([number % 255 + 1]) * 4096)
            assert client.read(at, 4096) == bytes([number % 255 + 1]) * 4096


def test_a_discard_is_seen_at_once(place):
    daemon, _ = place
    with daemon.client(mode=Mode.STRUCTURED) as client:
        client.write(0, b"a" * client.size)
        warm(daemon, client)
        client.zero(8192, 8192)
        assert client.read(8192, 8192) == bytes(8192)
        assert client.read(4096, 4096) == b"a" * 4096


def test_a_client_that_takes_its_time_gets_every_byte(place):
    """What the socket does not take is sent from the file later, behind a header that went out before."""
    daemon, _ = place
    data = os.urandom(SIZE)
    with daemon.client() as client:
        client.write(0, data[: client.size])
        warm(daemon, client)
        offsets = [(number * 28672) % (client.size - 28672) for number in range(600)]
        cookies = [client.submit(Cmd.READ, offset, 28672) for offset in offsets]
        open_files = len(os.listdir("/proc/self/fd"))
        client.push()
        time.sleep(0.3)
        assert len(os.listdir("/proc/self/fd")) <= open_files + 1  # for what waits, however many pieces that is
        for cookie, offset in zip(cookies, offsets, strict=True):
            assert client.wait(cookie).data == data[offset : offset + 28672]


def test_an_image_that_is_cut_off_is_an_error_to_the_request(tmp_path):
    with DaemonThread() as daemon:
        place = nodes.add(daemon, "buffered", tmp_path, SIZE)
        daemon.export(place.node)
        with daemon.client() as client:
            client.write(0, b"a" * client.size)
            warm(daemon, client)
            os.truncate(place.path, 1 << 20)
            assert client.call(Cmd.READ, 3 << 20, 4096).error == Errno.EIO
            assert client.read(0, 4096) == b"a" * 4096
        with daemon.client() as other:
            assert other.read(4096, 4096) == b"a" * 4096
