"""What both programs have in common towards the person who started them: complaints, the log, and early signals.

Imports nothing heavy, since it is there before anything else is.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from blkferry.errors import Error


def exit_on_signals() -> None:
    """End quietly, with 0, on a signal that comes while nothing is there yet that would have to be put in order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
        signal.signal(signal.SIGHUP, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(0)


def complain(program: str, error: Error) -> None:
    """Say on standard error what is wrong and what would be right."""
    sys.stderr.write(f"{program}: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"{error.hint}\n")


def log_to_stderr(program: str, verbosity: int = 0) -> None:
    """Send the log to standard error: warnings, with verbosity 1 what happens, with 2 everything."""
    import logging

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(max(verbosity, 0), 2)]
    logging.basicConfig(level=level, format=f"{program}: %(message)s", stream=sys.stderr)
