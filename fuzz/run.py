"""Runs every fuzz target for a while. Exits 1 when one found something."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=20, help="for each target (default: 20)")
    parser.add_argument("seed", nargs="?", type=int, help="to repeat what was found (default: another one each time)")
    asked = parser.parse_args()
    seed = time.time_ns() if asked.seed is None else asked.seed
    failed = []
    for target in sorted(HERE.glob("fuzz_*.py")):
        print(f"{target.name}: {asked.seconds:g} s, seed {seed}", flush=True)
        argv = [sys.executable, target, str(asked.seconds), str(seed)]
        if subprocess.run(argv, check=False).returncode:
            failed.append(target.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
