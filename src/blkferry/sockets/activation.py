"""Socket activation: systemd listens, and starts us with the sockets (sd_listen_fds(3)).

They are descriptors 3 and following, LISTEN_FDS many, for the process LISTEN_PID, called LISTEN_FDNAMES (by default
after the .socket unit they are from; several sockets may have one name).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blkferry.errors import Error, ErrorKind
from blkferry.sockets.descriptors import Descriptors

if TYPE_CHECKING:
    from collections.abc import MutableMapping

FIRST = 3  # SD_LISTEN_FDS_START
UNNAMED = "unknown"


def take_activation(environ: MutableMapping[str, str]) -> Descriptors:
    """Return what was passed to this process, and remove all word of it from the environment. Raises Error."""
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    descriptors = Descriptors()
    if pid != str(os.getpid()):  # meant for whoever started us
        return descriptors
    limit = os.sysconf("SC_OPEN_MAX")
    if not (count.isascii() and count.isdigit() and len(count) <= 9 and FIRST + int(count) <= limit):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"LISTEN_FDS is '{count[:20]}', which no number of descriptors can be",
            hint=f"a number from 0 to {limit - FIRST}, as systemd sets it",
        )
    labels = names.split(":") if names else [UNNAMED] * int(count)
    if len(labels) != int(count):
        raise Error(
            ErrorKind.INVALID_ARGUMENT, f"LISTEN_FDNAMES has {len(labels)} names for {count} descriptors of LISTEN_FDS"
        )
    for fd, label in enumerate(labels, FIRST):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise Error.from_oserror(f"Descriptor {fd} of the {count} that LISTEN_FDS promises", error) from error
        descriptors.add(label or UNNAMED, fd)
    return descriptors
