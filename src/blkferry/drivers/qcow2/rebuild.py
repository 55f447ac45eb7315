"""Writing refcounts that a survey has counted: where they are, or all of them anew.

In place, refcounts only ever change towards the truth, and those that must rise do so, durably, before any falls. A new
structure goes behind everything that is used; the header points to it when it is on the disk.
"""

from __future__ import annotations

from array import array
from itertools import groupby
from typing import TYPE_CHECKING

from blkferry.drivers.qcow2.header import MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_AT, pack_refcount_table
from blkferry.drivers.qcow2.survey import WORDS
from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from blkferry.drivers.qcow2.survey import Survey


async def adjust(survey: Survey, *, upwards: bool) -> None:
    """Write the refcounts that are too low (`upwards`) or too high into the blocks that are there, and flush."""
    per_block = survey.form.entries(survey.header.cluster_size)
    for index, clusters in groupby(survey.differences(), lambda cluster: cluster // per_block):
        offset = survey.blocks.get(index)
        if offset is None:
            continue
        wrong = [each for each in clusters if (survey.counted[each] > survey.stored[each]) is upwards]
        if not wrong:
            continue
        entries = survey.form.load(await survey.host.get(offset, survey.header.cluster_size))
        for cluster in wrong:
            entries[cluster % per_block] = survey.counted[cluster]
        await survey.host.put(offset, survey.form.dump(entries))
    await survey.host.node.flush()


async def rebuild(survey: Survey) -> None:
    """Make new refcount structures from what was counted. Raises Error when they would be too large."""
    host, header, form = survey.host, survey.header, survey.form
    cluster_size, per_block = header.cluster_size, form.entries(header.cluster_size)
    start = max(survey.counted.last(), survey.stored.last()) + 1
    indices, table_clusters = _plan(survey, start)
    if table_clusters * cluster_size > MAX_REFCOUNT_TABLE_SIZE:
        raise Error(ErrorKind.NO_SPACE, "A new refcount table would be larger than 8 MiB")
    end = start + len(indices) + table_clusters
    if end * cluster_size > host.length:
        await host.node.resize(end * cluster_size)
    table = array("Q", bytes(table_clusters * cluster_size))
    for position, index in enumerate(indices):
        first = index * per_block
        counts = _counts(survey, first, min(first + per_block, max(survey.counted.clusters, end)), start, end)
        counts.extend([0] * (per_block - len(counts)))
        table[index] = (start + position) * cluster_size
        await host.put(table[index], form.dump(form.of(counts)))
    table_offset = (start + len(indices)) * cluster_size
    await host.put(table_offset, WORDS.dump(table))
    await host.node.flush()
    await host.put(REFCOUNT_TABLE_AT, pack_refcount_table(table_offset, table_clusters))
    await host.node.flush()


def _plan(survey: Survey, start: int) -> tuple[list[int], int]:
    """Which refcount blocks there have to be, and how many clusters the table takes, both from cluster `start` on."""
    per_block = survey.form.entries(survey.header.cluster_size)
    used = [
        index
        for index in range(-(-survey.counted.clusters // per_block))
        if survey.counted.any_in(index * per_block, (index + 1) * per_block)
    ]
    blocks = table_clusters = 0
    while True:
        own = range(start // per_block, (start + blocks + table_clusters) // per_block + 1)
        indices = sorted({*used, *own})
        needed = -(-(indices[-1] + 1) * 8 // survey.header.cluster_size)
        if (len(indices), needed) == (blocks, table_clusters):
            return indices, table_clusters
        blocks, table_clusters = len(indices), needed


def _counts(survey: Survey, first: int, end: int, own_start: int, own_end: int) -> list[int]:
    """Refcounts from `first` on without the old structures and with the new ones."""
    counted, old = survey.counted, survey.refcount_structures
    found = [
        counted[cluster] - old.get(cluster, 0) if cluster < survey.counted.clusters else 0
        for cluster in range(first, end)
    ]
    for cluster in range(max(first, own_start), min(end, own_end)):
        found[cluster - first] = 1
    return found
