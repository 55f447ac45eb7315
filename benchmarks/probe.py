"""The smallest NBD client there is: connect, read, stay.

It tells when a server is ready and times the first byte. It shares no code with blkferry, so that it cannot be kinder
to one server than to another. Any unexpected answer is an OSError.
"""

from __future__ import annotations

import socket
import ssl
import struct
from pathlib import Path
from typing import Self

EXPORT = "disk"
TIMEOUT = 5.0
_GREETING = struct.Struct(">8sQH")
_OPTION = struct.Struct(">QII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_MAGIC = 0x49484156454F5054
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPTION_REPLY = struct.Struct(">QIII")
_OPT_EXPORT_NAME = 1
_OPT_STARTTLS = 5
_ACK = 1
_EXPORT_REPLY_SIZE = 10  # size and flags
_CHECKED_LENGTHS = (4096, 256 << 10)  # what the workloads read
_CHECKED_EVERY = 200 << 20


class Probe:
    """A client that has been answered; with certificates it uses TLS."""

    def __init__(self, path: Path, certificates: Path | None = None) -> None:
        self._certificates = certificates
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        try:
            self._socket.connect(str(path))
            self._handshake()
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def read_one(cls, path: Path, certificates: Path | None = None) -> Self:
        """Connect and read the first block."""
        probe = cls(path, certificates)
        try:
            probe.read(0, 4096)
        except BaseException:
            probe.close()
            raise
        return probe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def _handshake(self) -> None:
        magic, option_magic, _flags = _GREETING.unpack(self._receive(_GREETING.size))
        if magic != b"NBDMAGIC" or option_magic != _OPTION_MAGIC:
            raise OSError("this is not a newstyle NBD server")
        name = EXPORT.encode()
        hello = struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES)
        self._socket.sendall(hello)
        if self._certificates is not None:
            self._start_tls(self._certificates)
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, _OPT_EXPORT_NAME, len(name)) + name)
        self._receive(_EXPORT_REPLY_SIZE)

    def _start_tls(self, certificates: Path) -> None:
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, _OPT_STARTTLS, 0))
        if _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))[2] != _ACK:
            raise OSError("the server has no TLS")
        context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
        self._socket = context.wrap_socket(self._socket, server_hostname="localhost")

    def read(self, offset: int, length: int) -> bytes:
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, 0, 7, offset, length))
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if (magic, error, cookie) != (0x67446698, 0, 7):
            raise OSError(f"a read was answered with magic {magic:#x}, error {error}")
        return self._receive(length)

    def check(self, image: Path) -> None:
        """See that the server answers with the image's bytes, to small reads and to large ones."""
        with image.open("rb") as file:
            for length in _CHECKED_LENGTHS:
                for offset in range(0, image.stat().st_size, _CHECKED_EVERY):
                    file.seek(offset)
                    if self.read(offset, length) != file.read(length):
                        raise OSError(f"the server's {length} bytes at {offset} are not the image's")

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            data += part
        return data
