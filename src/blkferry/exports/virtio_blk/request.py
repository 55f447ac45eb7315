"""One request of a driver: a chain whose parts have been told apart, and what it was answered."""

from __future__ import annotations

from blkferry.wire.virtio.chain import Chain
from blkferry.wire.virtio_blk import BARRIER, HEADER


class Malformed(Exception):  # noqa: N818 - the driver's fault
    """There is no header to read, or no byte for the status."""


class Request:
    """A chain taken apart (virtio 1.3, section 5.2.6): a header of 16 bytes first, the status byte last.

    How the driver cuts it into descriptors means nothing (section 2.7.4). `data` is what lies between: pieces of the
    driver's memory to write to the disk from, or to read to; `length` bytes together. `written` is what the used ring
    says: all bytes to write, the status with them, as QEMU does.
    """

    __slots__ = ("chain", "data_in", "data_out", "length_in", "length_out", "sector", "status", "type", "written")

    def __init__(self, chain: Chain) -> None:
        """Raises Malformed."""
        self.chain = chain
        header, self.data_out = _split(chain.readable, HEADER.size)
        self.written = sum(map(len, chain.writable))
        if len(header) < HEADER.size or not chain.writable:
            raise Malformed("a request without a header or a status byte")
        kind, _, self.sector = HEADER.unpack(header)
        self.type = kind & ~BARRIER
        last = chain.writable[-1]
        self.status = last[-1:]
        self.data_in = [*chain.writable[:-1], last[:-1]] if len(last) > 1 else chain.writable[:-1]
        self.length_in = self.written - 1
        self.length_out = sum(map(len, self.data_out))


def _split(pieces: list[memoryview], count: int) -> tuple[bytes, list[memoryview]]:
    """The first `count` bytes, or fewer, and the pieces that follow them."""
    if pieces and len(pieces[0]) == count:
        return bytes(pieces[0]), pieces[1:]
    head, rest = b"", []
    for piece in pieces:
        part = count - len(head)
        head += bytes(piece[:part])
        if part < len(piece):
            rest.append(piece[part:])
    return head, rest


def gather(pieces: list[memoryview], skip: int, length: int) -> list[memoryview]:
    """The part of `pieces` that begins `skip` bytes into them."""
    found: list[memoryview] = []
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        part = piece[skip : skip + length]
        found.append(part)
        length -= len(part)
        skip = 0
        if not length:
            break
    return found
