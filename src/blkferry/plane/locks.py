"""Image locks that QEMU understands: OFD read locks on single bytes of the image file.

For every permission bit, byte 100 + bit is locked by whoever uses that permission and byte 200 + bit by whoever does
not let others use it. Taking a permission therefore asks whether anybody holds its 200-byte, refusing to share one
whether anybody holds its 100-byte. The locks live on a descriptor of their own, so that the image can be re-opened
without letting go. Calls here may block (network file systems): run them in a thread.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from blkferry.errors import Error, ErrorKind

_USED_BASE = 100
_UNSHARED_BASE = 200

_FLOCK = struct.Struct("hhqqi4x")


class Permission(enum.IntFlag):
    """What a user of a node may do; the bit values are those of QEMU's image locks."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8

    @property
    def label(self) -> str:
        """The name used in messages: "consistent read", "write"."""
        return ", ".join(str(bit.name).lower().replace("_", " ") for bit in self)


ALL = Permission.CONSISTENT_READ | Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE


class ImageLock:
    """The locks of one open image. `path` is only for messages."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._held: set[int] = set()

    def apply(self, used: Permission, unshared: Permission) -> None:
        """Hold exactly these permissions from now on.

        Raises Error(BUSY), naming who is in the way where that can be known; what was held before stays held then.
        """
        wanted = {_USED_BASE + _bit(p) for p in used} | {_UNSHARED_BASE + _bit(p) for p in unshared}
        added = wanted - self._held
        try:
            # Lock first, look second: of two processes that do this at once at least one sees the other.
            for byte in added:
                self._set(byte, fcntl.F_RDLCK)
            for permission in used:
                self._refuse_if_locked(_UNSHARED_BASE + _bit(permission), f'Failed to get "{permission.label}" lock')
            for permission in unshared:
                self._refuse_if_locked(_USED_BASE + _bit(permission), f'Failed to get shared "{permission.label}" lock')
        except Error:
            for byte in added:
                self._set(byte, fcntl.F_UNLCK)
            raise
        for byte in self._held - wanted:
            self._set(byte, fcntl.F_UNLCK)
        self._held = wanted

    def _set(self, byte: int, kind: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Error(ErrorKind.BUSY, f"Failed to lock byte {byte}", path=self.path) from error
            raise Error.from_oserror(f"Could not lock '{self.path}'", error, path=self.path) from error

    def _refuse_if_locked(self, byte: int, message: str) -> None:
        try:
            reply = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            raise Error.from_oserror(f"Could not ask for the locks of '{self.path}'", error, path=self.path) from error
        if _FLOCK.unpack(reply)[0] == fcntl.F_UNLCK:
            return
        holder = next(holders(self.path, byte, excluding=self._fd), None)
        by = f": it is held by {holder}" if holder else ""
        raise Error(
            ErrorKind.BUSY, f"{message}{by}", hint=f"Is another process using the image [{self.path}]?", path=self.path
        )

    def close(self) -> None:
        """Let go of everything."""
        os.close(self._fd)


def _bit(permission: Permission) -> int:
    return permission.value.bit_length() - 1


def supported(fd: int) -> bool:
    """Whether OFD locks work on this file at all (some network file systems refuse them)."""
    probe = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(probe, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _USED_BASE, 1, 0))
    except OSError:
        return False
    finally:
        os.close(probe)
    return True


def holders(path: str, byte: int, *, excluding: int = -1) -> Iterator[str]:
    """The processes that hold an OFD lock on `byte` of the file at `path`, as "name (pid 12)".

    /proc/locks has no owner for these locks, but the descriptor information of each process lists them. Processes of
    other users may be hidden from us; then nobody is found.
    """
    try:
        image = os.stat(path)
    except OSError:
        return
    own = os.getpid()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            if int(pid) == own and int(descriptor) == excluding:
                continue
            try:
                status = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if (status.st_dev, status.st_ino) != (image.st_dev, image.st_ino):
                    continue
                with open(f"/proc/{pid}/fdinfo/{descriptor}") as lines:
                    locked = any(_covers(line, byte) for line in lines if line.startswith("lock:"))
                if locked:
                    with open(f"/proc/{pid}/comm") as name:
                        yield f"{name.read().strip()} (pid {pid})"
                    break
            except OSError:
                continue


def _covers(line: str, byte: int) -> bool:
    """Whether a line of fdinfo ("lock: 1: OFDLCK ADVISORY READ -1 fd:00:123 100 101") speaks of this byte."""
    words = line.split()
    if "OFDLCK" not in words:
        return False
    first, last = words[-2], words[-1]
    return int(first) <= byte and (last == "EOF" or byte <= int(last))
