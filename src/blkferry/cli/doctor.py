"""`blkferry doctor`: what is missing on this machine, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from blkferry.daemon.doctor import SUBJECTS, Machine, Report, State, examine

_COLOURS = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "red"}
_WIDTH = max(map(len, State))


def diagnose(subjects: Sequence[str], *, as_json: bool) -> bool:
    """Examine these subjects (none: all), and say what was found; whether nothing is missing."""
    for subject in subjects:
        if subject not in SUBJECTS:
            raise click.UsageError(f"There is nothing to say about '{subject}'. There is: {', '.join(SUBJECTS)}.")
    machine = Machine()
    reports = [examine(subject, machine) for subject in dict.fromkeys(subjects or SUBJECTS)]
    ready = all(report.ready for report in reports)
    if as_json:
        found = [{**asdict(report), "ready": report.ready} for report in reports]
        click.echo(json.dumps({"ready": ready, "subjects": found}))
    else:
        click.echo("\n".join(line for report in reports for line in _lines(report)))
    return ready


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.subject}: {report.about}"
    for finding in report.findings:
        yield f"  {click.style(f'{finding.state:<{_WIDTH}}', fg=_COLOURS[finding.state])}  {finding.text}"
        if finding.remedy:
            yield f"  {'':<{_WIDTH}}    {finding.remedy}"
