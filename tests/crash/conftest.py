"""Files that grow often: every growth is a step that a crash can come before."""

from __future__ import annotations

import pytest

from blkferry.drivers.qcow2 import hostfile


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(hostfile, "GROWTH", 4096)
