"""The reconnect log of a virtqueue, and its place."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import runtime
from blkferry.exports.vduse_blk.reconnect import QueueLog, ReconnectLog, region_size

ENTRIES = 8


def fresh() -> tuple[bytearray, QueueLog]:
    region = bytearray(region_size(ENTRIES))
    log = QueueLog(memoryview(region), ENTRIES)
    assert not log.sound
    log.clear()
    assert log.sound
    return region, log


@given(st.data())
def test_whenever_a_daemon_dies_the_log_knows_what_it_had_taken_and_not_shown(data):
    """The used ring's index is stored between `end` and `published`: a crash may come before or after that."""
    region, log = fresh()
    taken: list[int] = []  # in their order
    used_index = 65530
    log.recover(used_index)
    for _ in range(data.draw(st.integers(0, 30))):
        free = sorted(set(range(ENTRIES)) - set(taken))
        if free and data.draw(st.booleans()):
            heads = data.draw(st.permutations(free))[: data.draw(st.integers(1, len(free)))]
            log.begin(heads)
            taken += heads
        elif taken:
            done = data.draw(st.permutations(taken))[: data.draw(st.integers(1, len(taken)))]
            log.end(done)
            if data.draw(st.booleans()):
                used_index = (used_index + len(done)) & 0xFFFF
                taken = [head for head in taken if head not in done]
                if data.draw(st.booleans()):
                    log.published(used_index)
                    continue
            log = QueueLog(memoryview(region), ENTRIES)
            assert log.sound
            assert log.recover(used_index) == len(taken)
            assert log.pending() == [(head, ()) for head in taken]
            assert log.pending() == []


@given(st.binary(min_size=region_size(ENTRIES), max_size=region_size(ENTRIES)), st.integers(0, 0xFFFF))
def test_a_log_of_nonsense_names_descriptors_that_there_are(junk, used_index):
    log = QueueLog(memoryview(bytearray(junk)), ENTRIES)
    count = log.recover(used_index)
    heads = [head for head, _ in log.pending()]
    assert count == len(heads) == len(set(heads))
    assert all(0 <= head < ENTRIES for head in heads)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "ROOTS", str(tmp_path))
    return tmp_path / "blkferry"


def test_a_log_is_kept_for_a_device_that_is_taken_over_and_for_no_other(place):
    log = ReconnectLog("disk0", 2, ENTRIES, keep=False)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "vduse-disk0.log").stat().st_mode) == 0o600
    log.queues[1].begin([3])
    again = ReconnectLog("disk0", 2, ENTRIES, keep=True)
    assert not again.lost
    assert [queue.recover(0) for queue in again.queues] == [0, 1]
    assert [queue.recover(0) for queue in ReconnectLog("disk0", 2, ENTRIES, keep=False).queues] == [0, 0]
    again.remove()
    assert not list(place.iterdir())
    assert ReconnectLog("disk0", 2, ENTRIES, keep=True).lost


def test_a_log_of_another_device_is_left_alone(place):
    ReconnectLog("disk0", 2, ENTRIES, keep=False)
    before = (place / "vduse-disk0.log").read_bytes()
    with pytest.raises(Error, match="is one of other options"):
        ReconnectLog("disk0", 1, ENTRIES, keep=True)
    assert (place / "vduse-disk0.log").read_bytes() == before


def test_a_link_in_its_place_is_not_followed(place, tmp_path):
    ReconnectLog("other", 1, ENTRIES, keep=False)
    (place / "vduse-disk0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Error, match="failed to set reconnect log file"):
        ReconnectLog("disk0", 1, ENTRIES, keep=False)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("what", ["others may enter", "a link", "a file"])
def test_a_directory_that_is_not_ours_alone_is_refused(place, tmp_path, what):
    match what:
        case "others may enter":
            place.mkdir(mode=0o755)
            place.chmod(0o755)
        case "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            place.symlink_to(tmp_path / "elsewhere")
        case "a file":
            place.touch(mode=0o600)
    with pytest.raises(Error, match="is not a directory of ours alone") as caught:
        runtime.directory()
    assert caught.value.kind is ErrorKind.DENIED


def test_without_a_runtime_directory_the_remedy_is_named(place, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(runtime, "ROOTS", "")
    with pytest.raises(Error, match="there is no directory for it") as caught:
        runtime.directory()
    assert "XDG_RUNTIME_DIR" in caught.value.hint
