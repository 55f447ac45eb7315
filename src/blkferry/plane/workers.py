"""The fallback where io_uring is refused: a few threads behind the same calls.

Threads start when work first comes and end when they have had none for a while. Completions reach the loop in
batches, one wake-up for all that have gathered.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from blkferry.plane.engine import Done, Memory
from blkferry.plane.syscalls import fallocate

THREADS = 8
"""Enough to keep a disk busy; more only adds hand-offs."""

IDLE_SECONDS = 10.0
"""How long a thread waits for work before it ends: an idle daemon has none."""


class Workers:
    """A pool of threads owned by one loop."""

    name = "threads"

    def __init__(
        self, loop: asyncio.AbstractEventLoop, after_batch: Callable[[], None], threads: int = THREADS
    ) -> None:
        self._loop = loop
        self._after_batch = after_batch
        self._limit = threads
        self._jobs: queue.SimpleQueue[tuple[Callable[[], int], Done] | None] = queue.SimpleQueue()
        self._finished: deque[tuple[Done, int]] = deque()
        self._lock = threading.Lock()  # guards _threads, _idle and the transition of _finished from empty
        self._threads = 0
        self._idle = 0

    def read(self, fd: int, buffer: Memory, start: int, length: int, offset: int, done: Done) -> None:
        self._push(lambda: _read(fd, buffer.view[start : start + length], offset), done)

    def write(self, fd: int, buffer: Memory, start: int, length: int, offset: int, flags: int, done: Done) -> None:
        self._push(lambda: _write(fd, buffer.view[start : start + length], offset, flags), done)

    def readv(self, fd: int, pieces: Sequence[memoryview], offset: int, done: Done) -> None:
        self._push(lambda: os.preadv(fd, pieces, offset), done)

    def writev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, done: Done) -> None:
        self._push(lambda: os.pwritev(fd, pieces, offset, flags), done)

    def fdatasync(self, fd: int, done: Done) -> None:
        self._push(lambda: _fdatasync(fd), done)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, done: Done) -> None:
        self._push(lambda: fallocate(fd, mode, offset, length), done)

    def kick(self) -> None:
        """Nothing to do: threads start at once."""

    def close(self) -> None:
        """Let the threads end. Nothing may be in flight."""
        with self._lock:
            threads, self._limit = self._threads, 0
        for _ in range(threads):
            self._jobs.put(None)

    def _push(self, job: Callable[[], int], done: Done) -> None:
        self._jobs.put((job, done))
        with self._lock:
            start = self._jobs.qsize() > self._idle and self._threads < self._limit
            if start:
                self._threads += 1
        if start:
            threading.Thread(target=self._work, name="blkferry-worker", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                entry = self._jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                entry = None
            with self._lock:
                self._idle -= 1
                if entry is None and (not self._limit or self._jobs.empty()):
                    self._threads -= 1
                    return
            if entry is None:
                continue
            job, done = entry
            try:
                result = job()
            except OSError as error:
                result = -(error.errno or errno.EIO)
            with self._lock:
                wake = not self._finished
                self._finished.append((done, result))
            if wake:
                self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        while True:
            with self._lock:
                if not self._finished:
                    break
                batch = list(self._finished)
                self._finished.clear()
            for done, result in batch:
                done(result)
        self._after_batch()


def _fdatasync(fd: int) -> int:
    os.fdatasync(fd)
    return 0


def _read(fd: int, view: memoryview, offset: int) -> int:
    moved = 0
    while moved < len(view):
        count = os.preadv(fd, [view[moved:]], offset + moved)
        if count == 0:
            break
        moved += count
    return moved


def _write(fd: int, view: memoryview, offset: int, flags: int) -> int:
    moved = 0
    while moved < len(view):
        count = os.pwritev(fd, [view[moved:]], offset + moved, flags)
        if count == 0:
            return -errno.EIO
        moved += count
    return moved
