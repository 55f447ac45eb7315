"""Every fuzz target runs for a moment on each change; `make fuzz` runs them for longer."""

import pathlib
import subprocess
import sys

import pytest

TARGETS = sorted((pathlib.Path(__file__).parents[3] / "fuzz").glob("fuzz_*.py"))


def test_there_are_targets():
    assert len(TARGETS) >= 4


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.stem)
def test_target_finds_nothing(target):
    ran = subprocess.run([sys.executable, target, "2", "1"], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("soon", 2)])
def test_the_runner_explains_itself(argument, code):
    argv = [sys.executable, TARGETS[0].with_name("run.py"), argument]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == code
    assert "usage: run.py [-h] [seconds] [seed]" in ran.stdout + ran.stderr
