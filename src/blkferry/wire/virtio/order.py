"""Who sees which store first: memory ordering between this process and a driver in another."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from typing import Final

_TOTAL_STORE_ORDER: Final = frozenset({"x86_64", "amd64", "i686", "i386"})

WEAK: Final = platform.machine().lower() not in _TOTAL_STORE_ORDER


class Fence:
    """Memory ordering between this process and the driver's, in pure Python.

    Theory of operation. What CPython does for us: an aligned item of a memoryview that was cast to "H" is loaded and
    stored by one instruction (a two-byte memcpy, which every compiler turns into one), and is neither remembered nor
    reordered by the interpreter, with a GIL or without. What is left is the processor.

    x86-64 keeps loads in order, stores in order, and stores behind earlier loads. Only a load may overtake an earlier
    store: exactly what happens where both sides write one word and then look at the other's (suppression of
    notifications). aarch64 keeps nothing by itself. So rings call `full` between a store and such a load on every
    machine, and `light` in the other places, which is nothing on x86-64 and `full` elsewhere.

    The barrier is a lock of our own, which is always held: released and taken again. Release, by whatever means
    (semaphore, mutex, CPython's own since 3.13), is an atomic read-modify-write that no earlier access may pass; taking
    it is another one of the same word, which has to see the first, and which no later access may pass. On x86-64 both
    have a lock prefix, each a full barrier; on aarch64 a release and the acquire that reads from it are ordered, and so
    is everything around the two. It takes 0.1 us, once or twice a batch. A system call would not do: entering the
    kernel is no barrier.
    """

    __slots__ = ("_acquire", "_release", "full", "light")

    def __init__(self, *, weak: bool = WEAK) -> None:
        lock = threading.Lock()
        self._acquire, self._release = lock.acquire, lock.release
        self._acquire()
        self.full: Callable[[], object] = self._barrier
        self.light: Callable[[], object] = self._barrier if weak else _nothing

    def _barrier(self) -> None:
        self._release()
        self._acquire()


def _nothing() -> None:
    pass
