"""Noticing that a file system is mounted nowhere any more, where /dev/fuse does not say so.

Other mount namespaces (containers, sandboxes) may have copies of a mount that was there when they were made. As long as
they live the kernel keeps the connection, although nobody here finds the file any more.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from blkferry.exports.fuse import mountinfo


class Watch:
    """Has a thread that sleeps until the kernel's table of mounts changes (proc(5)), and looks for one of them.

    `gone` is called in that thread, once, when the file system of this device number is not in the table.
    """

    def __init__(self, device: int, gone: Callable[[], None]) -> None:
        self._device = device
        self._gone = gone
        self._end, self._end_here = os.pipe()
        threading.Thread(target=self._watch, name="blkferry-mounts", daemon=True).start()

    def close(self) -> None:
        """End it. `gone` may still be called at this moment."""
        os.close(self._end_here)

    def _watch(self) -> None:
        try:
            with open(mountinfo.TABLE) as table:  # before the first look, so that no change comes between
                poll = select.poll()
                poll.register(table, select.POLLPRI)
                poll.register(self._end, select.POLLHUP)
                while mountinfo.by_device(self._device) is not None:
                    if any(fd == self._end for fd, _ in poll.poll()):
                        return
            with contextlib.suppress(RuntimeError):  # the loop that is to be told has ended
                self._gone()
        finally:
            os.close(self._end)
