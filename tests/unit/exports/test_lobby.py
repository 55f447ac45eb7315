"""Who makes room for whom before an export has been chosen."""

import pytest

from blkferry.exports.nbd.lobby import SILENT_SECONDS, TALKING_SECONDS, Lobby


class Guest:
    def __init__(self, lobby):
        self.lobby = lobby
        self.gone = False
        lobby.enter(self)

    def close(self, why):
        assert "made room" in why
        self.gone = True
        self.lobby.leave(self)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lobby(clock):
    return Lobby(clock)


def test_nobody_goes_before_having_had_time(lobby, clock):
    first = Guest(lobby)
    assert lobby.make_room() == pytest.approx(SILENT_SECONDS)
    lobby.spoke(first)
    assert lobby.make_room() == pytest.approx(TALKING_SECONDS)
    clock.now += TALKING_SECONDS * 0.9
    assert lobby.make_room() == pytest.approx(TALKING_SECONDS * 0.1)
    assert not first.gone
    clock.now += TALKING_SECONDS
    assert lobby.make_room() == 0
    assert first.gone
    assert len(lobby) == 0
    assert lobby.make_room() is None


def test_the_silent_go_first_and_the_oldest_of_them(lobby, clock):
    talker = Guest(lobby)
    lobby.spoke(talker)
    silent = [Guest(lobby) for _ in range(3)]
    clock.now += 10
    late = Guest(lobby)
    for each in silent:
        assert lobby.make_room() == 0
        assert each.gone
    assert not talker.gone
    assert lobby.make_room() == 0
    assert talker.gone
    assert list(lobby) == [late]
    assert lobby.make_room() == pytest.approx(SILENT_SECONDS)


def test_speaking_twice_makes_nobody_younger(lobby, clock):
    first, second = Guest(lobby), Guest(lobby)
    lobby.spoke(second)
    clock.now += 0.1
    lobby.spoke(first)
    lobby.spoke(second)
    clock.now += TALKING_SECONDS
    lobby.make_room()
    assert second.gone
    assert not first.gone


def test_who_has_left_is_not_asked_to_go(lobby, clock):
    first, second = Guest(lobby), Guest(lobby)
    lobby.leave(first)
    lobby.spoke(first)
    assert first not in lobby
    assert second in lobby
    clock.now += 1
    assert lobby.make_room() == 0
    assert not first.gone
