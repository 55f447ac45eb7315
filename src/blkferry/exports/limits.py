"""What one client of whatever kind may ask of a turn, and hold of the daemon."""

from __future__ import annotations

from typing import Final

TURN_BYTES: Final = 8 << 20
"""What one client may move in a turn, so that it does not starve the others of its loop."""

PUT_COST: Final = TURN_BYTES // 64
"""What a write that its driver has to find a place for counts in a turn: it takes as long as reading that much."""

MAX_IN_FLIGHT: Final = 256
"""Requests of one client that may wait for the engine or a task; others are not received until then."""

MAX_IN_FLIGHT_BYTES: Final = 64 << 20
"""Their payload: two of NBD's largest requests."""
