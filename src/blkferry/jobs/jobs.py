"""All jobs of a daemon, by id. Lives on the daemon's loop."""

from __future__ import annotations

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import well_formed
from blkferry.graph.node import EventSink
from blkferry.jobs.job import Job
from blkferry.jobs.machine import VERBS
from blkferry.schema.job import JobInfo, JobStatus, JobVerb
from blkferry.schema.visit import suggest


class Jobs:
    """The jobs there are, concluded ones that nobody has dismissed included. `emit` takes their events."""

    def __init__(self, emit: EventSink) -> None:
        self._emit = emit
        self._jobs: dict[str, Job] = {}
        self._closed = False

    def add(self, job: Job) -> None:
        """Start a job. Raises Error when its id is taken or malformed."""
        if not well_formed(job.id):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"Invalid job ID '{job.id}'",
                hint="A letter first, then letters, digits, '-', '.' and '_'.",
            )
        if job.id in self._jobs:
            raise Error(
                ErrorKind.EXISTS,
                f"Job ID '{job.id}' already in use",
                hint="Choose another id; one that has concluded is free again after job-dismiss.",
                job=job.id,
            )
        if self._closed:
            raise Error(ErrorKind.GONE, "The daemon is shutting down")
        self._jobs[job.id] = job
        job.start(self._changed, self._ended)

    def find(self, job_id: str) -> Job:
        """The job with this id; raises Error(NOT_FOUND)."""
        job = self._jobs.get(job_id)
        if job is None:
            hint = suggest(self._jobs, job_id) if self._jobs else "There are no jobs."
            raise Error(ErrorKind.NOT_FOUND, "Job not found", hint=hint, job=job_id)
        return job

    def query(self) -> list[JobInfo]:
        """What query-jobs says: newest first."""
        return [job.info() for job in reversed(self._jobs.values())]

    async def close(self) -> None:
        """Cancel all jobs, newest first, and wait for their ends; none can be started any more."""
        self._closed = True
        for job in reversed(list(self._jobs.values())):
            if job.status in VERBS[JobVerb.CANCEL]:
                await job.cancel()
            await job.ended()
            if job.status is JobStatus.CONCLUDED:
                job.dismiss()

    def _changed(self, job_id: str, status: JobStatus) -> None:
        self._emit("JOB_STATUS_CHANGE", {"id": job_id, "status": status.value})

    def _ended(self, job: Job) -> None:
        del self._jobs[job.id]
