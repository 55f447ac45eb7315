"""Repairs of leaks alone, of what QEMU does not repair, of what cannot be repaired, and repairs that are cut short."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import qcow2_images as images
from qcow2_patients import CLUSTER, COMMANDS, DAMAGE, MIB, SOUND, Patient, disk, make, zero

import peers
from blkferry.drivers.qcow2.checking import Repair
from blkferry.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET
from blkferry.drivers.qcow2.header import Header
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.survey import WORDS, Survey

pytestmark = peers.requires("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("original") / "disk", "", COMMANDS)


@pytest.fixture
def patient(original, tmp_path) -> Patient:
    shutil.copy(original, tmp_path / "disk")
    return Patient(tmp_path / "disk")


@pytest.mark.parametrize("name", ["refcount too low", "refcount table is empty", "data, misaligned"])
async def test_no_leaks_to_repair(patient, name):
    DAMAGE[name][0](patient)
    before = patient.path.read_bytes()
    ours = await images.checked(patient.path, Repair.LEAKS)
    assert ours.corruptions
    assert (ours.leaks_fixed, ours.modified) == (0, False)
    assert patient.path.read_bytes() == before


@pytest.mark.parametrize("name", ["refcount too high", "refcount much too high", "leaked cluster"])
async def test_repairing_leaks_alone(patient, tmp_path, name):
    DAMAGE[name][0](patient)
    theirs_path = tmp_path / "theirs"
    shutil.copy(patient.path, theirs_path)
    theirs = images.qemu_check(theirs_path, "-r", "leaks")
    ours = await images.checked(patient.path, Repair.LEAKS)
    assert ours.leaks_fixed == theirs.get("leaks-fixed", 0)
    assert (ours.corruptions, ours.leaks, ours.check_errors > 0) == (
        theirs.get("corruptions", 0),
        theirs.get("leaks", 0),
        theirs["check-errors"] > 0,
    )
    images.same_numbers(await images.checked(patient.path), images.qemu_check(patient.path))


@pytest.mark.parametrize("name", [name for name in SOUND if name != "empty"])
async def test_all_refcounts_lost(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "disk", *SOUND[name])
    before = disk(path)
    zero(path, Patient(path).table, 8)
    ours = await images.checked(path)
    images.same_numbers(ours, images.qemu_check(path))
    repaired = await images.checked(path, Repair.ALL)
    assert repaired.clean, repaired.messages
    images.same_numbers(await images.checked(path), images.qemu_check(path))
    assert disk(path) == before


SNAPSHOTS = {
    "L1 misaligned": (0, 512, 1),
    "L1 behind the end": (0, 1 << 40, 1),
    "L1 too large": (8, 0xFFFFFFFF, 1),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
async def test_damaged_snapshots(patient, original, name):
    at, value, corruptions = SNAPSHOTS[name]
    table = images.read_header(patient.path).snapshots_offset
    images.put(patient.path, table + at, value, ">I" if at == 8 else ">Q")
    ours = await images.checked(patient.path)
    if name != "L1 behind the end":  # QEMU does not open that
        theirs = images.qemu_check(patient.path)
        assert ours.corruptions >= corruptions
        assert theirs.get("corruptions", 0) == ours.corruptions
    repaired = await images.checked(patient.path, Repair.ALL)
    assert repaired.clean, repaired.messages
    assert disk(original) == disk(patient.path)


async def test_a_snapshot_without_its_extra_data(tmp_path):
    """Version 2 images may have such snapshots, version 3 images must not."""
    path = make(tmp_path / "disk", "compat=0.10", ["write -P 1 0 1M", "snapshot one"])
    header = images.read_header(path)
    table = header.snapshots_offset
    entry = path.read_bytes()[table : table + 128]
    extra = int.from_bytes(entry[36:40], "big")
    with path.open("r+b") as file:
        file.seek(table)
        file.write(entry[:36] + bytes(4) + entry[40 + extra :])
    images.same_numbers(await images.checked(path), images.qemu_check(path))
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\0\0\0\3")
        file.seek(72)
        file.write(bytes(24) + b"\0\0\0\4\0\0\0\x68" + bytes(64))
    images.same_numbers(await images.checked(path), images.qemu_check(path))
    assert (await images.checked(path, Repair.ALL)).clean
    assert not images.qemu_check(path).get("corruptions")
    assert "one" in peers.run("qemu-img", "snapshot", "-l", path).stdout


@pytest.fixture
def bitmapped(tmp_path) -> Path:
    return make(tmp_path / "disk", "cluster_size=4k", ["write -P 1 0 1M", "bitmap a", "bitmap b", "write -P 2 0 100k"])


@pytest.mark.parametrize("value", [1 << 40, 512, 1 << 60, 4097])
async def test_damaged_bitmap_tables(bitmapped, value):
    directory = images.read_header(bitmapped).bitmaps.directory_offset
    images.put(bitmapped, images.get(bitmapped, directory), value)
    ours = await images.checked(bitmapped)
    assert ours.corruptions == 1
    if value == 1 << 40:  # QEMU does not open the others
        assert images.qemu_check(bitmapped)["corruptions"] == 1
    assert (await images.checked(bitmapped, Repair.ALL)).clean
    assert not images.qemu_check(bitmapped).get("corruptions")
    assert len(images.info(bitmapped)["format-specific"]["data"]["bitmaps"]) == 2


async def test_a_damaged_bitmap_directory(bitmapped):
    directory = images.read_header(bitmapped).bitmaps.directory_offset
    images.put(bitmapped, directory + 8, 77, ">I")
    assert (await images.checked(bitmapped)).corruptions
    assert (await images.checked(bitmapped, Repair.ALL)).clean
    theirs = images.qemu_check(bitmapped)
    assert not any(theirs.get(key) for key in ("corruptions", "leaks", "check-errors")), theirs


BITMAPS = {
    "allocated and zero": (0, 1 | 1 << 32),
    "allocated nowhere": (8, 7),
    "compressed with a bitmap": (80, 3),
}


@pytest.mark.parametrize("name", BITMAPS)
async def test_damaged_subclusters(tmp_path, name):
    commands = ["write -P 1 0 3k", "write -P 2 1M 200k", "write -z 1M 4k", "write -c -P 4 5M 64k"]
    patient = Patient(make(tmp_path / "disk", "extended_l2=on", commands))
    index, bitmap = BITMAPS[name]
    images.put(patient.path, patient.l2 + index * 16 + 8, bitmap)
    ours = await images.checked(patient.path)
    images.same_numbers(ours, images.qemu_check(patient.path))
    assert ours.corruptions
    assert (await images.checked(patient.path, Repair.ALL)).clean
    assert not images.qemu_check(patient.path).get("corruptions")
    assert disk(patient.path)[16:20] == disk(make(tmp_path / "again", "extended_l2=on", commands))[16:20]


async def test_a_data_file_whose_clusters_are_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patient = Patient(make(tmp_path / "disk", "data_file=data", ["write -P 1 0 1M", "write -P 2 7M 64k"]))
    patient.set_entry(112, 5 * MIB | COPIED)
    patient.set_entry(3, patient.entry(3) & ~COPIED)
    patient.set_entry(4, COMPRESSED | 4096)
    assert (await images.checked(patient.path)).corruptions == 3
    assert (await images.checked(patient.path, Repair.ALL)).clean
    assert not images.qemu_check(patient.path).get("corruptions")
    after = disk(patient.path)
    assert after[112] == b"\2" * CLUSTER
    assert after[3] == b"\1" * CLUSTER
    assert after[4] == bytes(CLUSTER)


async def test_overflow_is_told_and_left(tmp_path):
    patient = Patient(make(tmp_path / "disk", "refcount_bits=1", ["write -P 1 0 128k"]))
    patient.set_entry(1, patient.entry(0))
    ours = await images.checked(patient.path)
    images.same_numbers(ours, images.qemu_check(patient.path))
    assert any("overflow" in message for message in ours.messages)
    assert (await images.checked(patient.path, Repair.ALL)).corruptions == 1


async def test_tables_that_overlap_are_left_alone(patient):
    """The active L1 table in the snapshot table: whichever is repaired would damage the other."""
    header = images.read_header(patient.path)
    images.put(patient.path, 40, header.snapshots_offset)
    before = patient.path.read_bytes()
    ours = await images.checked(patient.path, Repair.ALL)
    assert ours.corruptions
    assert ours.check_errors == 1
    assert patient.path.read_bytes() == before


async def test_a_snapshot_table_that_cannot_be_read(patient):
    images.put(patient.path, images.read_header(patient.path).snapshots_offset + 36, 1 << 31, ">I")
    before = patient.path.read_bytes()
    assert (await images.checked(patient.path, Repair.ALL)).check_errors == 1
    assert patient.path.read_bytes() == before


async def test_every_l1_entry_is_the_same_table(tmp_path):
    """What a hostile image refers to often is read once."""
    path = make(tmp_path / "disk", "cluster_size=512", ["write -P 1 0 32k"], size="1G")
    header = images.read_header(path)
    entry = images.get(path, header.l1_table_offset)
    with path.open("r+b") as file:
        file.seek(header.l1_table_offset)
        file.write(entry.to_bytes(8, "big") * header.l1_size)
    ours = await images.checked(path)
    theirs = images.qemu_check(path)
    assert ours.corruptions == theirs["corruptions"]
    assert ours.allocated_clusters == theirs["allocated-clusters"] == 64 * header.l1_size
    assert len(ours.messages) < 1000
    assert (await images.checked(path, Repair.ALL)).clean


async def test_progress(patient):
    told = []
    async with images.opened(patient.path) as (node,):
        header = images.read_header(patient.path)
        await images.check(node, header, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_repair_cut_short_does_no_harm(patient, monkeypatch, name):
    """After no write of a repair are there more clusters that may be overwritten although they are in use."""
    DAMAGE[name][0](patient)
    put = HostFile.put
    harm = []

    async def look(host):
        survey = Survey(host, Header.parse(bytes(await host.get(0, CLUSTER))))
        await survey.run()
        low = sum(survey.counted[each] > survey.stored[each] for each in survey.differences())
        shared = [
            entry
            for table in survey.tables
            for entry in WORDS.load(await host.get(table, CLUSTER))
            if entry >= COPIED and survey.counted[min((entry & OFFSET) >> 16, survey.clusters)] > 1
        ]
        harm.append(low + len(shared))

    async def watched(host, offset, data):
        if not harm:
            await look(host)
        await put(host, offset, data)
        await look(host)

    monkeypatch.setattr(HostFile, "put", watched)
    assert (await images.checked(patient.path, Repair.ALL)).clean
    assert harm == sorted(harm, reverse=True)
    assert harm[-1] == 0
