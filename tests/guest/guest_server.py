"""`blkferry-qsd` in a process of its own that can be stopped, killed and started again where it was."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE = 30.0
"""Seconds in which a daemon starts, or ends."""
PROGRAM = (
    "import logging, sys; from blkferry.cli.qsd import main; logging.basicConfig(level=logging.INFO); sys.exit(main())"
)
"""blkferry-qsd, with a log that tells who comes and goes; it has no option for that."""


class Server:
    """A daemon with these options and its NBD server on `port` of 127.0.0.1; use it as a context manager.

    With `tls`, a directory of certificates, it insists on them.
    """

    def __init__(self, directory: Path, *options: str, tls: Path | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = directory / "server.log"
        self._pid_file = directory / "server.pid"
        address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port}"
        credentials: tuple[str, ...] = ()
        if tls is not None:
            credentials = ("--object", f"tls-creds-x509,id=tls,endpoint=server,dir={tls}")
            address += ",tls-creds=tls"
        options = (*credentials, "--nbd-server", address, *options, "--pidfile", str(self._pid_file))
        self._argv = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", PROGRAM, *options]
        self._process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What it has said, in all its lives."""
        return self._log.read_text()

    def start(self) -> None:
        """Start it, and return when it serves."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not self._pid_file.exists() or self._pid_file.read_text().strip() != str(self._process.pid):
            assert self._process.poll() is None, f"the daemon did not start:\n{self.log}"
            assert time.monotonic() < deadline, f"the daemon does not come up:\n{self.log}"
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it with a signal: SIGTERM as one should, SIGKILL as a crash does."""
        self._process.send_signal(number)
        code = self._process.wait(PATIENCE)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0), self.log

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
