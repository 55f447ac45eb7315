"""Making and removing VDUSE devices, by /dev/vduse/control.

Everything here may wait for the kernel: call it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import bus
from blkferry.wire.vduse.ioctls import (
    API_VERSION,
    NAME_SIZE,
    DeviceConfig,
    Ioctl,
    build_name,
    build_version,
)

DIRECTORY: Final = "/dev/vduse"
CONTROL: Final = f"{DIRECTORY}/control"

_FAILED = "failed to create vduse device"


def check_name(name: str) -> None:
    """Raise Error(INVALID_ARGUMENT) if no device can be called this."""
    if name in ("", ".", "..", "control") or "/" in name or "\0" in name or len(name.encode()) >= NAME_SIZE:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"'{name}' cannot be the name of a VDUSE device",
            hint=f"A name has up to {NAME_SIZE - 1} bytes and no '/', and is not 'control'. Like disk0.",
            name=name,
        )


def create(config: DeviceConfig) -> tuple[int, bool]:
    """Make a device, or take one over that another daemon has left on the vDPA bus.

    Returns its descriptor and whether it was there already. Raises Error with nothing left behind.
    """
    control = _open_control()
    try:
        found = _make(control, config)
        try:
            return _open_device(config.name), found
        except BaseException:
            if not found:
                _ignoring_errors(lambda: fcntl.ioctl(control, Ioctl.DESTROY_DEV, build_name(config.name)))
            raise
    finally:
        os.close(control)


def _open_control() -> int:
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        hint = "Load the kernel's module: modprobe vduse. `blkferry doctor vduse` tells what else is missing."
        raise Error.from_oserror(f"{_FAILED}: Failed to open {CONTROL}", error, hint=hint) from error
    except PermissionError as error:
        hint = f"Run as root, or get the right to open {CONTROL} and the devices beside it (a udev rule can give it)."
        raise Error.from_oserror(f"{_FAILED}: Failed to open {CONTROL}", error, hint=hint) from error
    except OSError as error:
        raise Error.from_oserror(f"{_FAILED}: Failed to open {CONTROL}", error) from error
    try:
        fcntl.ioctl(control, Ioctl.SET_API_VERSION, build_version(API_VERSION))
    except OSError as error:
        os.close(control)
        hint = f"{CONTROL} does not speak version {API_VERSION} of VDUSE."
        raise Error.from_oserror(f"{_FAILED}: Failed to set the API version", error, hint=hint) from error
    return control


def _make(control: int, config: DeviceConfig) -> bool:
    """Tell whether the device was there before. One that is on no bus is of no use to anybody and is made anew."""
    request = config.build()
    try:
        fcntl.ioctl(control, Ioctl.CREATE_DEV, request)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise Error.from_oserror(_FAILED, error) from error
    else:
        return False
    if bus.is_attached(config.name):
        return True
    try:
        fcntl.ioctl(control, Ioctl.DESTROY_DEV, build_name(config.name))
        fcntl.ioctl(control, Ioctl.CREATE_DEV, request)
    except OSError as error:
        raise taken(config.name) from error
    return False


def _open_device(name: str) -> int:
    path = f"{DIRECTORY}/{name}"
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise taken(name) from error
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = f"The kernel has made the device, but its node is not in {DIRECTORY}: is this the host's /dev?"
        raise Error.from_oserror(f"{_FAILED}: Failed to open {path}", error, hint=hint) from error


def taken(name: str) -> Error:
    """Somebody else serves the device of this name."""
    return Error(
        ErrorKind.BUSY,
        f"{_FAILED}: '{name}' is served by another process",
        hint=f"Choose another name, or end that process; `fuser {DIRECTORY}/{name}` tells which it is.",
        name=name,
    )


def destroy(name: str) -> bool:
    """Remove a device that nobody has open; tell whether it is gone. One that is on the vDPA bus stays."""
    try:
        control = _open_control()
    except Error:
        return False
    try:
        fcntl.ioctl(control, Ioctl.DESTROY_DEV, build_name(name))
    except OSError as error:
        return error.errno == errno.EINVAL  # there is none of this name
    finally:
        os.close(control)
    return True


def _ignoring_errors(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError:
        pass
