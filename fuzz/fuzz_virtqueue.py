"""Invariant: whatever a driver writes into its rings, others are served, nothing stays behind, nothing escapes.

    python fuzz/fuzz_virtqueue.py [seconds] [seed]

Plays sessions of a driver against a device in a daemon: requests that are right, whose answers are checked, among
chains that are not, then bytes changed anywhere in the rings, also while they are being served, and memory cut off.
Before and between them it replays what is in fuzz/corpus/virtqueue, whole and with numbers changed: what real drivers
had in their rings, and mischief that was thought of. One step a line, numbers in any base, +N is N bytes into the
memory:

    split|packed SIZE                 the kind of ring
    write ADDRESS HEX                 bytes of the memory
    desc INDEX ADDRESS LENGTH FLAGS NEXT   a descriptor of a split ring's table
    slot ADDRESS LENGTH ID FLAGS      the next descriptor of a packed ring
    avail HEAD, index N               into the available ring; its index, whatever is in it
    publish, kick, cut SIZE           show what was added; look at it; cut the memory off

A failure prints its seed and what was played.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import random
import struct
import sys
import time

from complaints import Complaints

from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio import INDIRECT, NEXT, WRITE, DriverMemory
from blkferry.testing.virtio_device import FEATURES, VirtioDisk
from blkferry.wire.virtio import packed
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import Type

SIZE = 1 << 20
PATIENCE = 10.0
CORPUS = [file.read_text() for file in sorted((pathlib.Path(__file__).parent / "corpus" / "virtqueue").iterdir())]
SCRIPTED = 1 << 20
"""Bytes of memory that a script has."""


def right_request(rng, disk):
    """A request that must be answered, its status, and whether it changes the disk."""
    sectors = SIZE // 512
    kind = rng.choice([Type.IN, Type.IN, Type.OUT, Type.FLUSH, Type.GET_ID, Type.DISCARD, Type.WRITE_ZEROES, 77])
    count = rng.choice([1, 1, 8, 16])
    sector = rng.choice([0, rng.randrange(sectors - 16), sectors - count, sectors, 1 << 60])
    bad = sector + count > sectors
    match kind:
        case Type.IN:
            return disk.block.add(kind, sector, length=512 * count), 1 if bad else 0
        case Type.OUT:
            return disk.block.add(kind, sector, rng.randbytes(512 * count)), 1 if bad else 0
        case Type.DISCARD | Type.WRITE_ZEROES:
            return disk.block.add(kind, 0, struct.pack("<QII", sector, count, 0)), 1 if bad else 0
        case Type.GET_ID:
            return disk.block.add(kind, 0, length=20), 0
        case Type.FLUSH:
            return disk.block.add(kind), 0
    return disk.block.add(kind, 0, length=512), 2


def any_address(rng, memory):
    return rng.choice(
        [
            memory.start + rng.randrange(memory.size),
            memory.start + memory.size - rng.randrange(1, 64),
            0,
            (1 << 64) - rng.randrange(1, 4096),
            rng.randrange(1 << 64),
        ]
    )


def wrong_chain(rng, disk):
    """Descriptors of any kind, in the ring."""
    memory, ring = disk.memory, disk.ring
    for _ in range(rng.randrange(1, 5)):
        address = any_address(rng, memory)
        length = rng.choice([0, 1, 16, 17, 48, 512, 4096, 0xFFFFFFFF])
        flags = rng.choice([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, rng.randrange(8), rng.randrange(1 << 16)])
        if disk.is_packed:
            ring.put_slot(address, length, rng.choice([0, ring.size, rng.randrange(1 << 16)]), flags)
        else:
            index = rng.randrange(ring.size)
            ring.put_descriptor(ring.descriptors, index, address, length, flags, rng.randrange(2 * ring.size))
            ring.make_available(rng.choice([index, rng.randrange(1 << 16)]))


def scribble(rng, disk):
    """Change bytes anywhere in the rings, or behind them where requests are."""
    view = disk.memory.view
    for _ in range(rng.randrange(1, 20)):
        view[rng.randrange(rng.choice([2048, 8192]))] = rng.randrange(256)


def play(rng, daemon, node):
    """One session."""
    features = FEATURES | (int(Feature.RING_PACKED) if rng.random() < 0.4 else 0)
    if rng.random() < 0.3:
        features &= ~int(Feature.EVENT_IDX)
    memory = DriverMemory(1 << 20)
    with VirtioDisk(daemon, node, size=rng.choice([4, 16, 64]), features=features, memory=memory) as disk:
        disk.is_packed = isinstance(disk.ring.ring(disk.guest), packed.PackedRing)
        for _ in range(rng.randrange(1, 6)):
            disk.block.indirect = rng.random() < 0.5
            disk.block.cut = rng.choice([512, 1000, 1 << 20])
            wanted = {}
            with contextlib.suppress(IndexError):  # the ring is full
                for _ in range(rng.randrange(1, 8)):
                    sent, status = right_request(rng, disk)
                    wanted[sent] = status
            disk.block.waiting = {head: sent for head, sent in disk.block.waiting.items() if sent.head == head}
            disk.publish()
            disk.wait(len(wanted), timeout=PATIENCE)
            for sent, status in wanted.items():
                assert disk.block.status(sent) == status, (sent, status)
            assert not disk.failures, disk.failures
        for _ in range(rng.randrange(4)):
            rng.choice([wrong_chain, scribble, wrong_chain])(rng, disk)
            with contextlib.suppress(IndexError, KeyError):
                right_request(rng, disk)
            disk.publish()
            os.eventfd_write(disk.kick_fd, 1)
            scribble(rng, disk)  # while it is being served
        if rng.random() < 0.2:
            os.ftruncate(memory.fd, rng.choice([0, 4096, 1 << 19]))
            os.eventfd_write(disk.kick_fd, 1)
        assert len(disk.failures) <= 1, disk.failures
        queue = disk.queue
    assert not queue.in_flight.count
    assert not queue.device.root.in_flight.count


def number(word, disk):
    return disk.memory.start + int(word[1:], 0) if word.startswith("+") else int(word, 0)


def step(disk, verb, *words):
    memory, ring = disk.memory, disk.ring
    match verb:
        case "write":
            data = bytes.fromhex(words[1])
            if memory.start <= number(words[0], disk) <= memory.start + SCRIPTED - len(data):
                memory.write(number(words[0], disk), data)
        case "desc":
            index, address, length, flags, after = (number(word, disk) for word in words)
            ring.put_descriptor(ring.descriptors, index % ring.size, address, length, flags, after)
        case "slot":
            ring.put_slot(*(number(word, disk) for word in words))
        case "avail":
            ring.make_available(number(words[0], disk))
        case "index":
            ring.avail[1] = number(words[0], disk)
        case "publish":
            ring.publish()
            os.eventfd_write(disk.kick_fd, 1)
        case "kick":
            os.eventfd_write(disk.kick_fd, 1)
        case "cut":
            os.ftruncate(memory.fd, number(words[0], disk))
            os.eventfd_write(disk.kick_fd, 1)


def changed(rng, script):
    """The script with some of its numbers changed, steps left out or repeated."""
    lines = script.splitlines()
    kind, *steps = lines
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(steps))
        words = steps[at].split()
        if len(words) > 1 and words[0] not in ("write", "cut") and rng.random() < 0.8:
            limit = 1 << (32 if words[0] in ("desc", "slot") else 16)
            where = rng.randrange(1, len(words))
            small = (words[0] == "slot" and where > 2) or (words[0] == "desc" and where > 3) or words[0] == "avail"
            words[where] = rng.choice(["0", "1", "8", "0xffff", str(rng.randrange(1 << 16 if small else limit))])
            steps[at] = " ".join(words)
        elif rng.random() < 0.5:
            steps.insert(at, steps[rng.randrange(len(steps))])
        elif words[0] != "cut":
            del steps[at]
        if not steps:
            break
    kept = [each for each in steps if not each.startswith("cut")]
    return "\n".join([kind, *kept, *(each for each in steps if each.startswith("cut"))])


def replay(daemon, script):
    """A script to its end. The driver of this process must not look at memory that is cut off, so that comes last."""
    first, *steps = [line.split() for line in script.splitlines() if line.strip() and not line.startswith("#")]
    features = FEATURES | (int(Feature.RING_PACKED) if first[0] == "packed" else 0)
    with VirtioDisk(daemon, "m", size=int(first[1]), features=features, memory_size=SCRIPTED) as disk:
        for words in steps:
            step(disk, *words)
        assert len(disk.failures) <= 1, disk.failures
        queue = disk.queue
    assert not queue.in_flight.count


def serves_still(daemon):
    """Somebody else is served, right and at once."""
    with VirtioDisk(daemon, "other") as disk:
        assert disk.run(Type.OUT, 8, b"still here" * 512)[0] == 0
        assert disk.run(Type.IN, 8, length=5120) == (0, b"still here" * 512)
    assert not daemon.daemon.services.buffers.used


def main(seconds=10.0, seed=None):
    seed = random.randrange(1 << 32) if seed is None else seed
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    logging.getLogger("blkferry").setLevel(logging.ERROR)
    sessions, rng = 0, random.Random(seed)
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        daemon.execute("blockdev-add", driver="null-co", node_name="n", size=SIZE, latency_ns=100_000)
        daemon.execute("blockdev-add", driver="memory", node_name="other", size=SIZE)
        deadline = time.monotonic() + seconds
        scripts = list(CORPUS)
        while scripts or time.monotonic() < deadline:
            session, script = rng.randrange(1 << 32), ""
            if scripts:
                script = scripts.pop()
            elif rng.random() < 0.4:
                script = changed(rng, rng.choice(CORPUS))
            try:
                if script:
                    replay(daemon, script)
                else:
                    play(random.Random(session), daemon, "mn"[session & 1])
                if sessions % 20 == 0:
                    serves_still(daemon)
                assert not complaints.texts, complaints.texts
            except BaseException:
                sys.stderr.write(f"seed {seed}: session {session}\n{script}\n")
                raise
            sessions += 1
    sys.stdout.write(f"seed {seed}: {sessions} sessions\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
