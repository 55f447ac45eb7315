"""What the README promises first: `make demo` serves an image and reads it back."""

import pathlib
import subprocess
import sys

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_runs():
    ran = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "256 MiB" in ran.stdout
