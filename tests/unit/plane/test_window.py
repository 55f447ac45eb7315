"""Which parts of a mapped file count as hot."""

import os

import pytest

from blkferry.plane.syscalls import CacheStat
from blkferry.plane.window import REGION_BITS, Window

REGION = 1 << REGION_BITS


@pytest.fixture
def window():
    """Three regions in memory: data, a hole, and data that ends early."""
    fd = os.memfd_create("window")
    os.ftruncate(fd, 2 * REGION + 5000)
    os.pwrite(fd, b"a" * REGION, 0)
    os.pwrite(fd, b"c" * 5000, 2 * REGION)
    made = Window(fd, 2 * REGION + 5000, in_memory=True)
    made.tick(1.0)
    yield made
    made.close()
    os.close(fd)


def touch(window, region, times=2):
    for _ in range(times):
        window.touch(region, CacheStat())
    return window.marks[region] == window.hot


def test_a_region_is_hot_when_it_is_read_again(window):
    assert not touch(window, 0, times=1)
    assert touch(window, 0, times=1)
    assert touch(window, 2)
    assert bytes(window.view[2 * REGION :]) == b"c" * 5000


def test_a_hole_is_never_hot(window):
    assert not touch(window, 1, times=5)


def test_what_was_hot_is_not_in_the_next_second(window):
    assert touch(window, 0)
    window.tick(1.9)
    assert window.marks[0] == window.hot
    window.tick(2.0)
    assert window.marks[0] != window.hot
    assert touch(window, 0)


def test_no_mark_is_ever_taken_for_a_newer_one(window):
    assert touch(window, 0)
    for second in range(2, 400):
        window.tick(float(second))
        assert window.marks[0] != window.hot, second


def test_all_is_forgotten_when_holes_may_come(window):
    assert touch(window, 0)
    window.forget()
    assert window.marks[0] != window.hot


def test_what_is_not_cached_is_not_hot(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(REGION))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    window = Window(fd, REGION, in_memory=False)
    cache = CacheStat()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cache.resident(fd, 0, REGION) is None:
        pytest.skip("this kernel has no cachestat")
    assert cache.resident(fd, 0, REGION) is False
    window.tick(1.0)
    assert not touch(window, 0)
    path.read_bytes()
    window.tick(2.0)
    assert touch(window, 0)
    window.close()
    os.close(fd)
