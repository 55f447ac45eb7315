"""FUSE takes a kernel that has it, and somebody who may mount."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        for item in items:
            if item.path.is_relative_to(os.path.dirname(__file__)):
                item.add_marker(pytest.mark.skip("only root may mount, and only where there is /dev/fuse"))
