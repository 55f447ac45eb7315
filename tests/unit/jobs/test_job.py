"""Jobs as tasks: what users may ask of them, and in which order their states and steps come."""

import asyncio
from typing import ClassVar

import pytest

from blkferry.errors import Error, ErrorKind
from blkferry.jobs.job import Job
from blkferry.jobs.jobs import Jobs
from blkferry.schema.job import JobType

WELL = ["created", "running", "waiting", "pending", "concluded"]


class Scripted(Job):
    """Does one step whenever it is told to; is ready after the first if `mirrors`."""

    kind: ClassVar[JobType] = JobType.MIRROR

    def __init__(self, job_id="j", *, mirrors=False, failures=None, **flags):
        super().__init__(job_id, **flags)
        self.mirrors = mirrors
        self.failures = failures or {}
        self.steps = asyncio.Queue()
        self.log = []

    async def run(self):
        self.total = 2
        for number in (1, 2):
            await self.steps.get()
            await self.pause_point()
            self._enter(f"step {number}")
            self.progress = number
            if self.mirrors and number == 1:
                self.be_ready()

    def _enter(self, what):
        self.log.append(what)
        if what in self.failures:
            raise self.failures[what]

    async def complete(self):
        self.step()

    async def prepare(self):
        self._enter("prepare")

    async def commit(self):
        self._enter("commit")

    async def abort(self):
        self._enter("abort")

    async def clean(self):
        self._enter("clean")

    def step(self, count=1):
        for _ in range(count):
            self.steps.put_nowait(None)


class World:
    def __init__(self):
        self.events = []
        self.jobs = Jobs(lambda name, data: self.events.append((name, data["id"], data["status"])))

    def states(self, job_id="j"):
        return [status for _, name, status in self.events if name == job_id]


@pytest.fixture
async def world():
    made = World()
    yield made
    await made.jobs.close()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_job_that_nobody_holds_up(world):
    job = Scripted()
    world.jobs.add(job)
    assert world.events == [("JOB_STATUS_CHANGE", "j", "created"), ("JOB_STATUS_CHANGE", "j", "running")]
    job.step()
    await settle()
    (info,) = world.jobs.query()
    assert (info.id, info.type, info.status) == ("j", "mirror", "running")
    assert (info.current_progress, info.total_progress, info.error) == (1, 2, None)
    job.step()
    await job.ended()
    assert world.states() == [*WELL, "null"]
    assert job.log == ["step 1", "step 2", "prepare", "commit", "clean"]
    assert world.jobs.query() == []


async def test_a_job_that_waits_for_finalize_and_dismiss(world):
    job = Scripted(auto_finalize=False, auto_dismiss=False)
    world.jobs.add(job)
    job.step(2)
    await job.ended()
    assert world.states()[-1] == "pending"
    assert "commit" not in job.log
    await job.finalize()
    assert world.states() == WELL
    assert [info.status for info in world.jobs.query()] == ["concluded"]
    with pytest.raises(Error, match="Job 'j' in state 'concluded' cannot accept command verb 'finalize'"):
        await job.finalize()
    job.dismiss()
    assert world.states()[-1] == "null"
    assert world.jobs.query() == []


@pytest.mark.parametrize("failure", [Error(ErrorKind.IO, "it broke"), OSError(5, "it broke"), ValueError("a bug")])
async def test_a_job_that_fails(world, failure):
    job = Scripted(failures={"step 2": failure}, auto_dismiss=False)
    world.jobs.add(job)
    job.step(2)
    await job.ended()
    assert world.states() == ["created", "running", "aborting", "concluded"]
    assert job.log == ["step 1", "step 2", "abort", "clean"]
    text = "Internal error, the daemon's log has the details" if isinstance(failure, ValueError) else "it broke"
    assert world.jobs.query()[0].error == text


async def test_a_job_that_fails_at_the_last_moment(world):
    job = Scripted(failures={"prepare": Error(ErrorKind.BUSY, "too late")}, auto_dismiss=False)
    world.jobs.add(job)
    job.step(2)
    await job.ended()
    assert world.states() == ["created", "running", "waiting", "pending", "aborting", "concluded"]
    assert job.log[-3:] == ["prepare", "abort", "clean"]


async def test_a_fault_in_the_clean_up_does_not_keep_a_job_alive(world):
    job = Scripted(failures={"commit": ValueError(), "clean": ValueError()})
    world.jobs.add(job)
    job.step(2)
    await job.ended()
    assert world.states() == [*WELL, "null"]


async def test_pausing(world):
    job = Scripted()
    world.jobs.add(job)
    with pytest.raises(Error, match="Can't resume a job that was not paused"):
        job.resume()
    job.pause()
    with pytest.raises(Error, match="Job is already paused"):
        job.pause()
    job.step(2)
    await settle()
    assert (job.status, job.log) == ("paused", [])
    job.resume()
    await job.ended()
    assert world.states() == ["created", "running", "paused", "running", *WELL[2:], "null"]


async def test_a_ready_job_stands_by_and_is_completed(world):
    job = Scripted(mirrors=True)
    world.jobs.add(job)
    with pytest.raises(Error, match="Job 'j' in state 'running' cannot accept command verb 'complete'"):
        await job.request_completion()
    job.step()
    await settle()
    assert job.status == "ready"
    job.pause()
    with pytest.raises(Error, match="The active block job 'j' cannot be completed"):
        await job.request_completion()
    job.resume()
    await job.request_completion()
    await job.ended()
    assert world.states() == ["created", "running", "ready", *WELL[2:], "null"]


async def test_a_ready_job_stands_by_while_it_is_paused(world):
    job = Scripted(mirrors=True)
    world.jobs.add(job)
    job.step()
    await settle()
    job.pause()
    job.step()
    await settle()
    assert job.status == "standby"
    job.resume()
    await job.ended()
    assert world.states()[2:6] == ["ready", "standby", "ready", "waiting"]


@pytest.mark.parametrize("paused", [False, True])
async def test_cancelling(world, paused):
    job = Scripted(auto_dismiss=False)
    world.jobs.add(job)
    await settle()
    if paused:
        job.pause()
        job.step()
        await settle()
        assert job.status == "paused"
    await job.cancel()
    await job.ended()
    assert world.states()[-2:] == ["aborting", "concluded"]
    assert job.log == ["abort", "clean"]
    assert world.jobs.query()[0].error == "Operation canceled"
    with pytest.raises(Error, match="Job 'j' in state 'concluded' cannot accept command verb 'cancel'"):
        await job.cancel()


async def test_cancelling_what_only_waits_for_finalize(world):
    job = Scripted(auto_finalize=False)
    world.jobs.add(job)
    job.step(2)
    await job.ended()
    await job.cancel()
    assert world.states() == [*WELL[:4], "aborting", "concluded", "null"]
    assert job.log[-2:] == ["abort", "clean"]


async def test_a_job_that_cannot_be_interrupted_is_cancelled_all_the_same(world):
    job = Scripted(auto_dismiss=False)
    job.interrupt = lambda: None
    world.jobs.add(job)
    await job.cancel()
    job.step(2)
    await job.ended()
    assert world.states() == ["created", "running", "aborting", "concluded"]


async def test_ids(world):
    for bad in ("", "1x", "a b"):
        with pytest.raises(Error) as caught:
            world.jobs.add(Scripted(bad))
        assert str(caught.value) == f"Invalid job ID '{bad}'"
    world.jobs.add(Scripted("a"))
    world.jobs.add(Scripted("b"))
    with pytest.raises(Error, match="Job ID 'a' already in use"):
        world.jobs.add(Scripted("a"))
    assert [info.id for info in world.jobs.query()] == ["b", "a"]
    with pytest.raises(Error) as caught:
        world.jobs.find("c")
    assert str(caught.value) == "Job not found"


async def test_closing_ends_all_of_them_newest_first():
    world = World()
    working, waiting, over = Scripted("a"), Scripted("b", auto_finalize=False), Scripted("c", auto_dismiss=False)
    for job in (working, waiting, over):
        world.jobs.add(job)
    for job in (waiting, over):
        job.step(2)
        await job.ended()
    world.events.clear()
    await world.jobs.close()
    assert [(name, status) for _, name, status in world.events] == [
        ("c", "null"),
        *(("b", status) for status in ("aborting", "concluded", "null")),
        *(("a", status) for status in ("aborting", "concluded", "null")),
    ]
    with pytest.raises(Error, match="shutting down"):
        world.jobs.add(Scripted("d"))
