"""Memory that a peer takes away: zeroes are read, the owner hears of it, and nothing else is as it should not be."""

import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from blkferry.plane import guarded
from blkferry.plane.guarded import guarded_map

SIZE = 1 << 20


class Owner:
    """Notes how often, and in which thread."""

    def __init__(self):
        self.told = []

    @property
    def lost(self):
        return bool(self.told)

    @lost.setter
    def lost(self, value):
        assert value
        self.told.append(threading.get_ident())


NOBODY = Owner()


@pytest.fixture
def memfd():
    fd = os.memfd_create("peer")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def test_what_was_cut_off_reads_as_zeroes_and_is_told(memfd):
    owner = Owner()
    view = guarded_map(memfd, SIZE, 0, owner)
    view[:] = b"\x55" * SIZE
    words = view.cast("H")
    os.ftruncate(memfd, 8192)
    assert not owner.lost, "nobody has looked"
    assert words[4095] == 0x5555
    assert words[4096] == 0
    assert owner.told == [threading.get_ident()]
    assert bytes(view[12288:20480]) == bytes(8192)
    view[40000] = 7
    assert view[40000] == 7
    assert len(owner.told) >= 3
    seen = []
    thread = threading.Thread(target=lambda: seen.append(bytes(view[500_000:600_000])))
    thread.start()
    thread.join()
    assert seen == [bytes(100_000)]


def test_the_kernel_still_gets_efault_elsewhere(memfd):
    view = guarded_map(memfd, SIZE, 0, NOBODY)
    os.ftruncate(memfd, 0)
    assert view[0] == 0
    with open("/dev/zero", "rb") as zero, pytest.raises(OSError, match="Bad address"):
        os.preadv(zero.fileno(), [view[8192:12288]], 0)


def test_part_of_a_file_and_read_only(memfd):
    os.pwrite(memfd, b"abc", 4096)
    view = guarded_map(memfd, 8192, 4096, NOBODY, prot=mmap.PROT_READ)
    assert view.readonly
    assert len(view) == 8192
    assert bytes(view[:3]) == b"abc"
    os.ftruncate(memfd, 0)
    assert bytes(view[:3]) == bytes(3)


def test_mappings_are_forgotten_with_their_last_view(memfd):
    gc.collect()
    before = dict(guarded._mappings)
    owner = Owner()
    owner.view = guarded_map(memfd, SIZE, 0, owner)
    part = owner.view[100:200]
    del owner
    assert len(guarded._mappings) == len(before) + 1
    del part
    gc.collect()
    assert guarded._mappings == before


@pytest.mark.parametrize("handler", ["", "import faulthandler; faulthandler.enable()"])
def test_another_bus_error_is_what_it_was(handler):
    script = f"""
        import mmap, os
        {handler}
        from blkferry.plane.guarded import guarded_map
        fd = os.memfd_create("peer")
        os.ftruncate(fd, 4096)
        other = mmap.mmap(fd, 4096)
        class Owner:
            lost = False
        owner = Owner()
        view = guarded_map(fd, 4096, 0, owner)
        os.ftruncate(fd, 0)
        view[0]
        print("lost" if owner.lost else "?", flush=True)
        other[0]
        print("still here")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=30
    )
    assert ran.returncode == -7  # SIGBUS
    assert ran.stdout == "lost\n"
    assert ("Bus error" in ran.stderr) == bool(handler)


def test_somebody_may_have_put_his_handler_in_ours_place(memfd):
    script = """
        import faulthandler, os
        from blkferry.plane.guarded import guarded_map
        fd = os.memfd_create("peer")
        os.ftruncate(fd, 4096)
        class Owner:
            lost = False
        owner = Owner()
        first = guarded_map(fd, 4096, 0, owner)
        faulthandler.enable()
        second = guarded_map(fd, 4096, 0, owner)
        os.ftruncate(fd, 0)
        print(first[0], second[0], owner.lost)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=30
    )
    assert (ran.returncode, ran.stdout) == (0, "0 0 True\n")
