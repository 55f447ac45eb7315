"""Memory shared with a peer who may take it away: looking at it must not end the daemon.

Theory of operation. A mapped file that its owner cuts off raises SIGBUS when a byte behind its end is looked at. System
calls get EFAULT instead, so payload that the kernel moves is safe; but rings, headers and status bytes are looked at by
Python, and payload by drivers that compress or encrypt. A descriptor that is sealed (F_SEAL_SHRINK) cannot be cut off;
others can, at any moment.

So there is a handler for SIGBUS, a Python function behind a ctypes callback. This is not what signal handlers usually
are: it runs on the very instruction that looked at the memory, in the thread that did so, as if that instruction had
called it. The instruction is one of a memoryview or of struct, or a copy, that works on memory it was given and holds
no lock; what the interpreter has in hand there, it has in hand at any call. The handler puts an empty page where the
peer's was, tells the mapping's owner (`lost`), and returns; the instruction is done again, and sees zeroes. Whoever
acts on what he read asks first whether something was lost. What the kernel moves from and to other pages still gets
EFAULT.

The other way would be to look at shared memory by system calls only. It was measured: process_vm_readv on ourselves
costs 3 us a call and 1 us for each piece, pread of the peer's file 1 us, where a load costs 0.03 us: more than all else
that is done for a request. Two bytes may be torn, which a ring's index must not be; and payload would have to be copied
before any driver may look at it. This costs nothing, so sealed and unsealed memory are served alike.

Any other SIGBUS is what it was before: whoever handled it then handles it again.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import threading
import weakref
from typing import Final, Protocol

from blkferry.plane.syscalls import address_of

_SA_SIGINFO: Final = 4
_ADDRESS_OFFSET: Final = 16
"""Of si_addr in siginfo_t, where pointers have 64 bits."""

_PROT: Final = mmap.PROT_READ | mmap.PROT_WRITE
_FIXED: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10


class _SigAction(ctypes.Structure):
    """struct sigaction of the C library on Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_sigaction = _libc.sigaction
_sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class Owner(Protocol):
    """Who wants to know that memory of his was gone when this process looked at it."""

    lost: bool


_mappings: dict[object, tuple[int, int, weakref.ref[Owner]]] = {}
"""Start, end and owner of each. Changed by single operations only: the handler may read it at any time."""

_installing = threading.Lock()
_before = _SigAction()
"""What handled SIGBUS before us."""


def guarded_map(fd: int, length: int, offset: int, owner: Owner, *, prot: int = _PROT) -> memoryview:
    """Map `length` bytes of `fd` from `offset`, a multiple of the page size; they stay mapped as long as views of them.

    When something was gone that this process looked at, `owner.lost` is set, in whatever thread that was. Raises
    OSError or ValueError as mmap does.
    """
    mapped = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
    view = memoryview(mapped)
    start = address_of(view)
    token = object()
    _mappings[token] = start, start + length, weakref.ref(owner)  # weak, for the owner will keep the view
    weakref.finalize(mapped, _mappings.pop, token, None).atexit = False
    _install()
    return view


def _install() -> None:
    """Have our handler called; somebody may have put his own in its place since."""
    with _installing:
        present = _SigAction()
        _sigaction(signal.SIGBUS, None, ctypes.byref(present))
        if present.handler != _HANDLER_ADDRESS:
            ctypes.memmove(ctypes.byref(_before), ctypes.byref(present), ctypes.sizeof(present))
            ours = _SigAction(handler=_HANDLER_ADDRESS, flags=_SA_SIGINFO)
            _sigaction(signal.SIGBUS, ctypes.byref(ours), None)


def _on_sigbus(_signal: int, info: int, _context: int) -> None:
    address = ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value
    for start, end, owner in list(_mappings.values()):
        if start <= address < end:
            page = address & -mmap.PAGESIZE
            put = _mmap(page, mmap.PAGESIZE, _PROT, _FIXED, -1, 0)
            if put == _MAP_FAILED:  # it is a part of a huge page
                put = _mmap(start, end - start, _PROT, _FIXED, -1, 0)
            if put != _MAP_FAILED:
                alive = owner()
                if alive is not None:
                    alive.lost = True
                return
    _sigaction(
        signal.SIGBUS, ctypes.byref(_before), None
    )  # the instruction is done again, and finds who was here before


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_sigbus)
_HANDLER_ADDRESS = ctypes.cast(_HANDLER, ctypes.c_void_p).value
