"""Where a daemon leaves word for the one that comes after it: a directory that nobody else can enter."""

from __future__ import annotations

import os
import stat
from typing import Final

from blkferry.errors import Error, ErrorKind

ROOTS: Final = "/run"
"""Where root's is."""


def directory() -> str:
    """/run/blkferry for root, otherwise in XDG_RUNTIME_DIR, made if need be. Raises Error.

    The place must not depend on who starts the daemon how, or a restart would not find what was left.
    """
    parent = ROOTS if not os.geteuid() else os.environ.get("XDG_RUNTIME_DIR", "")
    if not parent:
        raise Error(
            ErrorKind.NOT_FOUND,
            "failed to set reconnect log file: there is no directory for it",
            hint="Set XDG_RUNTIME_DIR to a directory of your own, as systemd does in a session.",
        )
    path = os.path.join(parent, "blkferry")
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        _check(path)
    except OSError as error:
        raise Error.from_oserror(f"failed to set reconnect log file: '{path}'", error) from error
    return path


def _check(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Error(
            ErrorKind.DENIED,
            f"failed to set reconnect log file: '{path}' is not a directory of ours alone",
            hint=f"Remove it, or: chown {os.geteuid()} {path} && chmod 700 {path}",
        )
