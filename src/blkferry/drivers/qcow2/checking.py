"""Checking qcow2 images and repairing them: what `qemu-img check` does, with the same numbers.

A check reads everything from the file, in one `survey`. A repair goes on from there in steps, each of which is on the
disk before the next begins, so that the image is never worse than before, whenever the repair ends:

1. Entries that point nowhere are emptied (`mending`). What follows works on a new survey.
2. COPIED flags of clusters with several users are cleared, so that nobody writes into what others read.
3. Refcounts that are too low are raised, then those that are too high lowered (`rebuild`), in place or anew.
4. COPIED flags of clusters with one user are set.
5. A last survey; if it finds nothing, the image is no longer called dirty or corrupt.

Where QEMU only reports a data cluster that is misaligned or behind the end of the file, a repair of ours makes it read
as zeroes: its bytes cannot be read in either case, and the image is usable again.
"""

from __future__ import annotations

import enum

from blkferry.drivers.qcow2.findings import CheckResult
from blkferry.drivers.qcow2.header import INCOMPATIBLE_AT, Header, Incompatible, pack_features
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.mending import flag_copied, mend
from blkferry.drivers.qcow2.rebuild import adjust, rebuild
from blkferry.drivers.qcow2.survey import Progress, Survey
from blkferry.errors import Error
from blkferry.graph.node import Node

_MENDING_ROUNDS = 3
"""Mending can bring to light what was hidden behind a damaged entry, hardly ever twice."""


class Repair(enum.Enum):
    NONE = "none"
    LEAKS = "leaks"
    ALL = "all"


async def check(
    file: Node,
    header: Header,
    *,
    data_file: Node | None = None,
    repair: Repair = Repair.NONE,
    progress: Progress | None = None,
) -> CheckResult:
    """Check the image in `file`, whose first cluster says `header`; nobody may write to it meanwhile.

    What cannot be checked or repaired is counted in `check_errors`; nothing is raised for what an image holds.
    `progress` is called with the number of L2 tables that are done and that there are, from the start again for every
    survey of a repair. Nothing of `data_file` is read: where its clusters are follows from the guest's offsets.
    """
    del data_file
    host = _Watched(file)
    survey = await _survey(host, header, progress)
    if repair is Repair.NONE or survey.result.check_errors:
        return survey.result
    if survey.stuck:
        survey.result.fail(f"The image cannot be repaired: {survey.stuck}")
        return survey.result
    return await _Repairs(host, header, repair, progress).run(survey)


class _Watched(HostFile):
    """A file that remembers whether it was written to."""

    written = False

    async def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.written = True
        await super().put(offset, data)


async def _survey(host: HostFile, header: Header, progress: Progress | None) -> Survey:
    survey = Survey(host, header, progress)
    await survey.run()
    return survey


class _Repairs:
    """One repair of an image."""

    def __init__(self, host: _Watched, header: Header, repair: Repair, progress: Progress | None) -> None:
        self._host = host
        self._header = header
        self._all = repair is Repair.ALL
        self._progress = progress

    async def run(self, survey: Survey) -> CheckResult:
        """Repair what the first survey has found; gives what a last one finds then."""
        found = survey.result
        try:
            survey = await self._repair(survey)
        except (Error, OSError) as error:
            survey = await self._again()
            survey.result.fail(f"The repair has failed: {error}")
        left = survey.result
        if not (left.check_errors or left.corruptions):
            await self._mark_clean(left)
        left.corruptions_fixed = max(found.corruptions - left.corruptions, 0)
        left.leaks_fixed = max(found.leaks - left.leaks, 0)
        left.modified = self._host.written
        told, left.messages = left.messages, []
        for message in [*found.messages, *(f"still there: {message}" for message in told)]:
            left.tell(message)
        return left

    async def _again(self) -> Survey:
        """A new survey, of what the header says now."""
        head = bytes(await self._host.get(0, self._header.cluster_size))
        self._header = Header.parse(head)
        return await _survey(self._host, self._header, self._progress)

    async def _repair(self, survey: Survey) -> Survey:
        if self._all:
            for _ in range(_MENDING_ROUNDS):
                if not survey.mendable:
                    break
                await mend(survey)
                survey = await self._again()
                if survey.result.check_errors or survey.stuck:
                    return survey
        elif survey.refcounts_lost:
            survey.result.fail("need to rebuild refcount structures")
            return survey
        elif survey.mendable:
            # What a damaged table referred to looks leaked, and may yet be wanted.
            survey.result.tell("leaks cannot be told from lost clusters before the corruptions are repaired")
            return survey
        if not (survey.refcounts_wrong or survey.refcounts_lost or survey.copied_wrong):
            return survey
        if self._all:
            await flag_copied(survey, copied=False, early=True)
            if survey.refcounts_lost:
                await rebuild(survey)
            else:
                await adjust(survey, upwards=True)
        if not survey.refcounts_lost:
            await adjust(survey, upwards=False)
        survey = await self._again()
        if self._all and survey.refcounts_wrong and not survey.refcounts_lost:  # what mending brought into reach
            await adjust(survey, upwards=True)
            await adjust(survey, upwards=False)
            survey = await self._again()
        if survey.copied_wrong:
            await flag_copied(survey, copied=False)
            await flag_copied(survey, copied=True)
            survey = await self._again()
        return survey

    async def _mark_clean(self, result: CheckResult) -> None:
        wrong = (Incompatible.DIRTY | Incompatible.CORRUPT) & self._header.incompatible
        if not wrong:
            return
        try:
            await self._host.node.flush()
            await self._host.put(INCOMPATIBLE_AT, pack_features(self._header.incompatible & ~wrong))
            await self._host.node.flush()
        except OSError as error:
            result.fail(f"The image could not be marked clean: {error.strerror}")
