"""The nbd driver against servers that do not keep to the protocol: an error, never a wrong byte or a wait."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest

from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC

GREETING = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 3)
SIZE = 1 << 20


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


REFUSED = 0x80000001
AGREED = (
    GREETING
    + reply(11, REFUSED)
    + reply(8, 1)
    + reply(10, REFUSED)
    + reply(7, 3, struct.pack(">HQH", 0, SIZE, 1))
    + reply(7, 1)
)


@contextlib.contextmanager
def scripted(path: str, said: bytes, answer: bytes = b""):
    """A server that says the same to everybody, whatever it is asked; `answer` once it has heard a request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.sendall(said)
                        heard = b""
                        while answer and b"\x25\x60\x95\x13" not in heard and (more := client.recv(4096)):
                            heard += more
                        client.sendall(answer)
                        client.shutdown(socket.SHUT_WR)
                        while client.recv(4096):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def add(daemon: DaemonThread, path: str) -> None:
    daemon.execute(
        "blockdev-add",
        **{"driver": "nbd", "node-name": "n", "read-only": True, "server": {"type": "unix", "path": path}},
    )


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"SSH-2.0-OpenSSH_9.2 and more text", "not an NBD server"),
        (GREETING[:-2] + b"\0\0", "fixed newstyle"),
        (GREETING + b"\0" * 20, "option reply magic"),
        (GREETING + reply(5, 1), "reply to option 5 where EXTENDED_HEADERS was sent"),
        (GREETING + reply(11, 3) * 100, "more than 64 replies"),
        (GREETING + struct.pack(">QIII", OPTION_REPLY_MAGIC, 11, 1, 1 << 31), "option reply of 2147483648 bytes"),
        (AGREED[: -len(reply(7, 1) + reply(7, 3, bytes(12)))] + reply(7, 1), "did not tell the size"),
        (GREETING, "closed the connection"),
    ],
)
def test_handshakes(tmp_path, said, error):
    path = str(tmp_path / "s")
    with scripted(path, said), DaemonThread() as daemon, pytest.raises(Error, match=error):
        add(daemon, path)


def chunk(kind: int, cookie: int, payload: bytes, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense" * 4,
        chunk(1, 77, struct.pack(">Q", 0) + bytes(512)),
        chunk(1, 1, struct.pack(">Q", 4096) + bytes(512)),
        chunk(1, 1, struct.pack(">Q", 0) + bytes(1024)),
        chunk(1, 1, struct.pack(">Q", 0) + bytes(256)),
        chunk(2, 1, struct.pack(">QI", 0, 1 << 31)),
        2 * chunk(1, 1, struct.pack(">Q", 0) + bytes(256), flags=0) + chunk(0, 1, b""),
        chunk(5, 1, struct.pack(">III", 0, 512, 0)),
        struct.pack(">IHHQI", 0x668E33EF, 1, 1, 1, 1 << 31),
        struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(512),
        b"",
    ],
)
def test_replies(tmp_path, answer):
    path = str(tmp_path / "s")
    with scripted(path, AGREED, answer), DaemonThread() as daemon:
        add(daemon, path)
        daemon.export("n", writable=False)
        with daemon.client() as client, pytest.raises(OSError, match="5"):
            client.read(0, 512)
