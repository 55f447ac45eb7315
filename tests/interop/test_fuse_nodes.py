"""Random histories of files whose bytes lie in all the ways that nodes know, against a bytearray.

The daemon shares the interpreter with the test here, so nothing is mapped: who waits for a page holds the lock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_model import SECTOR, SIZE, Both, operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread

HISTORIES = st.lists(
    operations(SECTOR).filter(lambda operation: operation[0] not in {"mapped", "truncate", "zero"}),
    min_size=1,
    max_size=30,
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonThread]:
    with DaemonThread() as thread:
        yield thread


def clear(daemon: DaemonThread) -> None:
    daemon.execute("block-export-del", id="e", mode="hard")
    while daemon.execute("query-block-exports"):
        time.sleep(0.005)
    for name in ("n", "n-file", "n-below"):
        if name in daemon.daemon.graph.nodes:
            daemon.execute("blockdev-del", node_name=name)


@pytest.mark.parametrize("kind", [*nodes.KINDS, *nodes.SHUFFLED])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(history=HISTORIES)
def test_a_file_is_what_was_done_to_it(daemon, kind, history):
    with tempfile.TemporaryDirectory() as directory:
        nodes.add(daemon, kind, Path(directory), SIZE)
        mountpoint = Path(directory, "disk")
        mountpoint.touch()
        where = {"node_name": "n", "mountpoint": str(mountpoint)}
        daemon.execute("block-export-add", type="fuse", id="e", writable=True, **where)
        both = Both(mountpoint, growable=False)
        both.model[:] = mountpoint.read_bytes()  # some kinds are not empty
        try:
            both.play(history)
        finally:
            both.close()
            clear(daemon)
