"""What all tests share: sample images, a place for sockets, and the rule that CI skips no interop test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import peers

SECTOR = 512
CI = os.environ.get("CI") == "true"


@dataclass(frozen=True, slots=True)
class Image:
    """A sparse raw file; every 16 bytes of its data spell their sector's offset, so strays say so."""

    path: Path
    size: int
    data: tuple[tuple[int, int], ...]  # (start, length), whole sectors

    def expect(self, start: int, length: int) -> bytes:
        """Return the bytes a read of this range must give."""
        first, end = start // SECTOR * SECTOR, start + length
        sectors = b"".join(self._sector(offset) for offset in range(first, end, SECTOR))
        return sectors[start - first : end - first]

    def _sector(self, offset: int) -> bytes:
        if any(start <= offset < start + length for start, length in self.data):
            return f"{offset:015x}\n".encode() * (SECTOR // 16)
        return bytes(SECTOR)


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Image]:
    """Make images: `image(size, data=[(start, length), ...], name="disk.raw")`; all else in them is a hole.

    Without `data` the first and the last eighth hold some: both ends and a hole in the middle get tested.
    """

    def make(size: int = 1 << 20, data: Iterable[tuple[int, int]] | None = None, name: str = "disk.raw") -> Image:
        eighth = size // 8 // SECTOR * SECTOR
        spans = tuple(data) if data is not None else ((0, eighth), (size - eighth, eighth))
        made = Image(tmp_path / name, size, spans)
        with made.path.open("wb") as file:
            file.truncate(size)
            for start, length in spans:
                file.seek(start)
                file.write(made.expect(start, length))
        return made

    return make


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Give a directory for unix sockets: a path below tmp_path may exceed their addresses' 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="blkferry-") as directory:
        yield Path(directory)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {program for marker in item.iter_markers("interop") for program in marker.args}
    if missing := sorted(program for program in wanted if not peers.available(program)):
        pytest.skip(f"{', '.join(missing)} missing; `make peers` installs it")


# In CI a skip is a missing peer or an excuse: either way nobody would notice that nothing was tested.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected_failure = hasattr(report, "wasxfail")
    if CI and report.skipped and not expected_failure and item.get_closest_marker("interop"):
        fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if CI and report.skipped:  # a module that skips itself whole never shows its markers
        fail(report)
    return report


def fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"not allowed under CI=true: {reason}"
