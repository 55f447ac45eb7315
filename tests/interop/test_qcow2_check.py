"""Our check against qemu-img check: sound images of every kind, and images with one thing damaged; then our repair."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import qcow2_images as images
from qcow2_patients import COMMANDS, DAMAGE, SOUND, Patient, disk, make

import peers
from blkferry.drivers.qcow2.checking import Repair

pytestmark = peers.requires("qemu-img", "qemu-io")


@pytest.mark.parametrize("name", SOUND)
async def test_sound_images(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "disk", *SOUND[name])
    theirs = images.qemu_check(path)
    before = path.read_bytes()
    ours = await images.checked(path)
    images.same_numbers(ours, theirs)
    assert ours.clean
    repaired = await images.checked(path, Repair.ALL)
    assert (repaired.clean, repaired.modified) == (True, False)
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("original") / "disk", "", COMMANDS)


@pytest.fixture
def patient(original, tmp_path) -> Patient:
    shutil.copy(original, tmp_path / "disk")
    return Patient(tmp_path / "disk")


def assert_repaired(patient: Patient, original: Path, lost) -> None:
    theirs = images.qemu_check(patient.path)
    assert not any(theirs.get(key) for key in ("corruptions", "leaks", "check-errors")), theirs
    assert not images.get(patient.path, 72) & 3
    if lost is None:
        return
    before, after = disk(original), disk(patient.path)
    assert {n for n in range(len(before)) if before[n] != after[n]} <= set(lost)
    assert disk(original, "one") == disk(patient.path, "one")


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage(patient, original, name):
    damage, lost = DAMAGE[name]
    damage(patient)
    theirs = images.qemu_check(patient.path)
    before = patient.path.read_bytes()
    ours = await images.checked(patient.path)
    assert patient.path.read_bytes() == before
    images.same_numbers(ours, theirs)
    assert len(ours.messages) >= min(ours.corruptions + ours.leaks, 1)
    repaired = await images.checked(patient.path, Repair.ALL)
    assert repaired.clean, repaired.messages
    assert repaired.modified
    assert repaired.corruptions_fixed == ours.corruptions
    assert repaired.leaks_fixed == ours.leaks
    assert_repaired(patient, original, lost)
