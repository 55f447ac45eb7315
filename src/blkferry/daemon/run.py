"""A daemon as a process: signals, the PID file, the way to the background, and an end in order.

Knows nothing of options: the caller says how the daemon is filled. SIGTERM, SIGINT and SIGHUP end it at any time, also
while it is being filled; a second one takes from clients the time they have left to receive their answers.

Invariants: whatever ends the daemon, sockets and the PID file go with it; the PID file is there only while
everything is up, and outlives nothing but the daemon's own clean-up.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

from blkferry.daemon.daemon import Daemon
from blkferry.errors import Error
from blkferry.plane.loops import new_event_loop
from blkferry.sockets import descriptors
from blkferry.sockets.activation import take_activation

BACKGROUND_UMASK = 0o027
"""What QEMU sets in the background: others may not connect to sockets made there."""

_YOUNG_OBJECTS = 10_000
"""So many more than before have the collector look for garbage: requests in flight of some clients are fewer."""

Notice = Callable[[Daemon], None]


def run(
    fill: Callable[[Daemon], Awaitable[None]],
    *,
    pidfile: str | None = None,
    on_ready: Notice | None = None,
    on_end: Notice | None = None,
) -> None:
    """Run a daemon until a signal or `quit` ends it.

    `fill` makes nodes, exports and servers; what it raises ends the daemon and is raised here. `on_ready` is called
    once all of it is up and the PID file says so, `on_end` when the end has been asked for.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if not runner.run(_live(fill, pidfile, on_ready, on_end)):
            # A name server or file system that hangs still holds a thread, and the interpreter would wait for it.
            sys.stdout.flush()
            os._exit(0)


async def _live(
    fill: Callable[[Daemon], Awaitable[None]], pidfile: str | None, on_ready: Notice | None, on_end: Notice | None
) -> bool:
    """The daemon's life; False when it ended before everything was up."""
    descriptors.use(take_activation(os.environ))
    daemon = Daemon()
    handled = _end_on_signals(daemon)
    file: PidFile | None = None
    try:
        await daemon.start()
        try:
            daemon.hold_clients()
            if not await _unless_finished(daemon, fill(daemon)):
                return False
            file = PidFile(pidfile) if pidfile is not None else None
            daemon.admit_clients()
            if on_ready is not None:
                on_ready(daemon)
            _spare_what_is_there()
            await daemon.finished.wait()
            if on_end is not None:
                on_end(daemon)
            return True
        finally:
            await daemon.stop()
    finally:
        if file is not None:
            file.remove()
        for number in handled:  # not the default action: it would kill us between here and the exit
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _spare_what_is_there() -> None:
    """Have the garbage collector leave alone what has been loaded, and look at the rest less often.

    Requests in flight are many young objects that go by themselves. To Python they look like growth, for which it looks
    at everything there is again and again: ten milliseconds each time, a sixth of what a request costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def _end_on_signals(daemon: Daemon) -> list[signal.Signals]:
    hurries: set[asyncio.Task[None]] = set()

    def on_signal() -> None:
        if daemon.finished.is_set():
            hurries.add(asyncio.create_task(daemon.stop(patience=0)))
        daemon.finished.set()

    # SIGHUP that is ignored stays ignored: nohup means it.
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    handled = [signal.SIGTERM, signal.SIGINT, *hangup]
    for number in handled:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return handled


async def _unless_finished(daemon: Daemon, work: Awaitable[None]) -> bool:
    """Await `work`; cancel it when the daemon is to end meanwhile. Tells whether it was done."""
    working = asyncio.ensure_future(work)
    finished = asyncio.create_task(daemon.finished.wait())
    await asyncio.wait([working, finished], return_when=asyncio.FIRST_COMPLETED)
    finished.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
        return False
    working.result()
    return True


class PidFile:
    """Our process id in a locked file. The lock, not the file, says that we live: it ends with us, however we end."""

    def __init__(self, path: str) -> None:
        """Write it. Raises Error(BUSY) when a living process has it, or what is wrong with the path."""
        self._path = os.path.abspath(path)
        while True:
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise _no_pidfile(f"Could not create '{path}'", error) from error
            try:
                # Record locks, as QEMU's: neither starts over the other's file.
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._ours():
                    os.close(self._fd)
                    continue  # its owner ended, and removed it, while we waited at the door
                os.ftruncate(self._fd, 0)
                os.write(self._fd, f"{os.getpid()}\n".encode())
            except OSError as error:
                os.close(self._fd)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                    raise _no_pidfile("Cannot lock pid file", error, f"Another process holds '{path}'.") from error
                raise _no_pidfile(f"Could not write '{path}'", error) from error
            return

    def _ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Take it away, unless another file is there by now."""
        try:
            if self._ours():
                os.unlink(self._path)
        except OSError:
            pass  # the directory is gone or no longer writable: the lock still tells that we ended
        os.close(self._fd)


def _no_pidfile(doing: str, error: OSError, hint: str = "") -> Error:
    return Error.from_oserror(f"cannot create PID file: {doing}", error, hint=hint)


def go_to_background() -> Callable[[], None]:
    """Go on in a background process, and return there.

    The calling process ends with 0 when the background calls what is returned here, with 1 when it ends before.
    Until then the background keeps directory and standard streams, so that relative paths and errors mean what they
    should. Must come before any thread or loop.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        _end_with_background(reader)
    os.close(reader)
    os.setsid()
    if os.fork():  # only a process that leads no session can never get a terminal again
        os._exit(0)
    os.umask(BACKGROUND_UMASK)

    def detach() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        if null > 2:
            os.close(null)
        os.write(writer, b"\n")
        os.close(writer)

    return detach


def _end_with_background(reader: int) -> NoReturn:
    os._exit(0 if os.read(reader, 1) else 1)
