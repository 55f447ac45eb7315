import time

import pytest

from blkferry.plane.pace import CAREFUL_SECONDS, STALL_PENALTY, STALL_SECONDS, WRITE_SECONDS, Pace

SLOW = 2 * STALL_SECONDS


def spin(seconds):
    """Be busy for so long: how a turn looks in which others had the processor."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def turn(pace, work, writes=0):
    """A turn as exports make it; whether it might have written."""
    began = time.monotonic()
    if not pace.begin(began):
        return False
    work(SLOW)
    pace.end(began, writes)
    return True


def test_turns_that_sleep_stop_writing_within_turns_for_a_while():
    pace = Pace()
    assert turn(pace, time.sleep)  # too slow, but nobody knows why
    assert turn(pace, time.sleep)
    stopped = time.monotonic()
    assert not turn(pace, time.sleep)
    assert pace.inline_from > stopped + SLOW * (STALL_PENALTY - 1)
    assert pace.careful_until == pytest.approx(pace.inline_from + CAREFUL_SECONDS)


def test_one_that_sleeps_after_the_penalty_stops_it_again_at_once():
    pace = Pace()
    turn(pace, time.sleep)
    turn(pace, time.sleep)
    pace.inline_from = time.monotonic()
    assert turn(pace, time.sleep)
    assert not turn(pace, time.sleep)


def test_turns_that_are_merely_slow_go_on():
    pace = Pace()
    for _ in range(5):
        assert turn(pace, spin)
    assert not pace.inline_from
    assert pace.careful_until > time.monotonic()


def test_many_writes_may_take_long():
    pace = Pace()
    assert turn(pace, time.sleep, writes=round(1000 / WRITE_SECONDS))
    assert not pace.careful_until


def test_stopping_holds_until_it_ends():
    pace = Pace()
    pace.stop(float("inf"))
    assert not turn(pace, spin)
    assert not pace.begin(1e9)
