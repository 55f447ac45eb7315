"""NBD needs nothing but sockets."""

from __future__ import annotations

from blkferry.daemon.doctor.finding import Check, Finding, State
from blkferry.daemon.doctor.machine import Machine

ABOUT = "images for NBD clients (blkferry serve)"


def _sockets(machine: Machine) -> Finding:
    del machine
    return Finding(State.OK, "NBD needs nothing that a machine could lack")


CHECKS: tuple[Check, ...] = (_sockets,)
