"""A driver in a process of its own: keeps a few requests going, and sleeps only where it may rely on being woken.

    alternating.py MEMORY_FD KICK_FD CALL_FD FEATURES DEPTH COUNT

Ends with 0 when all were answered. A notification that is lost, either way, is a sleep that does not end: exit code 1.
"""

import os
import select
import sys

from blkferry.testing.virtio import BlockDriver, DriverMemory, ring_driver
from blkferry.wire.virtio_blk import Type

MEMORY, RING = 1 << 20, 16
PATIENCE = 20  # seconds; every request takes microseconds


def main(memory_fd, kick_fd, call_fd, features, depth, count):
    memory = DriverMemory(MEMORY, fd=memory_fd)
    ring = ring_driver(memory, RING, features)
    block = BlockDriver(ring)
    buffers, slept, kicked = {}, 0, 0
    for _ in range(depth):
        sent = block.add(Type.IN, 0, length=512)
        buffers[sent.head] = [(sent.header, 16, False), (sent.data, 512, True), (sent.status, 1, True)], sent.status
    left = count - depth
    waiting = depth
    while waiting:
        if ring.publish():
            os.eventfd_write(kick_fd, 1)
            kicked += 1
        while (used := ring.take()) is None:
            if not ring.arm():
                slept += 1
                if not select.select([call_fd], [], [], PATIENCE)[0]:
                    sys.exit(1)
                os.eventfd_read(call_fd)
        ring.disarm()
        while used is not None:
            parts, status = buffers.pop(used[0])
            if memory.at(status, 1)[0]:
                sys.exit(2)
            waiting -= 1
            if left:
                left -= 1
                waiting += 1
                buffers[ring.add(parts)] = parts, status
            used = ring.take()
    print(slept, kicked)


main(*map(int, sys.argv[1:]))
