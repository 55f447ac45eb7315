"""What a check is, and what comes out of it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from blkferry.daemon.doctor.machine import Machine


class State(enum.StrEnum):
    """How things are."""

    OK = "ok"
    NOTE = "note"  # it works, but not all of it, or not as well as it might
    MISSING = "missing"  # it does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on how something is, and, unless it is well, what to do about it."""

    state: State
    text: str
    remedy: str = ""


Check = Callable[[Machine], Finding | None]
"""Looks at one thing; None where it says nothing after what another check has found."""
