"""Repairing what a survey has found wrong in tables: entries that point nowhere, flags, the snapshot table, bitmaps.

Each change by itself takes the image nearer to being sound, so a repair may be cut short anywhere. Nothing is written
but entries of tables that the survey found to overlap with no other, a new snapshot table behind everything, and single
fields of the header.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.bitmap_directory import ALL_ONES
from blkferry.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET, ZERO
from blkferry.drivers.qcow2.header import AUTOCLEAR_AT, SNAPSHOTS_AT, Autoclear, pack_features, pack_snapshots
from blkferry.drivers.qcow2.survey import WORDS
from blkferry.units import align_up

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.survey import Survey


async def mend(survey: Survey) -> None:
    """Make every reference one that can be counted, and flush. The refcounts are another matter."""
    if survey.grow_to > survey.host.length:
        await survey.host.node.resize(align_up(survey.grow_to, survey.header.cluster_size))
    if survey.entries_wrong:
        await _mend_entries(survey)
    if survey.bitmaps_lost:
        autoclear = survey.header.autoclear & ~Autoclear.BITMAPS
        await survey.host.put(AUTOCLEAR_AT, pack_features(autoclear))
    elif survey.bitmaps_wrong:
        await _mend_bitmaps(survey)
    await survey.host.node.flush()
    if survey.snapshots_wrong:
        await _rewrite_snapshots(survey)


async def _mend_entries(survey: Survey) -> None:
    per_table = survey.header.l2_entries
    for offset, use in survey.tables.items():
        values = WORDS.load(await survey.host.get(offset, survey.header.cluster_size))
        first = None if use.index is None else use.index * per_table
        if changed := _mended(survey, values, first):
            await _put_words(survey, offset, values, changed)
    for offset, count in _l1_tables(survey):
        async for start, entries in survey.words(offset, count):
            repaired = [entry and survey.l1_entry(entry)[1] for entry in entries]
            changed = [index for index, entry in enumerate(entries) if entry != repaired[index]]
            await _put_words(survey, offset + start * 8, repaired, changed)


def _mended(survey: Survey, values: MutableSequence[int], first: int | None) -> list[int]:
    """Change the words of an L2 table that are wrong; gives their indices."""
    extended = survey.header.extended_l2
    changed = []
    for index in range(0, len(values), 2 if extended else 1):
        entry, bitmap = values[index], values[index + 1] if extended else 0
        if not entry and not bitmap:
            continue
        guest = None if first is None else (first + (index >> extended)) << survey.cluster_bits
        verdict = survey.judge.l2(entry, bitmap, guest)
        if verdict.repaired != entry:
            values[index] = verdict.repaired
            changed.append(index)
        if extended and verdict.repaired_bitmap != bitmap:
            values[index + 1] = verdict.repaired_bitmap
            changed.append(index + 1)
    return changed


async def _put_words(survey: Survey, offset: int, values: Sequence[int], changed: Sequence[int]) -> None:
    """Write the words from the first to the last that changed."""
    if changed:
        part = WORDS.of(list(values[changed[0] : changed[-1] + 1]))
        await survey.host.put(offset + changed[0] * 8, WORDS.dump(part))


def _l1_tables(survey: Survey) -> list[tuple[int, int]]:
    return [(survey.header.l1_table_offset, survey.header.l1_size), *survey.snapshot_l1s]


async def _mend_bitmaps(survey: Survey) -> None:
    """What is lost of a bitmap counts as dirty: too much is copied then, never too little."""
    for bitmap in survey.bitmaps:
        async for start, entries in survey.words(bitmap.table_offset, bitmap.table_size):
            changed = [index for index, entry in enumerate(entries) if survey.bitmap_entry_wrong(entry)]
            for index in changed:
                entries[index] = ALL_ONES
            await _put_words(survey, bitmap.table_offset + start * 8, entries, changed)


async def _rewrite_snapshots(survey: Survey) -> None:
    """Put a snapshot table whose entries are sound behind everything, and let the header point to it."""
    header, host = survey.header, survey.host
    usable = set(survey.snapshot_l1s)
    table = bytearray()
    for snapshot in survey.snapshots:
        if snapshot.l1_size and (snapshot.l1_table_offset, snapshot.l1_size) not in usable:
            snapshot = snapshot.without_l1()
        elif not snapshot.l1_size:
            snapshot = snapshot.without_l1()  # whatever its offset says
        table += snapshot.complete(header).build()
    offset = align_up(host.length, header.cluster_size)
    await host.node.resize(offset + align_up(len(table), header.cluster_size))
    await host.put(offset, table)
    await host.node.flush()
    await host.put(SNAPSHOTS_AT, pack_snapshots(len(survey.snapshots), offset))
    await host.node.flush()


# The COPIED flag ---------------------------------------------------------------------------------------------------


async def flag_copied(survey: Survey, *, copied: bool, early: bool = False) -> None:
    """Set COPIED in active entries whose cluster has one user, or clear it in those whose cluster has not; flush.

    Only where the refcount on disk says the same, or `early`: before it does.
    """
    header = survey.header
    for offset, use in survey.tables.items():
        if use.active:
            values = list(WORDS.load(await survey.host.get(offset, header.cluster_size)))
            changed = _flagged(survey, values, 2 if header.extended_l2 else 1, copied=copied, early=early)
            await _put_words(survey, offset, values, changed)
    async for start, entries in survey.words(header.l1_table_offset, header.l1_size):
        changed = []
        for index, entry in enumerate(entries):
            if entry & OFFSET and _flag_differs(survey, entry, entry & OFFSET, copied=copied, early=early):
                entries[index] = entry ^ COPIED
                changed.append(index)
        await _put_words(survey, header.l1_table_offset + start * 8, entries, changed)
    await survey.host.node.flush()


def _flagged(survey: Survey, values: list[int], words: int, *, copied: bool, early: bool) -> list[int]:
    changed = []
    for index in range(0, len(values), words):
        entry = values[index]
        place = entry & OFFSET
        if entry & COMPRESSED or not (place or (survey.has_data_file and entry & COPIED and not entry & ZERO)):
            continue
        if survey.has_data_file:
            differs = copied and not entry & COPIED
        else:
            differs = _flag_differs(survey, entry, place, copied=copied, early=early)
        if differs:
            values[index] = entry ^ COPIED
            changed.append(index)
    return changed


def _flag_differs(survey: Survey, entry: int, place: int, *, copied: bool, early: bool) -> bool:
    """Whether the flag of an entry is wrong and has to become `copied`."""
    cluster = place >> survey.cluster_bits
    if cluster >= survey.clusters or bool(entry & COPIED) is copied:
        return False
    users = survey.counted[cluster]
    return (users == 1) is copied and (early or users == survey.stored[cluster])
