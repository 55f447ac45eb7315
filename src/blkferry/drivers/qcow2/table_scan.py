"""The inner loop of a check: all entries of an L2 table.

A table whose clusters lie in a row, as where a disk was preallocated or written from end to end, is seen through
with a few comparisons. Otherwise a sound entry of a standard cluster costs a handful of operations, and everything else
goes to `verdicts`.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.counts import HIGH
from blkferry.drivers.qcow2.entries import ALL_ALLOCATED, COPIED, OFFSET

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.survey import Survey, TableUse


class TableScan:
    """Scans tables for `survey`, which takes what is found."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._words = 2 if survey.header.extended_l2 else 1
        self._whole = survey.host.length >> survey.cluster_bits  # clusters that are not cut off

    def table(self, values: MutableSequence[int], use: TableUse) -> None:
        """Count what the entries of one table refer to, and check them."""
        if self._words == 1 and self._row(values, use):
            return
        survey = self._survey
        words, bits = self._words, survey.cluster_bits
        entries = values[::words]
        bitmaps = values[1::2] if words == 2 else None
        times, active = use.active + use.inactive, use.active
        low, stored = survey.counted.low, survey.stored.low
        most = min(survey.form.maximum, HIGH - 1) - times
        end = 0 if survey.has_data_file else self._whole
        unusual = survey.judge.unusual
        allocated = fragmented = 0
        following = 0  # where the next cluster lies if the disk's clusters lie in a row
        for index, entry in enumerate(entries):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if not entry and not bitmap & ALL_ALLOCATED:
                continue
            if not entry & unusual and not (bitmap >> 32) & bitmap & ALL_ALLOCATED:
                place = entry & OFFSET
                cluster = place >> bits
                if 0 < cluster < end and (count := low[cluster]) <= most:
                    low[cluster] = count + times
                    if active:
                        if (stored[cluster] == 1) != (entry >= COPIED):
                            survey.check_copied(entry, place, active, "data cluster: l2_entry")
                        allocated += 1
                        if following and place != following:
                            fragmented += 1
                        following = place + (1 << bits)
                    continue
            guest = None if use.index is None else use.index * len(entries) + index << bits
            place = self._judge(entry, bitmap, guest, use)
            if place >= 0 and active:
                allocated += 1
                if following and place != following:
                    fragmented += 1
                following = place + (1 << bits)
        survey.result.allocated_clusters += allocated * active
        survey.result.fragmented_clusters += fragmented * active

    def _row(self, entries: MutableSequence[int], use: TableUse) -> bool:
        """Do all of `table` if it is sound and its clusters lie in a row and are nobody else's so far."""
        survey, first, count = self._survey, entries[0], len(entries)
        step = 1 << survey.cluster_bits
        cluster = (first & OFFSET) >> survey.cluster_bits
        if (
            first & survey.judge.unusual
            or survey.has_data_file
            or not 0 < cluster <= self._whole - count
            or entries[-1] != first + (count - 1) * step
            or entries != array("Q", range(first, first + count * step, step))
        ):
            return False
        low = survey.counted.low[cluster : cluster + count]
        stored = survey.stored.low[cluster : cluster + count]
        copied = array("H", [1]) * count
        if low.tobytes() != bytes(2 * count) or (
            use.active and (first < COPIED or stored.tobytes() != copied.tobytes())
        ):
            return False
        times = use.active + use.inactive
        if times > min(survey.form.maximum, HIGH - 1):
            return False
        low[:] = array("H", [times]) * count
        survey.result.allocated_clusters += count * use.active
        return True

    def _judge(self, entry: int, bitmap: int, guest: int | None, use: TableUse) -> int:
        """Take an entry that is not plainly sound; gives the place of a standard cluster, -1 for all others."""
        survey = self._survey
        times = use.active + use.inactive
        verdict = survey.judge.l2(entry, bitmap, guest)
        for complaint in verdict.complaints:
            survey.result.corrupt(complaint, times)
            survey.entries_wrong = True
        if verdict.length:
            survey.refer(verdict.offset, verdict.length, times)
        if verdict.standard:
            if use.active:
                self._check_copied(entry, verdict.place, use.active)
            return verdict.place
        if verdict.compressed:
            survey.result.allocated_clusters += use.active
            survey.result.compressed_clusters += use.active
            survey.result.fragmented_clusters += use.active
        return -1

    def _check_copied(self, entry: int, place: int, times: int) -> None:
        survey = self._survey
        if not survey.has_data_file:
            survey.check_copied(entry, place, times, "data cluster: l2_entry")
        elif not entry & COPIED:
            survey.copied_wrong += times
            survey.result.corrupt(f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=1", times)
