"""A file beside a bytearray, and random histories of what is done to both."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from blkferry.plane.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate

SIZE = 300 << 10
LARGEST = 2 << 20
SECTOR = 512


class Both:
    """The file and the model. Offsets and lengths need not fit: what is refused, and what comes short, is known."""

    def __init__(self, path: Path, *, growable: bool) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.growable = growable
        self.model = bytearray(SIZE)
        self._memory = mmap.mmap(-1, LARGEST)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.direct)
        self._memory.close()

    def write(self, offset, data, fd=None):
        size = len(self.model)
        if offset + len(data) > size and self.growable:
            self.model += bytes(offset + len(data) - size)
        elif offset >= size:
            with pytest.raises(OSError) as caught:
                os.pwrite(self.fd, data, offset)
            assert caught.value.errno == errno.ENOSPC
            return
        data = data[: len(self.model) - offset] if not self.growable else data
        assert os.pwrite(self.fd if fd is None else fd, data, offset) == len(data)
        self.model[offset : offset + len(data)] = data

    def read(self, offset, length):
        assert os.pread(self.fd, length, offset) == self.model[offset : offset + length]

    def write_direct(self, offset, data):
        length = min(len(data), max(len(self.model) - offset, 0))
        if length:
            self._memory[:length] = data[:length]
            with memoryview(self._memory) as view, view[:length] as part:
                assert os.pwrite(self.direct, part, offset) == length
            self.model[offset : offset + length] = data[:length]

    def read_direct(self, offset, length):
        expected = self.model[offset : offset + length]
        with memoryview(self._memory) as view, view[:length] as part:
            assert os.preadv(self.direct, [part], offset) == len(expected)
            assert part[: len(expected)] == expected

    def mapped(self, offset, data):
        """Change something through a shared mapping, and read what is around it."""
        size = len(self.model)
        data = data[: max(size - offset, 0)]
        if not size:
            return
        with mmap.mmap(self.fd, size) as mapping:
            mapping[offset : offset + len(data)] = data
            self.model[offset : offset + len(data)] = data
            start = max(offset - 5000, 0)
            assert mapping[start : offset + len(data) + 5000] == self.model[start : offset + len(data) + 5000]

    def truncate(self, size):
        os.ftruncate(self.fd, size)
        self.model[size:] = bytes(max(size - len(self.model), 0))

    def punch(self, offset, length):
        fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        end = min(offset + length, len(self.model))
        self.model[offset:end] = bytes(max(end - offset, 0))

    def zero(self, offset, length):
        fallocate(self.fd, FALLOC_FL_ZERO_RANGE, offset, length)
        end = offset + length
        self.model += bytes(max(end - len(self.model), 0))
        self.model[offset:end] = bytes(length)

    def seek(self, offset):
        """What is called a hole is zero; what lies between is found."""
        size = len(self.model)
        if offset >= size:
            return
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = size
        assert not any(self.model[offset:data])
        hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        assert offset <= hole <= size
        assert offset in (hole, data)

    def sync(self):
        os.fsync(self.fd)

    def play(self, history):
        """Do all that, and look at the whole in the end."""
        for name, *arguments in history:
            getattr(self, name)(*arguments)
            assert os.fstat(self.fd).st_size == len(self.model)
        self.read(0, LARGEST * 2)


def ranges(unit):
    limit = LARGEST // 2 // unit
    offsets = st.one_of(st.integers(0, limit), st.integers(0, SIZE // unit), st.just(SIZE // unit))
    return offsets.map(lambda number: number * unit)


def lengths(unit):
    counts = st.one_of(st.integers(1, 16 if unit > 1 else 9000), st.integers(1, 200_000 // unit))
    return counts.map(lambda number: number * unit)


def contents(unit):
    return st.builds(
        lambda length, seed: bytes([seed, 7, seed ^ 255]) * (length // 3) + b"\1" * (length % 3),
        *(lengths(unit), st.integers(0, 255)),
    )


def operations(unit):
    """Of any length, and where files change their size in sectors."""
    return st.one_of(
        st.tuples(st.just("write"), ranges(unit), contents(unit)),
        st.tuples(st.just("write"), ranges(unit), contents(unit)),
        st.tuples(st.just("read"), ranges(1), lengths(1)),
        st.tuples(st.just("write_direct"), ranges(SECTOR), contents(SECTOR)),
        st.tuples(st.just("read_direct"), ranges(SECTOR), lengths(SECTOR)),
        st.tuples(st.just("mapped"), ranges(1), contents(1)),
        st.tuples(st.just("truncate"), ranges(SECTOR)),
        st.tuples(st.just("punch"), ranges(1), lengths(1)),
        st.tuples(st.just("zero"), ranges(SECTOR), lengths(SECTOR)),
        st.tuples(st.just("seek"), ranges(1)),
        st.tuples(st.just("sync")),
    )
