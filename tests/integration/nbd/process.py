"""A daemon in a process of its own: `python process.py SOCKET ENGINE COMMANDS`.

The commands are JSON, [[name, arguments], ...]. It says "ready" when they are done and ends when its input does.
With REFUSE_IO_URING in its environment it first puts a seccomp filter over itself that refuses io_uring_setup, as
container run-times do.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

_SETUP = 425  # io_uring_setup, the same number on every architecture
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2


def refuse_io_uring() -> None:
    """Make io_uring_setup fail with EPERM in this process from now on."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, 0),  # the system call's number
            (_JUMP_IF_EQUAL, 0, 1, _SETUP),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.addressof(header), 0, 0)):
        if libc.prctl(*map(ctypes.c_ulong, arguments)) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


class Process:
    """Starts such a process and waits until it is ready."""

    def __init__(self, socket: str, *commands: tuple[str, dict[str, object]], engine="auto", prefix=(), **environment):
        self.socket = socket
        argv = [*prefix, sys.executable, __file__, socket, engine, json.dumps(commands)]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()
        assert self.said[:1] == ["ready"], "the daemon did not start"

    @property
    def pid(self) -> int:
        return self.process.pid

    def resident(self) -> int:
        """Bytes of memory it uses."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """Let it end in order; returns its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reap()
        return self.process.returncode

    def _reap(self) -> None:
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.returncode is None:
            self.kill()


def main(socket: str, engine: str, commands: str) -> None:
    from blkferry.testing.daemon import DaemonThread

    with DaemonThread(engine=engine) as daemon:
        daemon.socket = socket
        daemon.serve()
        for name, arguments in json.loads(commands):
            daemon.execute(name, **arguments)
        sys.stdout.write(f"ready {daemon.daemon.services.engine.name}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    if "REFUSE_IO_URING" in os.environ:
        refuse_io_uring()
    main(*sys.argv[1:])
