"""The vDPA bus, which leads from a VDUSE device to whoever uses it: sysfs tells what is there, `vdpa` changes it.

On the bus a device has a driver: virtio_vdpa makes a block device of it, vhost_vdpa gives it to a guest.
"""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import subprocess
import time
from typing import Final

from blkferry.errors import Error, ErrorKind

TOOL: Final = "vdpa"

ATTACH_SECONDS: Final = 30.0
"""How long the kernel may take to put a device on the bus or to take it off: as long as it waits for our answers."""

APPEAR_SECONDS: Final = 5.0
"""How long a driver may take to make something of a device that is on the bus."""


def _directory(name: str) -> str:
    return f"/sys/class/vduse/{name}/{name}"


def is_attached(name: str) -> bool:
    """Whether the VDUSE device of this name is on the vDPA bus."""
    return os.path.isdir(_directory(name))


def endpoint(name: str) -> str | None:
    """What the device has become, /dev/vdX or /dev/vhost-vdpa-N; None while that is nothing."""
    directory = glob.escape(_directory(name))
    for pattern in ("virtio*/block/*", "vhost-vdpa-*"):
        for path in glob.glob(f"{directory}/{pattern}"):
            return f"/dev/{os.path.basename(path)}"
    return None


def tool() -> str | None:
    """Where the program is that changes the bus; often in a directory that only root has on PATH."""
    return shutil.which(TOOL) or shutil.which(TOOL, path="/usr/sbin:/sbin:/usr/local/sbin")


def attach_command(name: str) -> str:
    """What puts a device on the bus, for people."""
    return shlex.join(_attach(name))


def detach_command(name: str) -> str:
    """What takes it off again."""
    return shlex.join(_detach(name))


def _attach(name: str) -> list[str]:
    return [TOOL, "dev", "add", "name", name, "mgmtdev", "vduse"]


def _detach(name: str) -> list[str]:
    return [TOOL, "dev", "del", name]


def attach(name: str) -> str | None:
    """Put a device on the bus, and return what it becomes, None if no driver wants it. Raises Error. Blocks."""
    _run(_attach(name), f"Cannot put '{name}' on the vDPA bus")
    deadline = time.monotonic() + APPEAR_SECONDS
    while (found := endpoint(name)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def detach(name: str) -> None:
    """Take a device off the bus; what is dirty is written first. Raises Error. Blocks while the device is served."""
    _run(_detach(name), f"Cannot take '{name}' off the vDPA bus")


def _run(command: list[str], doing: str) -> None:
    program, text = tool(), shlex.join(command)
    if program is None:
        raise Error(
            ErrorKind.NOT_FOUND,
            f"{doing}: there is no program '{TOOL}'",
            hint=f"It is part of iproute2. Install that, or do what `{text}` would do yourself.",
        )
    process = subprocess.Popen(  # noqa: S603 - no shell sees the name
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us
        text=True,
    )
    try:
        _, said = process.communicate(timeout=ATTACH_SECONDS)
    except subprocess.TimeoutExpired:
        # Not waited for: what waits for the kernel does not end even if it is killed.
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
        _left.append(process)
        hint = f"The kernel has not finished `{text}`; something may still wait for the device."
        raise Error(ErrorKind.BUSY, f"{doing}: it takes too long", hint=hint) from None
    if process.returncode:
        reason = said.strip().splitlines()[-1] if said.strip() else f"`{text}` failed"
        may = " It takes root (CAP_NET_ADMIN)." if os.geteuid() else ""
        raise Error(ErrorKind.IO, f"{doing}: {reason}", hint=f"`{text}` is what failed.{may}")


_left: list[subprocess.Popen[str]] = []
"""Programs that did not end in time."""
