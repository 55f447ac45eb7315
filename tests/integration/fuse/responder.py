"""Just enough of a FUSE server that a mounted file can be looked at: it answers what the kernel asks first."""

from __future__ import annotations

import os
import select
import stat
import struct
import threading

GETATTR, OPEN, RELEASE, FLUSH, INIT, FORGET = 3, 14, 18, 25, 26, 2
ENOSYS = 38
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_ATTR_OUT = struct.Struct("=QII QQQ QQQ III III III I")
_INIT = struct.Struct("=IIIIHHII")


class Responder:
    """Serves one file of `size` bytes on a descriptor until that is closed, or the file system is mounted nowhere."""

    def __init__(self, fd: int, size: int = 4096) -> None:
        self._fd, self._size = fd, size
        self._waking, self._waker = os.pipe()
        self.gone = threading.Event()
        """Set when the kernel says that nobody can use the file system any more."""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self) -> None:
        """Stop answering, and close the descriptor, which makes the mount a dead one if it is still there."""
        os.close(self._waker)
        self._thread.join()
        os.close(self._waking)
        os.close(self._fd)

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._waking], [], [])
            if self._waking in ready:
                return
            try:
                request = os.read(self._fd, 1 << 17)
            except BlockingIOError:
                continue
            except OSError:
                self.gone.set()
                return
            _, opcode, unique, *_ = _IN.unpack_from(request)
            if opcode != FORGET:
                error, answer = self._answer(opcode)
                os.write(self._fd, _OUT.pack(_OUT.size + len(answer), -error, unique) + answer)

    def _answer(self, opcode: int) -> tuple[int, bytes]:
        if opcode == INIT:
            return 0, _INIT.pack(7, 31, 1 << 17, 0, 16, 12, 1 << 16, 1) + bytes(64 - _INIT.size)
        if opcode == GETATTR:
            valid, inode, blocks, times, mode, owner, block_size = (
                (1, 0, 0),
                1,
                8,
                (0,) * 6,
                stat.S_IFREG | 0o600,
                (0, 0),
                4096,
            )
            return 0, _ATTR_OUT.pack(*valid, inode, self._size, blocks, *times, mode, 1, *owner, 0, block_size, 0)
        if opcode == OPEN:
            return 0, struct.pack("=QII", 0, 1, 0)
        return (0 if opcode in (RELEASE, FLUSH) else ENOSYS), b""
