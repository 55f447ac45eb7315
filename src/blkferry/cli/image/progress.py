"""How far long work has come: a bar on a terminal, with `-p` and no terminal the line that qemu-img writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from blkferry.cli.image.common import Common

_INTERVAL = 0.1  # seconds between two updates


@contextmanager
def showing(common: Common, what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that shows what it is told."""
    if common.progress and not sys.stderr.isatty():
        yield from _line(sys.stderr if common.as_json else sys.stdout)
    elif sys.stderr.isatty() and not (common.quiet or common.as_json):
        yield from _bar(what)
    else:
        yield lambda _done, _total: None


def _line(stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    last = -1.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done / total if total else 100.0
        if percent - last >= 1 or (percent == 100 and last != 100):
            last = percent
            stream.write(f"    ({percent:.2f}/100%)\r")
            stream.flush()

    yield tell
    stream.write("\n")


def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        last = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _INTERVAL:
                last = now
                progress.update(task, completed=done, total=total)

        yield tell
