"""The states of a job, which verbs they accept, and nothing else: no tasks, no clocks.

Both tables are QEMU's, so that a client sees the same states in the same order:

    created --> running --> waiting --> pending --> concluded --> null
    running <-> paused, running --> ready <-> standby, ready --> waiting
    created, running, ready, waiting, pending --> aborting --> concluded
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blkferry.errors import Error, ErrorKind
from blkferry.schema.job import JobStatus, JobVerb

_S = JobStatus

TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

_WORKING = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: Mapping[JobVerb, frozenset[JobStatus]] = {
    JobVerb.CANCEL: _WORKING | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _WORKING,
    JobVerb.RESUME: _WORKING,
    JobVerb.SET_SPEED: _WORKING,
    JobVerb.COMPLETE: frozenset({_S.READY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
    JobVerb.CHANGE: _WORKING - {_S.CREATED},
}


class Machine:
    """One job's status; `changed` is told of each new one."""

    def __init__(self, job_id: str, changed: Callable[[str, JobStatus], None]) -> None:
        self._job_id = job_id
        self._changed = changed
        self.status = JobStatus.UNDEFINED
        self.go(JobStatus.CREATED)

    def go(self, status: JobStatus) -> None:
        """Enter another status."""
        assert status in TRANSITIONS[self.status], f"job '{self._job_id}' went from {self.status} to {status}"
        if status is not self.status:
            self.status = status
            self._changed(self._job_id, status)

    def check(self, verb: JobVerb) -> None:
        """Raise Error unless the job accepts a verb now."""
        if self.status in VERBS[verb]:
            return
        accepting = ", ".join(status for status in JobStatus if status in VERBS[verb])
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            f"Job '{self._job_id}' in state '{self.status}' cannot accept command verb '{verb}'",
            hint=f"It is accepted in: {accepting}.",
            job=self._job_id,
        )

    @property
    def completed(self) -> bool:
        """Whether the work itself is over, well or not."""
        return self.status not in _WORKING and self.status is not JobStatus.UNDEFINED
