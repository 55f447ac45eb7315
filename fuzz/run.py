"""Runs every fuzz target for a while: `run.py [seconds each] [seed]`. Exits 1 when one found something."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent


def main() -> int:
    seconds = sys.argv[1] if len(sys.argv) > 1 else "20"
    seed = sys.argv[2] if len(sys.argv) > 2 else str(time.time_ns())
    failed = []
    for target in sorted(HERE.glob("fuzz_*.py")):
        print(f"{target.name}: {seconds} s, seed {seed}", flush=True)
        if subprocess.run([sys.executable, target, seconds, seed], check=False).returncode:
            failed.append(target.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
