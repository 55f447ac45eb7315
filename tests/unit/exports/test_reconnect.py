"""The reconnect log of a virtqueue, and its place."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import reconnect, runtime
from blkferry.exports.vduse_blk.reconnect import QueueLog, ReconnectLog, region_size

ENTRIES = 8


def fresh() -> tuple[bytearray, QueueLog]:
    region = bytearray(region_size(ENTRIES))
    log = QueueLog(memoryview(region), ENTRIES)
    assert not log.sound
    log.clear()
    assert log.sound
    return region, log


def at_every_line(region: bytearray, call: Callable[[], object]) -> list[bytes]:
    """What the region holds before each line of the log's code, and after the last one."""
    found: list[bytes] = []

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename == reconnect.__file__:
            if event == "line":
                found.append(bytes(region))
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    assert found
    return [*found, bytes(region)]


def in_flight(region: bytes, used_index: int) -> list[int]:
    """What the next daemon finds, and the one after it, should that die as soon as it has looked."""
    copy = bytearray(region)
    found = []
    for _ in range(2):
        log = QueueLog(memoryview(copy), ENTRIES)
        assert log.sound
        count = log.recover(used_index)
        found.append([head for head, _ in log.pending()])
        assert count == len(found[-1])
        assert log.pending() == []
    assert found[0] == found[1]
    return found[0]


@given(st.data())
def test_wherever_a_daemon_dies_the_log_knows_what_it_had_taken_and_not_shown(data):
    """The used ring's index is stored between `end` and `published`."""
    region, log = fresh()
    taken: list[int] = []  # in their order
    began: list[int] = []
    used_index = 65530
    log.recover(used_index)
    for _ in range(data.draw(st.integers(0, 30))):
        free = sorted(set(range(ENTRIES)) - set(taken))
        what = data.draw(st.sampled_from(["begin", "end", "end what began last", "die"]))
        if what == "begin" and free:
            began = data.draw(st.permutations(free))[: data.draw(st.integers(1, len(free)))]
            for state in at_every_line(region, lambda: log.begin(began)):  # noqa: B023 - it is called here
                assert in_flight(state, used_index) in (taken, taken + began)
            taken += began
        elif what.startswith("end") and taken:
            done = data.draw(st.permutations(taken))[: data.draw(st.integers(1, len(taken)))]
            if what == "end what began last" and set(began) <= set(taken):
                done = list(began)
            for state in at_every_line(region, lambda: log.end(done)):  # noqa: B023
                assert in_flight(state, used_index) == taken
            taken = [head for head in taken if head not in done]
            used_index = (used_index + len(done)) & 0xFFFF
            for state in at_every_line(region, lambda: log.published(used_index)):  # noqa: B023
                assert in_flight(state, used_index) == taken
        elif what == "die":
            log = QueueLog(memoryview(region), ENTRIES)
            for state in at_every_line(region, lambda: log.recover(used_index)):  # noqa: B023
                assert in_flight(state, used_index) == taken
            assert log.pending() == [(head, ()) for head in taken]
            began = []
        assert in_flight(region, used_index) == taken


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
