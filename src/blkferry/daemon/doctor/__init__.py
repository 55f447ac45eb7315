"""What this machine lacks for blkferry to do all it can: a list of checks for each subject. They change nothing.

A subject is a module here with `ABOUT` and `CHECKS`; a new one is that module and a line in `SUBJECTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blkferry.daemon.doctor import engine, fuse, nbd, vduse
from blkferry.daemon.doctor.finding import Check, Finding, State
from blkferry.daemon.doctor.machine import Machine

__all__ = ["SUBJECTS", "Finding", "Machine", "Report", "State", "examine"]


@dataclass(frozen=True, slots=True)
class Subject:
    """Something blkferry does. `about` is a phrase for people."""

    about: str
    checks: tuple[Check, ...]


SUBJECTS: Mapping[str, Subject] = {
    "nbd": Subject(nbd.ABOUT, nbd.CHECKS),
    "fuse": Subject(fuse.ABOUT, fuse.CHECKS),
    "vduse": Subject(vduse.ABOUT, vduse.CHECKS),
    "engine": Subject(engine.ABOUT, engine.CHECKS),
}


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about a subject."""

    subject: str
    about: str
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether blkferry can do it here."""
        return all(finding.state is not State.MISSING for finding in self.findings)


def examine(subject: str, machine: Machine) -> Report:
    """Do all checks of a subject."""
    about, checks = SUBJECTS[subject].about, SUBJECTS[subject].checks
    return Report(subject, about, tuple(found for check in checks if (found := check(machine)) is not None))
