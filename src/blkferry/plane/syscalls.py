"""The system calls that the standard library does not offer, by ctypes. Each raises OSError like os functions do."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import termios

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

MS_NOSUID = 0x02
MS_NODEV = 0x04
MNT_FORCE = 0x01
MNT_DETACH = 0x02
UMOUNT_NOFOLLOW = 0x08

_SYS_CACHESTAT = 451
_PR_SET_TIMERSLACK = 29
_FOUR_BYTES = bytes(4)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
_syscall.restype = ctypes.c_long
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]

_PAGE = os.sysconf("SC_PAGE_SIZE")


def precise_sleeps() -> None:
    """Let sleeps of this thread last as long as they should, to a microsecond; the kernel adds 50 otherwise."""
    _libc.prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def queued_bytes(fd: int) -> int:
    """How much there is to read from a socket."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, _FOUR_BYTES), sys.byteorder)


def unread_bytes(fd: int) -> int:
    """An upper bound of what the peer of a unix socket has not taken yet; 0 means that it has taken everything."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, _FOUR_BYTES), sys.byteorder)


class _Buffer(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.py_object),
        ("length", ctypes.c_ssize_t),
        ("item", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("rest", ctypes.c_void_p * 5),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.c_void_p]
_release_buffer.restype = None


def address_of(view: memoryview) -> int:
    """Where in this process the bytes of a view begin, also of one that is read-only."""
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    buffer = _Buffer()
    _get_buffer(view, ctypes.byref(buffer), 0)
    address = int(buffer.address)
    _release_buffer(ctypes.byref(buffer))
    return address


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2) with a mode (FALLOC_FL_*); the standard library has only mode 0."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return 0


def mount(source: str, target: str, filesystem: str, flags: int, options: str) -> None:
    """mount(2), with flags MS_*."""
    names = (os.fsencode(name) for name in (source, target, filesystem))
    if _libc.mount(*names, flags, os.fsencode(options)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def umount(target: str, flags: int) -> None:
    """umount2(2), with flags MNT_* and UMOUNT_NOFOLLOW."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def filesystem_type(fd: int) -> int:
    """The magic number of the file system that `fd` lies on, from statfs(2)."""
    result = ctypes.create_string_buffer(256)
    if _fstatfs(fd, result) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(struct.unpack_from("@l", result)[0]) & 0xFFFFFFFF


class CacheStat:
    """cachestat(2): is a range of a file in the page cache? Its buffers are made once, for it is called often.

    Not thread-safe: every loop has its own.
    """

    def __init__(self) -> None:
        self._range = bytearray(16)
        self._result = bytearray(40)
        self._range_address = ctypes.addressof(ctypes.c_char.from_buffer(self._range))
        self._result_address = ctypes.addressof(ctypes.c_char.from_buffer(self._result))
        self.available = True

    def resident(self, fd: int, offset: int, length: int) -> bool | None:
        """True when every page of the range is cached, None when the kernel does not tell (before 6.5, or not ours)."""
        if not self.available:
            return None
        struct.pack_into("=QQ", self._range, 0, offset, length)
        if _syscall(_SYS_CACHESTAT, fd, self._range_address, self._result_address, 0) != 0:
            if ctypes.get_errno() == 38:  # ENOSYS
                self.available = False
            return None
        pages = (offset + length - 1) // _PAGE - offset // _PAGE + 1
        return int.from_bytes(self._result[:8], sys.byteorder) >= pages
