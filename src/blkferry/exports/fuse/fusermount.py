"""`fusermount3`: mounting and unmounting for those who may not do it themselves. All calls block.

It is setuid root, mounts where its caller may write, and passes the descriptor of /dev/fuse over a socket whose number
it finds in _FUSE_COMMFD.
"""

from __future__ import annotations

import array
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence

from blkferry.errors import Error, ErrorKind

PROGRAM = "fusermount3"
SECONDS = 10.0
"""It only asks the kernel; if that takes longer, then for ever."""

COULD_NOT_MOUNT = "Failed to mount FUSE session to export"

_SELDOM = re.compile(r"([,\\])")
_REMEDIES = {
    "user_allow_other": "Root has to put the line user_allow_other into /etc/fuse.conf; or use allow-other=off.",
    "too many FUSE": "Root may raise mount_max in /etc/fuse.conf.",
    "/dev/fuse": "Root has to let users in: chmod 666 /dev/fuse.",
    "device not found": "The kernel's module is missing: modprobe fuse.",
    "Permission denied": "One has to have the right to write to a file to mount over it.",
    "Operation not permitted": "Is it setuid root? Containers need the right to mount (CAP_SYS_ADMIN) as well.",
}


def mount(path: str, source: str, options: Sequence[str]) -> int:
    """Mount over `path`; return the descriptor of /dev/fuse. Raises Error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        escaped = _SELDOM.sub(r"\\\1", source)
        words = ",".join([*options, f"fsname={escaped}"])
        complaint = _run(["-o", words, "--", path], socket_fd=theirs.fileno())
        if complaint:
            raise Error(ErrorKind.DENIED, f"{COULD_NOT_MOUNT}: {complaint}", hint=_remedy(complaint), path=path)
        theirs.close()
        return _receive(ours)


def unmount(path: str, *, lazy: bool) -> None:
    """Unmount what the caller has mounted. Raises Error(BUSY), or Error(DENIED) with what it says."""
    complaint = _run(["-u", *(["-z"] if lazy else []), "--", path])
    if complaint:
        kind = ErrorKind.BUSY if "busy" in complaint else ErrorKind.DENIED
        raise Error(kind, f"Cannot unmount '{path}': {complaint}", path=path)


def _run(arguments: list[str], *, socket_fd: int | None = None) -> str:
    """Run it; return its complaint, empty if it has none."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Only root may mount without {PROGRAM}, which is not there",
            hint="Install it (the package is called fuse3), or start blkferry as root.",
        )
    environment = dict(os.environ, LC_ALL="C")
    if socket_fd is not None:
        environment["_FUSE_COMMFD"] = str(socket_fd)
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and our own arguments
            [program, *arguments],
            pass_fds=() if socket_fd is None else (socket_fd,),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Error(ErrorKind.IO, f"{PROGRAM} does not run: {error}") from error
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()
    return said[-1].removeprefix(f"{PROGRAM}: ").removeprefix(f"{program}: ") if said else f"{PROGRAM} failed"


def _receive(sock: socket.socket) -> int:
    """The descriptor that came over the socket."""
    sock.settimeout(SECONDS)
    room = array.array("i", [0])
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(room.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return array.array("i", data[: room.itemsize])[0]
    raise Error(ErrorKind.IO, f"{COULD_NOT_MOUNT}: {PROGRAM} sent no descriptor")


def _remedy(complaint: str) -> str:
    return next((remedy for words, remedy in _REMEDIES.items() if words in complaint), "")
