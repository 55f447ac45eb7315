"""What was measured, as tables for a terminal and as Markdown; the same cells in both.

Ratios are taken within a round, where the servers ran one after the other on the same machine in the same mood; what
is shown is their median, with the lowest and the highest of the rounds behind it.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as distribution_version
from pathlib import Path
from statistics import median

import refuse_io_uring
from measure import Idle, Sample
from rich.console import Console
from rich.table import Table
from servers import BLKFERRY, BLKFERRY_SERVE, BenchError, Server, peer, version
from workloads import Row

RESULTS_HEADING = "## Results"
FIRST_BYTE_TARGET = 0.3  # s


@dataclass(slots=True)
class Result:
    """All samples of one row: one per server and round; a server that failed has none and a reason."""

    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> Server:
        return self.row.servers[0]

    def ratios(self, server: Server, what: str) -> list[float]:
        """Ours divided by theirs, round by round."""
        pairs = zip(self.samples.get(self.subject.label, ()), self.samples.get(server.label, ()), strict=False)
        return [getattr(mine, what) / getattr(theirs, what) for mine, theirs in pairs if getattr(theirs, what)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside what was reached."""

    title: str
    target: str
    reached: str
    is_met: bool

    @property
    def word(self) -> str:
        return "met" if self.is_met else "MISSED"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table, and below it sentences and what became of the targets."""

    title: str
    header: Sequence[str]
    lines: list[list[str]]
    notes: list[str]
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        return [*self.notes, *(f"Target {v.target}: {v.reached}, {v.word}." for v in self.verdicts)]


HEADER = ("server", "IOPS", "p50 us", "p99 us", "CPU us/request", "CPU: ours/theirs", "IOPS: ours/theirs")


def row_sheet(result: Result) -> Sheet:
    lines = []
    notes = [result.row.note] if result.row.note else []
    for server in result.row.servers:
        samples = result.samples.get(server.label)
        if server.label in result.failures:
            notes.append(f"{server.label} failed: {result.failures[server.label]}")
        if server.note:
            notes.append(server.note + ".")
        if not samples:
            lines.append([server.label, "failed" if server.label in result.failures else "not run", *[""] * 5])
            continue
        line = [server.label, f"{median([s.iops for s in samples]):,.0f}"]
        line += [latency([getattr(s, what) for s in samples]) for what in ("p50_us", "p99_us")]
        line.append(f"{median([s.cpu_us for s in samples]):.2f}")
        is_subject = server is result.subject
        line += ["", ""] if is_subject else [spread(result.ratios(server, what)) for what in ("cpu_us", "iops")]
        lines.append(line)
    return Sheet(result.row.title, HEADER, lines, notes, verdicts(result))


def latency(found: list[float]) -> str:
    """Microseconds, where the client knows them."""
    return "-" if any(map(math.isnan, found)) else f"{median(found):,.0f}"


def spread(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def verdicts(result: Result) -> list[Verdict]:
    """Each target beside what was reached against the better peer (of all that do the same job)."""
    judges = [s for s in result.row.servers[1:] if s.is_judge]
    found = []
    for what, name, limit, words, worst in (
        ("cpu_us", "CPU per request", result.row.target.cpu, "at most", max),
        ("iops", "IOPS", result.row.target.iops, "at least", min),
    ):
        if limit is None:
            continue
        target = f"{name} {words} {limit}x"
        reached = {s.label: median(r) for s in judges if (r := result.ratios(s, what))}
        if not reached:
            found.append(Verdict(result.row.title, target, "not measured", is_met=False))
            continue
        against = worst(reached, key=lambda label: reached[label])
        value = reached[against]
        is_met = value <= limit if what == "cpu_us" else value >= limit
        found.append(Verdict(result.row.title, target, f"{value:.2f}x ({against})", is_met))
    return found


def summary_sheet(sheets: list[Sheet]) -> Sheet:
    """All targets of a run."""
    lines = [[v.title, v.target, v.reached, v.word] for sheet in sheets for v in sheet.verdicts]
    return Sheet("Targets", ("workload", "target", "reached (against)", "verdict"), lines, [])


def idle_sheet(results: dict[str, Idle | str], seconds: float) -> Sheet:
    sheet = Sheet(
        f"Idle with one connected client, {seconds:g} s", ("server", "CPU ticks", "CPU us", "wake-ups"), [], []
    )
    for label, idle in results.items():
        if isinstance(idle, str):
            sheet.lines.append([label, "failed", "", ""])
            sheet.notes.append(f"{label} failed: {idle}")
            continue
        sheet.lines.append([label, str(idle.ticks), f"{idle.cpu_us:,.0f}", str(idle.wakeups)])
        if label == BLKFERRY.label:
            sheet.verdicts.append(Verdict(sheet.title, "no CPU", f"{idle.ticks} ticks", is_met=not idle.ticks))
    return sheet


def first_byte_sheet(results: dict[str, list[float] | str]) -> Sheet:
    header = ("server", "median ms", "min ms", "max ms")
    sheet = Sheet("From exec to the first answered read", header, [], [])
    for label, taken in results.items():
        if isinstance(taken, str):
            sheet.lines.append([label, "failed", "", ""])
            sheet.notes.append(f"{label} failed: {taken}")
            continue
        middle = median(taken)
        sheet.lines.append([label, *(f"{value * 1000:.0f}" for value in (middle, min(taken), max(taken)))])
        if label == BLKFERRY_SERVE.label:
            target = f"under {FIRST_BYTE_TARGET * 1000:.0f} ms"
            reached = f"{middle * 1000:.0f} ms"
            sheet.verdicts.append(Verdict(sheet.title, target, reached, is_met=middle < FIRST_BYTE_TARGET))
    return sheet


def show(console: Console, sheet: Sheet) -> None:
    table = Table(title=sheet.title, title_justify="left", title_style="bold")
    for number, name in enumerate(sheet.header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in sheet.lines:
        table.add_row(*line)
    console.print(table)
    for note in sheet.sentences:
        console.print(note, markup=False, highlight=False)
    console.print()


def markdown(sheet: Sheet) -> str:
    rows = ["| " + " | ".join(sheet.header) + " |", "|---" + "|---:" * (len(sheet.header) - 1) + "|"]
    rows += ["| " + " | ".join(line) + " |" for line in sheet.lines]
    notes = "".join(f"- {' '.join(note.split())}\n" for note in sheet.sentences)
    return f"### {sheet.title}\n\n" + "\n".join(rows) + "\n" + (f"\n{notes}" if notes else "")


def write_markdown(path: Path, command: str, machine: dict[str, str], sheets: list[Sheet]) -> None:
    """Put the results after the heading `## Results` of a document, in place of what stood there."""
    before = path.read_text(encoding="utf-8").partition(RESULTS_HEADING)[0] if path.exists() else ""
    facts = "".join(f"- {name}: {value}\n" for name, value in machine.items())
    body = "\n".join(markdown(sheet) for sheet in (summary_sheet(sheets), *sheets))
    path.write_text(f"{before}{RESULTS_HEADING}\n\nPrinted by `{command}`.\n\n{facts}\n{body}", encoding="utf-8")


def describe_machine() -> dict[str, str]:
    """What a reader must know to judge the figures."""
    processors = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("model name")
    ]
    facts = {
        "processors": f"{os.cpu_count()} x {processors[0] if processors else platform.machine()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
        "blkferry": distribution_version("blkferry"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
    }
    if refuse_io_uring.is_refused():
        facts["io_uring"] = "refused on this machine: blkferry ran on its worker pool throughout"
    for program in ("qemu-storage-daemon", "nbdkit", "fio"):
        try:
            facts[program] = version(*peer(program), "--version").removeprefix(program).strip(" -")
        except BenchError as missing:
            facts[program] = str(missing)
    return facts
