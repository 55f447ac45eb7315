"""What an export says in the log about requests that failed: one line a second, for a full disk fails thousands."""

from __future__ import annotations

import time
from logging import Logger
from typing import Final

QUIET_SECONDS: Final = 1.0
"""After a line nothing more is said for so long."""


class Complaints:
    """Of one client or device."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._quiet_until = 0.0
        self._unsaid = 0

    def add(self, who: str, text: str) -> None:
        """Log that a request of `who` failed, and how many did that nothing was said of; or count it among those."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} failures before it)" if self._unsaid else ""
        self._log.warning("%s: %s%s", who, text, more)
        self._quiet_until, self._unsaid = now + QUIET_SECONDS, 0
