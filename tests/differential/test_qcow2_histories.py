"""The same history leaves the same disk, and the same map, whether our driver or QEMU has gone through it."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from qcow2_history import CASES, Author, Ours, Theirs, compare, make

from blkferry.testing.daemon import DaemonThread
from peers import requires

pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def daemon():
    with DaemonThread() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A new directory each time, within one test."""
    base = tmp_path_factory.mktemp("histories")
    return lambda: Path(tempfile.mkdtemp(dir=base)) / "d"


@pytest.mark.parametrize("case", CASES)
def test_the_same_requests_leave_the_same_image(case, daemon, tmp_path):
    kind = CASES[case]
    author = Author(kind, random.Random(f"{case} 1"))
    compare(daemon, kind, tmp_path, author.history(24))


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink))
@given(
    case=st.sampled_from(sorted(set(CASES) - {"luks, backing"})),
    rng=st.randoms(use_true_random=False),
    steps=st.integers(1, 12),
)
def test_any_history_leaves_the_same_image(case, daemon, directories, rng, steps):
    kind = CASES[case]
    history = Author(kind, rng).history(steps)
    directory = directories()
    directory.mkdir()
    compare(daemon, kind, directory, history)
    shutil.rmtree(directory)


@pytest.mark.parametrize("case", ["512", "small caches", "extended, short backing", "2 bits", "zstd", "long backing"])
def test_long_histories_leave_what_a_model_says(case, daemon, tmp_path):
    kind = CASES[case]
    rng = random.Random(f"{case} long")
    path = make(kind, tmp_path / "d", rng)
    ours = Ours(daemon, kind, path)
    try:
        for number, step in enumerate(Author(kind, rng).history(100)):
            ours.play([step])
            if number % 10 == 0:
                assert ours.content() == ours.model, step
        assert ours.content() == ours.model
    finally:
        ours.close()
    Theirs(kind, path).check()
