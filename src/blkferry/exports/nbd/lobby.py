"""Clients of an NBD server that have not chosen an export: how many there may be, and who makes room for whom.

Nothing is known of them yet, so nobody among them may keep others out: not by being many, not by being slow, not by
saying nothing. Who has just come is safe, though, for long enough to choose an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blkferry.exports.nbd.negotiation import Negotiation

MOST = 512

SILENT_SECONDS = 0.2
"""A client that has said nothing for so long makes room first: a real one answers the greeting at once."""

TALKING_SECONDS = 1.0
"""The same for one that has."""


class Lobby:
    """Those who negotiate, of each kind in the order they came. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._silent: dict[Negotiation, float] = {}
        self._talking: dict[Negotiation, float] = {}

    def __len__(self) -> int:
        return len(self._silent) + len(self._talking)

    def __contains__(self, negotiation: Negotiation) -> bool:
        return negotiation in self._silent or negotiation in self._talking

    def __iter__(self) -> Iterator[Negotiation]:
        return iter([*self._silent, *self._talking])

    def enter(self, negotiation: Negotiation) -> None:
        """One has come."""
        self._silent[negotiation] = self._clock()

    def spoke(self, negotiation: Negotiation) -> None:
        """One has said something."""
        came = self._silent.pop(negotiation, None)
        if came is not None:
            self._talking[negotiation] = came

    def leave(self, negotiation: Negotiation) -> None:
        """One is served now, or gone."""
        self._silent.pop(negotiation, None)
        self._talking.pop(negotiation, None)

    def make_room(self) -> float | None:
        """Have somebody go, for one who waits outside: 0 when that is done, else in how many seconds it can be.

        None when nobody is here.
        """
        waits = []
        for among, patience in ((self._silent, SILENT_SECONDS), (self._talking, TALKING_SECONDS)):
            if among:
                negotiation, came = next(iter(among.items()))
                left = came + patience - self._clock()
                if left <= 0:
                    negotiation.close("it made room for others before it had chosen an export")
                    return 0.0
                waits.append(left)
        return min(waits, default=None)
