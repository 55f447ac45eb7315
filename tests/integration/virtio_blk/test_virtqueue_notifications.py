"""No notification is lost, in either direction, with suppression on: against a driver in another process.

CI runs a few thousand requests. By hand, on other occasions, ten million:

    BLKFERRY_ALTERNATING=10000000 pytest --timeout=0 tests/integration/virtio_blk/test_virtqueue_notifications.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio_device import VirtioDisk
from blkferry.wire.virtio.features import Feature

COUNT = int(os.environ.get("BLKFERRY_ALTERNATING", "5000"))
FLAGS = int(Feature.VERSION_1)
EVENTS = FLAGS | int(Feature.EVENT_IDX)
PACKED = EVENTS | int(Feature.RING_PACKED)
DRIVER = Path(__file__).with_name("alternating.py")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("polling", [True, False], ids=["polling", "sleeping"])
@pytest.mark.parametrize("features", [EVENTS, FLAGS, PACKED], ids=["event-idx", "flags", "packed"])
def test_all_of_many_alternating_requests_are_answered(features, polling, depth):
    with DaemonThread() as daemon:
        if not polling:
            daemon.daemon.services.poll_seconds = 0
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=1 << 20)
        with VirtioDisk(daemon, "m", size=16, features=features, memory_size=1 << 20) as disk:
            fds = disk.memory.fd, disk.kick_fd, disk.call_fd
            argv = [sys.executable, DRIVER, *map(str, (*fds, features, depth, COUNT))]
            ran = subprocess.run(argv, pass_fds=fds, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr
            assert disk.queue.requests == COUNT
            slept, kicked = map(int, ran.stdout.split())
            print(f"driver slept {slept} times, kicked {kicked} times")
            assert kicked > 0
            assert not disk.failures
