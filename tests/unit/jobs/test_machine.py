"""The states of jobs, against QEMU's own tables."""

import pytest

from blkferry.errors import Error
from blkferry.jobs.machine import TRANSITIONS, VERBS, Machine
from blkferry.schema.job import JobStatus, JobVerb

STATES = [
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
MAY_BECOME = {
    "undefined": "01000000000",
    "created": "00100000101",
    "running": "00011010100",
    "paused": "00100000000",
    "ready": "00000110100",
    "standby": "00001000000",
    "waiting": "00000001100",
    "pending": "00000000110",
    "aborting": "00000000110",
    "concluded": "00000000001",
    "null": "00000000000",
}
ACCEPTED_IN = {
    "cancel": "01111111000",
    "pause": "01111100000",
    "resume": "01111100000",
    "set-speed": "01111100000",
    "complete": "00001000000",
    "finalize": "00000001000",
    "dismiss": "00000000010",
    "change": "00111100000",
}


STATES = list(MAY_BECOME)


def chosen(bits):
    return {JobStatus(state) for state, bit in zip(STATES, bits, strict=True) if bit == "1"}


@pytest.mark.parametrize("status", JobStatus)
def test_transitions(status):
    assert TRANSITIONS[status] == chosen(MAY_BECOME[status])


@pytest.mark.parametrize("verb", JobVerb)
def test_verbs(verb):
    assert VERBS[verb] == chosen(ACCEPTED_IN[verb])


def made():
    heard = []
    return Machine("j", lambda job_id, status: heard.append((job_id, status.value))), heard


def test_every_change_is_told_once():
    machine, heard = made()
    for status in (JobStatus.RUNNING, JobStatus.ABORTING, JobStatus.ABORTING, JobStatus.CONCLUDED, JobStatus.NULL):
        machine.go(status)
    assert heard == [("j", status) for status in ("created", "running", "aborting", "concluded", "null")]


def test_no_other_way_is_taken():
    machine, heard = made()
    with pytest.raises(AssertionError, match="job 'j' went from created to pending"):
        machine.go(JobStatus.PENDING)
    assert (machine.status, heard) == (JobStatus.CREATED, [("j", "created")])


def test_a_verb_at_the_wrong_time_is_refused_in_qemus_words():
    machine, _ = made()
    machine.check(JobVerb.CANCEL)
    with pytest.raises(Error) as caught:
        machine.check(JobVerb.DISMISS)
    assert str(caught.value) == "Job 'j' in state 'created' cannot accept command verb 'dismiss'"
    assert caught.value.hint == "It is accepted in: concluded."


@pytest.mark.parametrize("status", JobStatus)
def test_completed_is_what_no_longer_works(status):
    machine, _ = made()
    machine.status = status
    assert machine.completed is (status.value in {"waiting", "pending", "aborting", "concluded", "null"})
