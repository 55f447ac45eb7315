"""QMP commands: one function each, taking the daemon and the typed arguments, returning a schema value or None."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon

Handler = Callable[["Daemon", Any], Awaitable[object]]

HANDLERS: dict[str, Handler] = {}


def command(name: str) -> Callable[[Handler], Handler]:
    """Register the function that executes a command."""

    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        return handler

    return register


from blkferry.daemon.commands import bitmap, block, char, control, export, job, objects, snapshot, transaction  # noqa: E402 - they register themselves

__all__ = [
    "HANDLERS",
    "Handler",
    "bitmap",
    "block",
    "char",
    "command",
    "control",
    "export",
    "job",
    "objects",
    "snapshot",
    "transaction",
]
