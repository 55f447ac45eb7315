"""Jobs: work that goes on while other commands are answered."""

import enum
from typing import Annotated

from blkferry.schema.qapi import Command, Doc, Event, Struct


class JobType(enum.StrEnum):
    """What a job does."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobStatus(enum.StrEnum):
    """Where in its life a job is."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.StrEnum):
    """What a user may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    DISMISS = "dismiss"
    FINALIZE = "finalize"
    CHANGE = "change"


class JobId(Struct):
    """Arguments of the commands about one job."""

    id: Annotated[str, Doc("name of the job", since="3.0")]


class JobInfo(Struct):
    """A job, as query-jobs lists it."""

    id: Annotated[str, Doc("name of the job", since="3.0")]
    type: Annotated[JobType, Doc("what it does", since="3.0")]
    status: Annotated[JobStatus, Doc("where in its life it is", since="3.0")]
    current_progress: Annotated[int, Doc("how far it has come, as a part of total-progress", since="3.0")]
    total_progress: Annotated[int, Doc("how far there is to go, as far as that is known", since="3.0")]
    error: Annotated[str | None, Doc("why it failed, if it has", since="3.0")] = None


class JobStatusChange(Struct):
    """Data of JOB_STATUS_CHANGE."""

    id: Annotated[str, Doc("name of the job", since="3.0")]
    status: Annotated[JobStatus, Doc("its new status", since="3.0")]


COMMANDS = (
    Command("query-jobs", "List the jobs.", returns=list[JobInfo], since="3.0"),
    Command("job-pause", "Pause a job at the next opportunity.", JobId, since="3.0"),
    Command("job-resume", "Let a paused job go on.", JobId, since="3.0"),
    Command("job-cancel", "End a job at the next opportunity, without its result.", JobId, since="3.0"),
    Command("job-complete", "Let a job that is ready come to its end.", JobId, since="3.0"),
    Command("job-finalize", "Let a pending job make its changes.", JobId, since="3.0"),
    Command("job-dismiss", "Forget a job that has concluded.", JobId, since="3.0"),
)

EVENTS = (Event("JOB_STATUS_CHANGE", "A job has another status.", JobStatusChange, "3.0"),)
