"""The programs the tests compare blkferry with or let talk to it, wherever they are on this machine.

They come from the peers root (tools/peers) when it exists and from PATH otherwise, so tests name programs and
know no paths. A peer started through its prefix keeps the PID and the signals of an ordinary child process.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "peers"
LIBNBD = "python3-libnbd"  # what a test requires when it uses libnbd_script()
KERNEL = "linux-image"  # what a test requires when it boots a guest (tests/guest)


@functools.cache
def runner() -> str | None:
    """Return the script that runs programs of the peers root, or None when there is no root."""
    answer = subprocess.run([sys.executable, TOOL, "runner"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def peer(program: str) -> list[str]:
    """Return the start of the command line that runs a program: `[*peer("qemu-img"), "info", path]`."""
    if prefix := runner():
        return [prefix, program]
    found = shutil.which(program)
    if found is None:
        raise AssertionError(f"{program} is not on PATH and there is no peers root (`make peers` makes it)")
    return [found]


@functools.cache
def available(program: str) -> bool:
    """Tell whether a program can be run here."""
    if program == LIBNBD:
        command = [*libnbd_python(), "-c", "import nbd"]
    elif program == KERNEL:
        prefix = runner()
        return prefix is not None and any(Path(prefix).with_name("root").glob("boot/vmlinuz-*"))
    elif prefix := runner():
        command = [prefix, "sh", "-c", 'command -v "$0"', program]
    else:
        return shutil.which(program) is not None
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def requires(*programs: str) -> pytest.MarkDecorator:
    """Mark a test, class or module (`pytestmark = requires(...)`) that cannot run without these programs.

    It is skipped where one is missing, naming it; under CI=true that is a failure (see conftest.py).
    """
    return pytest.mark.interop(*programs)


def run(
    program: str, *args: str | Path, timeout: float = 30, stdin: str = "", expect: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run a peer to its end; an exit code other than `expect` (None: any) fails the test.

    It blocks: a test whose daemon lives on its own event loop calls `await asyncio.to_thread(run, ...)`.
    """
    return finish([*peer(program), *map(str, args)], timeout, stdin, expect)


def libnbd_script(
    source: str, *args: str | Path, timeout: float = 30, expect: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python source where `import nbd` works, with args in sys.argv[1:]; blocks like run()."""
    return finish([*libnbd_python(), "-c", textwrap.dedent(source), *map(str, args)], timeout, "", expect)


def libnbd_python() -> list[str]:
    # Outside the root the binding belongs to the distribution's interpreter, which need not be first on PATH.
    return peer("python3") if runner() else ["/usr/bin/python3"]


def finish(argv: list[str], timeout: float, stdin: str, expect: int | None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            timeout=timeout,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        heard = b"".join(part for part in (expired.stdout, expired.stderr) if part).decode(errors="replace")
        raise AssertionError(f"{shlex.join(argv)} did not end within {timeout} s; it said: {heard}") from None
    if expect is not None and done.returncode != expect:
        said = done.stderr or done.stdout
        raise AssertionError(f"{shlex.join(argv)} ended with {done.returncode}, not {expect}:\n{said}")
    return done
