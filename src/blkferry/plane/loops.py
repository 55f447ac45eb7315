"""Which event loop we run on: uvloop where it is installed and works, asyncio's own otherwise."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop for a thread of ours."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class HasOptions(Protocol):
    """A socket, or something around one."""

    def getsockopt(self, level: int, option: int, /) -> int:
        """As of socket.socket."""


def ended_unseen(sock: HasOptions) -> bool:
    """Whether the peer is gone, although there may be bytes left to read.

    When a unix peer closes with our bytes unread, uvloop calls the reader once and never again, even if there were data
    before the end. A reader that answers finds out by sending; one that has nothing to say yet must ask.
    """
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
