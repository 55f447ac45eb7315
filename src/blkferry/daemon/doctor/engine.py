"""What does requests that may block: io_uring, or threads where that is not to be had."""

from __future__ import annotations

from blkferry.daemon.doctor.finding import Check, Finding, State
from blkferry.daemon.doctor.machine import Machine
from blkferry.plane.loops import new_event_loop
from blkferry.plane.ring import Ring, RingUnavailable

ABOUT = "reading and writing images fast"
SWITCH = "/proc/sys/kernel/io_uring_disabled"


def _io_uring(machine: Machine) -> Finding:
    loop = new_event_loop()
    try:
        Ring(loop, lambda: None).close()
    except RingUnavailable as refusal:
        remedy = "A container's filter of system calls may forbid it; Linux has it from 5.6 on."
        if machine.lines(SWITCH) not in ([], ["0"]):
            remedy = "sysctl kernel.io_uring_disabled=0"
        return Finding(State.NOTE, f"no io_uring ({refusal}): threads do its work, with more processor time", remedy)
    finally:
        loop.close()
    return Finding(State.OK, "the kernel lets us use io_uring")


CHECKS: tuple[Check, ...] = (_io_uring,)
