"""Commands about jobs, and blockdev-create, which begins one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.daemon.commands import command
from blkferry.jobs.create import CreateJob
from blkferry.schema.create import BlockdevCreate
from blkferry.schema.job import JobId, JobInfo

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon


@command("blockdev-create")
async def blockdev_create(daemon: Daemon, arguments: BlockdevCreate) -> None:
    daemon.jobs.add(CreateJob(arguments.job_id, daemon.graph, arguments.options))


@command("query-jobs")
async def query_jobs(daemon: Daemon, arguments: None) -> list[JobInfo]:
    del arguments
    return daemon.jobs.query()


@command("job-pause")
async def job_pause(daemon: Daemon, arguments: JobId) -> None:
    daemon.jobs.find(arguments.id).pause()


@command("job-resume")
async def job_resume(daemon: Daemon, arguments: JobId) -> None:
    daemon.jobs.find(arguments.id).resume()


@command("job-cancel")
async def job_cancel(daemon: Daemon, arguments: JobId) -> None:
    await daemon.jobs.find(arguments.id).cancel()


@command("job-complete")
async def job_complete(daemon: Daemon, arguments: JobId) -> None:
    await daemon.jobs.find(arguments.id).request_completion()


@command("job-finalize")
async def job_finalize(daemon: Daemon, arguments: JobId) -> None:
    await daemon.jobs.find(arguments.id).finalize()


@command("job-dismiss")
async def job_dismiss(daemon: Daemon, arguments: JobId) -> None:
    daemon.jobs.find(arguments.id).dismiss()
