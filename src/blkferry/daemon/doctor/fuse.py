"""FUSE: an image as a file."""

from __future__ import annotations

from blkferry.daemon.doctor.finding import Check, Finding, State
from blkferry.daemon.doctor.machine import CAP_SYS_ADMIN, Machine

ABOUT = "images as files (blkferry mount)"
DEVICE = "/dev/fuse"
CONFIGURATION = "/etc/fuse.conf"


def _device(machine: Machine) -> Finding:
    if not machine.exists(DEVICE):
        remedy = "modprobe fuse"
        if not machine.offers_module("fuse"):
            remedy = f"Give this container {DEVICE} (--device {DEVICE}), or load the module fuse where the kernel is."
        return Finding(State.MISSING, f"there is no {DEVICE}", remedy)
    if not machine.usable(DEVICE):
        return Finding(State.MISSING, f"we may not open {DEVICE}", f"chmod 666 {DEVICE}, or run as root.")
    return Finding(State.OK, f"{DEVICE} can be opened")


def _mounting(machine: Machine) -> Finding:
    if machine.may(CAP_SYS_ADMIN):
        return Finding(State.OK, "we may mount")
    if machine.program("fusermount3") is None:
        remedy = "Install fuse3, or run as root."
        return Finding(State.MISSING, "we may not mount, and there is no fusermount3 to do it for us", remedy)
    return Finding(State.OK, "fusermount3 mounts for us")


def _others(machine: Machine) -> Finding | None:
    if not machine.uid:
        return None
    if "user_allow_other" in (line.strip() for line in machine.lines(CONFIGURATION)):
        return Finding(State.OK, "other users can be let in")
    return Finding(
        State.NOTE, "other users cannot be let in (allow-other)", f"Put user_allow_other into {CONFIGURATION}."
    )


CHECKS: tuple[Check, ...] = (_device, _mounting, _others)
