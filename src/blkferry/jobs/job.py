"""A job: work that runs as a task of the daemon's loop and answers to QEMU's job commands.

A kind of job is a subclass with `run`, and perhaps with what is to be done at its end: `prepare` may still fail,
`commit` and `abort` make and undo, `clean` comes last in either case. Between `run` and those a job may wait for
job-finalize, and after them for job-dismiss.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from typing import ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.jobs.machine import Machine
from blkferry.schema.job import JobInfo, JobStatus, JobType, JobVerb

log = logging.getLogger(__name__)


class Job:
    """One job. `ended`, given to `start`, is called when it is forgotten."""

    kind: ClassVar[JobType]

    def __init__(self, job_id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.id = job_id
        self._auto_finalize = auto_finalize
        self._auto_dismiss = auto_dismiss
        self._machine: Machine
        self._work: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self._ending = asyncio.Lock()
        self._user_paused = False
        self._may_run = asyncio.Event()
        self._may_run.set()
        self.cancelled = False
        self.progress = 0
        self.total = 0
        self.error: str | None = None

    # What a kind of job does -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Do the work; raise Error or OSError when it cannot be done. Cancelled like any task, see `interrupt`."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Make `run` end soon, for the job has been cancelled."""
        if self._work is not None:
            self._work.cancel()

    async def complete(self) -> None:
        """Let a job that is ready end, for job-complete."""
        raise self._cannot_complete()

    async def prepare(self) -> None:
        """Do what may still fail, when all the work is done."""

    async def commit(self) -> None:
        """Make the changes that the job was for."""

    async def abort(self) -> None:
        """Undo what `run` did, since the job has failed or was cancelled."""

    async def clean(self) -> None:
        """Let go of what the job held."""

    # For `run` -------------------------------------------------------------------------------------------------

    async def pause_point(self) -> None:
        """Stand still here while the job is paused."""
        while not self._may_run.is_set():
            status = self.status
            self._machine.go(JobStatus.STANDBY if status is JobStatus.READY else JobStatus.PAUSED)
            try:
                await self._may_run.wait()
            finally:
                self._machine.go(status)

    def be_ready(self) -> None:
        """Say that job-complete may come."""
        self._machine.go(JobStatus.READY)

    # What users ask --------------------------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        return self._machine.status

    def pause(self) -> None:
        """Pause at the next opportunity. Raises Error."""
        self._machine.check(JobVerb.PAUSE)
        if self._user_paused:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Job is already paused", job=self.id)
        self._user_paused = True
        self._may_run.clear()

    def resume(self) -> None:
        """Go on. Raises Error."""
        if not self._user_paused:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Can't resume a job that was not paused", job=self.id)
        self._machine.check(JobVerb.RESUME)
        self._go_on()

    def _go_on(self) -> None:
        self._user_paused = False
        self._may_run.set()

    async def cancel(self) -> None:
        """End at the next opportunity; a job that only waits for job-finalize ends now. Raises Error."""
        self._machine.check(JobVerb.CANCEL)
        self.cancelled = True
        self._go_on()
        if not self._machine.completed:
            self.interrupt()
            return
        async with self._ending:
            if self.status in {JobStatus.WAITING, JobStatus.PENDING}:
                await self._fail(os.strerror(errno.ECANCELED))

    async def request_completion(self) -> None:
        """Let a job that is ready come to its end. Raises Error."""
        self._machine.check(JobVerb.COMPLETE)
        if self._user_paused or self.cancelled:
            raise self._cannot_complete()
        await self.complete()

    def _cannot_complete(self) -> Error:
        return Error(ErrorKind.INVALID_ARGUMENT, f"The active block job '{self.id}' cannot be completed", job=self.id)

    async def finalize(self) -> None:
        """Make the changes that a pending job is for. Raises Error."""
        self._machine.check(JobVerb.FINALIZE)
        async with self._ending:
            if self.status is JobStatus.PENDING:
                await self._finish()

    def dismiss(self) -> None:
        """Forget a job that has concluded. Raises Error."""
        self._machine.check(JobVerb.DISMISS)
        self._machine.go(JobStatus.NULL)
        self._ended(self)

    def info(self) -> JobInfo:
        """What query-jobs says."""
        return JobInfo(
            id=self.id,
            type=self.kind,
            status=self.status,
            current_progress=self.progress,
            total_progress=self.total,
            error=self.error,
        )

    # Life ------------------------------------------------------------------------------------------------------

    def start(self, changed: Callable[[str, JobStatus], None], ended: Callable[[Job], None]) -> None:
        """Begin to run; `changed` hears of every status, `ended` when the job is forgotten."""
        self._ended = ended
        self._machine = Machine(self.id, changed)
        self._machine.go(JobStatus.RUNNING)
        self._work = asyncio.create_task(self._run(), name=f"job {self.id}")
        self._life = asyncio.create_task(self._live(self._work), name=f"life of job {self.id}")

    async def ended(self) -> None:
        """Wait until the work is over, and what follows from that has been done."""
        if self._life is not None:
            await asyncio.shield(self._life)

    async def _run(self) -> None:
        await self.pause_point()
        await self.run()

    async def _live(self, work: asyncio.Task[None]) -> None:
        await asyncio.wait([work])
        async with self._ending:
            error = _failure(work)
            if error is None and self.cancelled:
                error = os.strerror(errno.ECANCELED)
            if error is not None:
                await self._fail(error)
                return
            self._machine.go(JobStatus.WAITING)
            self._machine.go(JobStatus.PENDING)
            if self._auto_finalize:
                await self._finish()

    async def _finish(self) -> None:
        """From pending to the end. The caller holds `_ending`."""
        try:
            await self.prepare()
            if self.cancelled:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        except (Error, OSError) as error:
            await self._fail(_sentence(error))
            return
        await self._do("commit", self.commit)
        await self._conclude()

    async def _fail(self, error: str) -> None:
        """To the end without a result. The caller holds `_ending`."""
        self.error = error
        self._machine.go(JobStatus.ABORTING)
        await self._do("abort", self.abort)
        await self._conclude()

    async def _conclude(self) -> None:
        await self._do("clean", self.clean)
        self._machine.go(JobStatus.CONCLUDED)
        if self._auto_dismiss:
            self.dismiss()

    async def _do(self, what: str, step: Callable[[], object]) -> None:
        """A step of the end, which the end does not wait for if there is a fault in it."""
        try:
            done = step()
            if asyncio.iscoroutine(done):
                await done
        except Exception:
            log.exception("job '%s': %s failed", self.id, what)


def _failure(work: asyncio.Task[None]) -> str | None:
    """Why the work was not done, None if it was."""
    if work.cancelled():
        return os.strerror(errno.ECANCELED)
    error = work.exception()
    if error is None:
        return None
    if not isinstance(error, Error | OSError):
        log.error("%s failed", work.get_name(), exc_info=error)
        return "Internal error, the daemon's log has the details"
    return _sentence(error)


def _sentence(error: Error | OSError) -> str:
    return error.message if isinstance(error, Error) else error.strerror or str(error)
