"""The pages that are generated say what the schema says."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]


def test_reference_is_up_to_date():
    checked = subprocess.run(
        [sys.executable, ROOT / "tools" / "reference", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
