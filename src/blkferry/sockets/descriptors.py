"""Sockets that others opened for us: inherited ones by their number, those that were handed over by their name.

Names are looked up where the asking task stands (`use`): a monitor's commands see what its client passed, and
what whoever started the daemon passed. Numbers are for the latter alone: a client cannot know which are what, and
would take the daemon's own.

Invariants: a descriptor in `Descriptors` is ours, and who takes it owns it; one that is only a number is not ours
before it has proved to be what was asked for.
"""

from __future__ import annotations

import os
import socket
import stat
from contextvars import ContextVar
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_NAMED = 64  # of one client: far more than anybody needs, far less than a process may have


class Descriptors:
    """Descriptors with names, several of which may have one name; behind them those of `parent`.

    Those that arrive have no name until `name_arrived`; the next ones to arrive replace them.
    """

    def __init__(self, parent: Descriptors | None = None, *, numbers: bool = True) -> None:
        """`numbers`: whether a number may stand for a descriptor, too."""
        self.numbers = numbers
        self._parent = parent
        self._names: dict[int, str] = {}
        self._arrived: list[int] = []

    @property
    def names(self) -> list[str]:
        """All there are, each once."""
        behind = self._parent.names if self._parent is not None else []
        return list(dict.fromkeys([*self._names.values(), *behind]))

    def add(self, name: str, fd: int) -> None:
        """Keep a descriptor."""
        self._names[fd] = name

    def take(self, text: str) -> list[int]:
        """Give up all that have this name, or else the one with this number; nothing when there is none."""
        found = [fd for fd, name in self._names.items() if name == text]
        if not found and self.numbers:
            found = [fd for fd in self._names if str(fd) == text]
        for fd in found:
            del self._names[fd]
        if not found and self._parent is not None:
            return self._parent.take(text)
        return found

    def drop(self, name: str) -> bool:
        """Close those with this name, the parent's excepted; False when there is none."""
        found = [fd for fd, its_name in self._names.items() if its_name == name]
        for fd in found:
            del self._names[fd]
            os.close(fd)
        return bool(found)

    def arrive(self, fds: list[int]) -> None:
        """Keep descriptors that came with a message for the command in it."""
        if fds:
            self._close_arrived()
            self._arrived = fds

    def name_arrived(self, name: str) -> None:
        """Call the first that arrived so, instead of what has that name. Raises Error when none did, or of too many."""
        if not self._arrived:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "No file descriptor supplied via SCM_RIGHTS",
                hint="It comes with the message of this command, over a unix socket.",
            )
        self.drop(name)
        if len(self._names) >= MAX_NAMED:
            raise Error(ErrorKind.BUSY, f"There are {MAX_NAMED} file descriptors already", hint="closefd closes one.")
        self.add(name, self._arrived.pop(0))

    def _close_arrived(self) -> None:
        for fd in self._arrived:
            os.close(fd)
        self._arrived = []

    def close(self) -> None:
        """Close those that nobody took."""
        self._close_arrived()
        for name in list(self._names.values()):
            self.drop(name)


_current: ContextVar[Descriptors | None] = ContextVar("descriptors", default=None)


def current() -> Descriptors | None:
    """Return where the running task looks names up."""
    return _current.get()


def use(descriptors: Descriptors) -> None:
    """Look names up here from now on, in this task and those that it creates."""
    _current.set(descriptors)


def take(text: str, check: Callable[[socket.socket], object]) -> list[socket.socket]:
    """Return the stream sockets that `text` stands for, at least one, non-blocking and the caller's to close.

    `check` raises Error when a socket will not do.
    """
    descriptors = current()
    if descriptors is None:
        return [_inherited(text, check)]
    if owned := descriptors.take(text):
        taken: list[socket.socket] = []
        try:
            for fd in owned:
                taken.append(_socket(text, fd, check))  # noqa: PERF401 - those before the one that fails are closed
        except Error:
            for sock in taken:
                sock.detach()
            for fd in owned:
                os.close(fd)
            raise
        return taken
    known = ", ".join(descriptors.names)
    if descriptors.numbers:
        return [_inherited(text, check, f"; known names are {known}" if known else "")]
    raise Error(
        ErrorKind.NOT_FOUND,
        f"File descriptor named '{text}' has not been found",
        hint=f"Known names: {known}." if known else "Pass one with getfd first.",
    )


def _inherited(text: str, check: Callable[[socket.socket], object], known: str = "") -> socket.socket:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Unable to parse FD number {text[:20]}",
            hint=f"Give the decimal number of an inherited descriptor, or the name of a socket from systemd{known}.",
        )
    return _socket(text, int(text), check)


def _socket(text: str, fd: int, check: Callable[[socket.socket], object]) -> socket.socket:
    """Make a socket of a descriptor, and leave that alone if it will not do."""
    hint = ""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket, hint = False, "It is not even open: whoever starts us has to pass it."
    if not is_socket:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"File descriptor '{text}' is not a socket", hint=hint)
    sock = socket.socket(fileno=fd)
    try:
        if sock.type != socket.SOCK_STREAM:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"File descriptor '{text}' is not a stream socket")
        check(sock)
    except Error:
        sock.detach()
        raise
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock
