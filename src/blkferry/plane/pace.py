"""Whether writes may be made within a turn, or have to go by the engine because the kernel makes writers wait.

A buffered write sleeps when memory is dirtied faster than the disk takes it, up to 200 ms a time, and with it all of a
loop. The clock alone does not tell that from a thread that others kept off the processor, which needs no remedy. What
does is whether the thread gave the processor up by itself. To count that takes as long as a small write: so a turn
that takes too long only has those that follow counted, and the first that also slept stops writing within turns.
"""

from __future__ import annotations

import resource
import time
from typing import Final

STALL_SECONDS: Final = 0.005
"""A turn with writes that takes longer, and sleeps, was throttled by the kernel."""

WRITE_SECONDS: Final = 100e-6
"""What each write may take besides: a turn with many of them is not one that stalled."""

STALL_PENALTY: Final = 20
"""For so many times as long as a turn stalled, writes go by the engine: what the kernel makes wait stays away for
seconds, what had to wait for a lock once hardly notices."""

CAREFUL_SECONDS: Final = 10.0
"""For so long after a turn that took too long, or after the penalty, turns are counted."""


class Pace:
    """Of those who write to one storage; owned by its loop.

    Who may write within a turn calls `begin` first, and `end` when he has. Either may be left out where it would do
    nothing: in a turn that begins at `careful_until` (monotonic seconds) or later, and after one that was short.
    """

    __slots__ = ("_sleeps", "careful_until", "inline_from")

    def __init__(self) -> None:
        self.inline_from = 0.0
        self.careful_until = 0.0  # never before `inline_from`
        self._sleeps = 0

    def begin(self, now: float) -> bool:
        """Whether writes may be made within the turn that begins."""
        if now < self.inline_from:
            return False
        if now < self.careful_until:
            self._sleeps = _sleeps()
        return True

    def end(self, began: float, writes: int) -> None:
        """Judge the turn, or a part of it, that has taken from `began` until now."""
        now = time.monotonic()
        took = now - began
        if took <= STALL_SECONDS + writes * WRITE_SECONDS:
            return
        if began < self.careful_until and _sleeps() > self._sleeps:
            self.stop(now + STALL_PENALTY * took)
        self.careful_until = max(now, self.inline_from) + CAREFUL_SECONDS

    def stop(self, until: float) -> None:
        """Have all writes go by the engine until then (monotonic seconds)."""
        self.inline_from = self.careful_until = until


def _sleeps() -> int:
    """How often this thread has given the processor up to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
