"""One guest for all tests, booted when first needed and again after a test that failed in it."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from linux_guest import Guest


class Bench:
    """Has a guest that runs, or none yet."""

    def __init__(self, directories: pytest.TempPathFactory) -> None:
        self._directories = directories
        self._guest: Guest | None = None

    def guest(self) -> Guest:
        if self._guest is None or not self._guest.alive:
            self.clear()
            self._guest = Guest(self._directories.mktemp("guest"))
        return self._guest

    def clear(self) -> None:
        if self._guest is not None:
            self._guest.kill()
        self._guest = None


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory)
    yield made
    made.clear()


@pytest.fixture
def guest(bench) -> Guest:
    """A guest in which nothing is attached or mounted: a test that passes has put its things away."""
    return bench.guest()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    used = getattr(item, "funcargs", {}).get("guest")
    if report.failed and used is not None:
        report.sections.append(("the guest's console", used.last_words()))
        used.kill()
    return report
