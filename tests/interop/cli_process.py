"""Running `blkferry` and `blkferry-qsd` as the processes they are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 20.0
"""Seconds in which anything that happens at all has happened."""


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def finish(name: str, *argv: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run one to its end."""
    command = [program(name), *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
    )


class Running:
    """One that runs; what it says arrives in `said` when it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; return the exit code and what it said on both streams."""
        self.process.send_signal(number)
        said, complaints = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said, complaints


@contextlib.contextmanager
def running(name: str, *argv: str | Path, cwd: Path | None = None) -> Iterator[Running]:
    command = [program(name), *map(str, argv)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=cwd
    )
    with process:
        try:
            yield Running(process)
        finally:
            process.kill()


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
