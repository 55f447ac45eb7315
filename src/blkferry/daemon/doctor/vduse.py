"""VDUSE: an image as a block device of this host, or as a disk for a guest."""

from __future__ import annotations

from blkferry.daemon.doctor.finding import Check, Finding, State
from blkferry.daemon.doctor.machine import CAP_NET_ADMIN, Machine
from blkferry.exports.vduse_blk.bus import TOOL
from blkferry.exports.vduse_blk.control import CONTROL

ABOUT = "images as block devices of this host (blkferry serve --vduse)"


def _kernel(machine: Machine) -> Finding:
    if machine.has_module("vduse") or machine.exists(CONTROL):
        return Finding(State.OK, "the kernel has VDUSE")
    if machine.offers_module("vduse"):
        return Finding(State.MISSING, "the kernel's module vduse is not loaded", "modprobe vduse")
    return Finding(
        State.MISSING,
        f"kernel {machine.kernel} has no VDUSE",
        "Use one with CONFIG_VDPA_USER (Debian 13's has it, Ubuntu's is in linux-modules-extra). In a container it is "
        "the host that has to: modprobe vduse there.",
    )


def _control(machine: Machine) -> Finding | None:
    if not machine.exists(CONTROL):
        if not machine.has_module("vduse"):
            return None
        remedy = "Use the host's /dev: in a container, give it /dev/vduse as a volume."
        return Finding(State.MISSING, f"there is no {CONTROL}", remedy)
    if not machine.usable(CONTROL):
        remedy = f"Run as root, or let a udev rule give {CONTROL} and the devices beside it to your group."
        return Finding(State.MISSING, f"we may not open {CONTROL}", remedy)
    return Finding(State.OK, f"{CONTROL} can be opened")


def _tool(machine: Machine) -> Finding:
    if machine.program(TOOL) is None:
        return Finding(
            State.MISSING, f"there is no program '{TOOL}', which puts devices on the bus", "Install iproute2."
        )
    return Finding(State.OK, f"the program '{TOOL}' is there")


def _right(machine: Machine) -> Finding:
    if machine.may(CAP_NET_ADMIN):
        return Finding(State.OK, "we may put devices on the vDPA bus")
    remedy = f"Run as root, or have root do it: {TOOL} dev add name NAME mgmtdev vduse"
    return Finding(State.NOTE, "we may not put devices on the vDPA bus (CAP_NET_ADMIN)", remedy)


def _driver(machine: Machine) -> Finding | None:
    if not machine.has_module("vduse") and not machine.offers_module("vduse"):
        return None
    missing = [name for name in ("virtio_vdpa", "virtio_blk") if not machine.has_module(name)]
    if not missing:
        return Finding(State.OK, "devices on the bus become /dev/vdX")
    text = f"devices on the bus do not become /dev/vdX: {' and '.join(missing)} not loaded"
    return Finding(State.MISSING, text, f"modprobe -a {' '.join(missing)}")


def _guests(machine: Machine) -> Finding | None:
    if not machine.has_module("vduse") and not machine.offers_module("vduse"):
        return None
    if machine.has_module("vhost_vdpa"):
        return Finding(State.OK, "guests can have them (vhost-vdpa)")
    return Finding(State.NOTE, "guests cannot have them: vhost_vdpa is not loaded", "modprobe vhost_vdpa")


CHECKS: tuple[Check, ...] = (_kernel, _control, _tool, _right, _driver, _guests)
