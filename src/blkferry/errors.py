"""The one error type of the control plane, and the closed set of kinds callers can match.

Messages are for the person who typed the option: what was wrong, which value, what would be right.
The data path does not raise these: it speaks errno numbers, which every protocol maps by its own table.
"""

from __future__ import annotations

import enum
import errno


class ErrorKind(enum.Enum):
    """What went wrong, coarse enough to match on. Each protocol maps every kind to one of its codes."""

    NOT_FOUND = "not-found"
    EXISTS = "exists"
    BUSY = "busy"
    DENIED = "denied"
    INVALID_ARGUMENT = "invalid-argument"
    UNSUPPORTED = "unsupported"
    CORRUPT = "corrupt"
    IO = "io"
    NO_SPACE = "no-space"
    GONE = "gone"
    UNKNOWN_COMMAND = "unknown-command"


class Error(Exception):
    """A request that cannot be done.

    `kind` is one of `ErrorKind`, `message` one sentence, `hint` (may be empty) what to do about it, and
    `facts` the values the sentence was built from (node, path, offset, field), for programs.
    """

    def __init__(self, kind: ErrorKind, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return self.message

    @classmethod
    def from_oserror(cls, doing: str, error: OSError, *, hint: str = "", **facts: object) -> Error:
        """Wrap what the kernel said: "Could not open 'disk.img': No such file or directory"."""
        kind = _KIND_OF_ERRNO.get(error.errno or 0, ErrorKind.IO)
        return cls(kind, f"{doing}: {error.strerror}", hint=hint, errno=error.errno, **facts)


_KIND_OF_ERRNO = {
    errno.ENOENT: ErrorKind.NOT_FOUND,
    errno.EEXIST: ErrorKind.EXISTS,
    errno.EBUSY: ErrorKind.BUSY,
    errno.EAGAIN: ErrorKind.BUSY,
    errno.EADDRINUSE: ErrorKind.BUSY,
    errno.EACCES: ErrorKind.DENIED,
    errno.EPERM: ErrorKind.DENIED,
    errno.EROFS: ErrorKind.DENIED,
    errno.EINVAL: ErrorKind.INVALID_ARGUMENT,
    errno.EISDIR: ErrorKind.INVALID_ARGUMENT,
    errno.ENOTDIR: ErrorKind.INVALID_ARGUMENT,
    errno.ENAMETOOLONG: ErrorKind.INVALID_ARGUMENT,
    errno.EOPNOTSUPP: ErrorKind.UNSUPPORTED,
    errno.ENOSYS: ErrorKind.UNSUPPORTED,
    errno.ENOSPC: ErrorKind.NO_SPACE,
    errno.EDQUOT: ErrorKind.NO_SPACE,
    errno.EFBIG: ErrorKind.NO_SPACE,
    errno.ENODEV: ErrorKind.GONE,
    errno.ENXIO: ErrorKind.GONE,
    errno.ESHUTDOWN: ErrorKind.GONE,
}
