"""Who may talk to an NBD server: TLS, and who a client must be by it."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol


class Credentials(Protocol):
    """What a server shows, and how it knows whom it talks to."""

    def context(self) -> ssl.SSLContext:
        """What TLS is made with on one connection; called in the task that shakes hands, as is `identity`."""

    def identity(self, tls: ssl.SSLObject) -> str:
        """Who the peer is: the distinguished name of its certificate, or what its key is called; empty if unknown."""


@dataclass(frozen=True, slots=True)
class Security:
    """TLS is required. `credentials` gives those that are valid now: they may be replaced while we serve.

    `authorize`, where there is one, tells whether a peer with this identity may see the exports; `rule` is what it is
    called, for the log.
    """

    credentials: Callable[[], Credentials]
    authorize: Callable[[str], Awaitable[bool]] | None = None
    rule: str = ""
