"""Compare blkferry with qemu-storage-daemon and nbdkit in one run, alternating (called by `make bench`).

It judges nothing: a missed target is printed and the exit code stays 0. It is 1 when blkferry itself, or the client,
could not be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import images
import report
from images import Image
from measure import Idle, Sample, first_byte, measure_idle, run_workload
from report import Result, Sheet
from rich.console import Console
from servers import BLKFERRY, BLKFERRY_SERVE, NBDKIT, QSD, BenchError, Server, peer
from workloads import ROWS, Row

IDLE = "idle"
FIRST_BYTE = "first-byte"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look, not a result: one round of 0.5 s each")
    parser.add_argument("--rows", metavar="PATTERN", action="append", help="only these, like 'read-4k*' (repeatable)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each row is run (5)")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long each run of a row takes (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="replace what follows '## Results' in FILE")
    parser.add_argument("--images", type=Path, metavar="DIRECTORY", help="keep the images here, not in a cache")
    parser.add_argument("--remove-images", action="store_true", help="remove the images at the end")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    chosen = parser.parse_args()
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 5)
    chosen.seconds = chosen.seconds or (0.5 if chosen.quick else 4.0)
    chosen.images = chosen.images or images.default_directory()
    if chosen.rounds < 1 or chosen.seconds <= 0:
        parser.error("--rounds and --seconds must be more than 0")
    return chosen


class Bench:
    """One call of this program: what was asked for, and what came out so far."""

    def __init__(self, chosen: argparse.Namespace, console: Console, scratch: Path) -> None:
        self.chosen = chosen
        self.console = console
        self.scratch = scratch
        self.sheets: list[Sheet] = []
        self.results: list[Result] = []
        self.idle: dict[str, Idle | str] = {}
        self.first_byte: dict[str, list[float] | str] = {}

    def wants(self, name: str) -> bool:
        return not self.chosen.rows or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.chosen.rows)

    def image(self, image: Image) -> Path:
        return images.prepare(self.chosen.images, image)

    def say(self, sheet: Sheet) -> None:
        self.sheets.append(sheet)
        report.show(self.console, sheet)

    def run(self) -> None:
        for row in ROWS:
            if self.wants(row.name):
                self.run_row(row)
        if self.wants(IDLE):
            self.run_idle()
        if self.wants(FIRST_BYTE):
            self.run_first_byte()
        report.show(self.console, report.summary_sheet(self.sheets))

    def run_row(self, row: Row) -> None:
        result = Result(row)
        self.results.append(result)
        image = self.image(row.image)
        for number in range(self.chosen.rounds):
            shift = number % len(row.servers)  # nobody is always first
            for server in (*row.servers[shift:], *row.servers[:shift]):
                if server.label in result.failures:
                    continue
                self.progress(f"{row.name}, round {number + 1} of {self.chosen.rounds}: {server.label}")
                try:
                    if row.image is Image.QCOW2_FRESH:
                        image = self.image(row.image)
                    sample = run_workload(row, server, image, self.scratch, self.chosen.seconds)
                    result.samples.setdefault(server.label, []).append(sample)
                except BenchError as failure:
                    # Rounds are compared by their number, so a server with a gap is out.
                    result.samples.pop(server.label, None)
                    result.failures[server.label] = str(failure)
        self.say(report.row_sheet(result))

    def run_idle(self) -> None:
        seconds = 2.0 if self.chosen.quick else 5.0
        image = self.image(Image.RANDOM)
        for server in (BLKFERRY, QSD, NBDKIT):
            self.progress(f"{IDLE}: {server.label}")
            try:
                self.idle[server.label] = measure_idle(server, image, self.scratch, seconds)
            except BenchError as failure:
                self.idle[server.label] = str(failure)
        self.say(report.idle_sheet(self.idle, seconds))

    def run_first_byte(self) -> None:
        image = self.image(Image.RANDOM)
        servers: tuple[Server, ...] = (BLKFERRY_SERVE, BLKFERRY, QSD, NBDKIT)
        for number in range(3 if self.chosen.quick else 10):
            for server in servers:
                taken = self.first_byte.setdefault(server.label, [])
                if isinstance(taken, str):
                    continue
                self.progress(f"{FIRST_BYTE}, run {number + 1}: {server.label}")
                try:
                    taken.append(first_byte(server, image, self.scratch))
                except BenchError as failure:
                    self.first_byte[server.label] = str(failure)
        self.say(report.first_byte_sheet(self.first_byte))

    def progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        """Whether blkferry could not be measured somewhere."""
        return (
            any(result.subject.label in result.failures for result in self.results)
            or isinstance(self.idle.get(BLKFERRY.label), str)
            or any(isinstance(self.first_byte.get(server.label), str) for server in (BLKFERRY, BLKFERRY_SERVE))
        )

    def as_json(self, machine: dict[str, str]) -> str:
        return json.dumps(
            {
                "machine": machine,
                "rows": {r.row.name: self.row_json(r) for r in self.results},
                IDLE: {label: i if isinstance(i, str) else dataclasses.asdict(i) for label, i in self.idle.items()},
                FIRST_BYTE: self.first_byte,
            },
            indent=1,
        )

    @staticmethod
    def row_json(result: Result) -> dict[str, object]:
        def plain(samples: list[Sample]) -> list[dict[str, float]]:
            return [dataclasses.asdict(sample) for sample in samples]

        return {
            "samples": {label: plain(samples) for label, samples in result.samples.items()},
            "failures": result.failures,
        }


def end_in_order(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    chosen = arguments()
    if chosen.list:
        print("\n".join([*(f"{row.name:24} {row.title}" for row in ROWS), IDLE, FIRST_BYTE]))
        return 0
    signal.signal(signal.SIGTERM, end_in_order)
    signal.signal(signal.SIGHUP, end_in_order)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    machine = report.describe_machine()
    look = " (--quick: a look, not a result)" if chosen.quick else ""
    machine["rounds"] = f"{chosen.rounds} of {chosen.seconds:g} s each, medians shown{look}"
    for name, value in machine.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    console.print()
    try:
        peer("fio")  # without a client there is nothing to do
        with tempfile.TemporaryDirectory(prefix="blkferry-bench-") as scratch:
            bench = Bench(chosen, console, Path(scratch))
            bench.run()
    except BenchError as failure:
        print(f"benchmarks/run.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", file=sys.stderr)
        return 130
    finally:
        if chosen.remove_images:
            images.remove(chosen.images)
    if chosen.json:
        chosen.json.write_text(bench.as_json(machine), encoding="utf-8")
    if chosen.markdown:
        options = [f"--rows={pattern}" for pattern in chosen.rows or ()]
        options += ["--quick"] if chosen.quick else []
        options += [f"--rounds={chosen.rounds}", f"--seconds={chosen.seconds:g}"]
        command = f'make bench ARGS="{shlex.join(options)}"'
        report.write_markdown(chosen.markdown, command, machine, bench.sheets)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
