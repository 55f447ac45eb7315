"""What a queue lives through: memory that goes away, rings that make no sense, other loops, others' work."""

import errno
import fcntl
import itertools
import logging
import os
import random
import time

import pytest

from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio import DriverMemory
from blkferry.testing.virtio_device import FEATURES, VirtioDisk
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import Region
from blkferry.wire.virtio_blk import Type

SIZE = 1 << 20
PACKED = FEATURES | int(Feature.RING_PACKED)
BOTH = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])


@pytest.fixture
def daemon():
    with DaemonThread() as running:
        running.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        running.execute("blockdev-add", driver="null-co", node_name="slow", size=SIZE, latency_ns=50_000_000)
        yield running


def eventually(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def still_serves(daemon):
    """Another device of the same daemon does."""
    with VirtioDisk(daemon, "slow") as other:
        assert other.run(Type.IN, length=4096) == (0, bytes(4096))


@BOTH
@pytest.mark.parametrize("keep", [0, 4096, 1 << 19], ids=["nothing", "a page", "half"])
def test_memory_that_is_cut_off_stops_its_queue_and_nothing_else(daemon, features, keep, caplog):
    memory = DriverMemory(SIZE)
    if keep > 4096:
        memory.allocate(keep - 16384)  # the ring lies within what is left, requests do not
    with VirtioDisk(daemon, "m", features=features, memory=memory) as disk:
        assert disk.run(Type.OUT, 0, b"\x55" * 4096) == (0, b"")
        sent = [disk.block.add(kind, 0, b"\xaa" * 4096 if kind else b"", length=4096) for kind in (0, 1, 1, 0)]
        assert sent
        os.ftruncate(memory.fd, keep)
        if keep:  # the ring is there still
            disk.publish()
        eventually(lambda: disk.failures or _kick(disk))
        assert disk.failures == ["the driver's memory was cut off"]
    assert "queue 0 stopped: the driver's memory was cut off" in caplog.text
    still_serves(daemon)
    with VirtioDisk(daemon, "m") as again:
        status, data = again.run(Type.IN, length=4096)
        assert status == 0
        assert data in (b"\x55" * 4096, b"\xaa" * 4096), "what was lost has not been written"


def _kick(disk):
    os.eventfd_write(disk.kick_fd, 1)
    return False


@BOTH
@pytest.mark.parametrize("split", [True, False], ids=["two descriptors", "one descriptor"])
def test_half_a_header_writes_nothing(daemon, features, split):
    """The type was read, and the sector is gone: the payload, which is there, must not go to sector 0."""
    memory = DriverMemory(SIZE)
    with VirtioDisk(daemon, "m", features=features, memory=memory) as disk:
        assert disk.run(Type.OUT, 0, b"\x55" * 512) == (0, b"")
        header, data = memory.start + SIZE // 2 - 8, memory.allocate(513)
        memory.write(header, (1).to_bytes(8, "little") + (8).to_bytes(8, "little"))
        memory.write(data, b"\xaa" * 512)
        first = [(header, 8, False), (header + 8, 8, False)] if split else [(header, 16, False)]
        disk.ring.add([*first, (data, 512, False), (data + 512, 1, True)])
        os.ftruncate(memory.fd, SIZE // 2)
        disk.publish()
        eventually(lambda: disk.failures or _kick(disk))
        assert disk.failures == ["the driver's memory was cut off"]
    with VirtioDisk(daemon, "m") as again:
        assert again.run(Type.IN, length=512) == (0, b"\x55" * 512)


def test_sealed_memory_cannot_be_cut_off():
    memory = DriverMemory(SIZE)
    fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    memory.close()


@BOTH
def test_a_ring_that_makes_no_sense_stops_its_queue_and_nothing_else(daemon, features, caplog):
    with VirtioDisk(daemon, "m", features=features) as disk:
        assert disk.run(Type.IN, length=512)[0] == 0
        where = disk.memory.allocate(64)
        disk.ring.add([(where, 16, True), (where, 16, False)])
        disk.publish()
        eventually(lambda: disk.failures)
        assert disk.failures == ["a descriptor to read after one to write"]
        disk.ring.add([(where, 16, False), (where, 1, True)])
        disk.publish()
        os.eventfd_write(disk.kick_fd, 1)
        time.sleep(0.05)
        assert disk.ring.take() is None
        assert len(disk.failures) == 1
    assert "queue 0 stopped: a descriptor to read after one to write" in caplog.text
    still_serves(daemon)


@BOTH
def test_stopping_waits_for_what_is_in_flight_and_shows_it(daemon, features):
    with VirtioDisk(daemon, "slow", features=features) as disk:
        sent = [disk.block.add(Type.IN, 0, length=512) for _ in range(5)]
        disk.publish()
        eventually(lambda: disk.queue.in_flight.count == 5)
        state = daemon.call(disk.queue.stop)
        assert len(disk.block.collect()) == 5
        assert [disk.block.status(each) for each in sent] == [0] * 5
        disk.block.add(Type.IN, 0, length=512)
        disk.publish()
        time.sleep(0.05)
        assert not disk.block.collect(), "it is stopped"
        assert disk.queue.ring.state == state
        disk.queue = disk.make_queue()
        daemon.call(lambda: _start(disk.queue))
        assert len(disk.wait(1)) == 1


async def _start(queue):
    queue.start()


@BOTH
def test_a_device_moves_to_another_loop_while_its_driver_goes_on(daemon, features):
    daemon.execute("object-add", qom_type="iothread", id="io")
    graph = daemon.daemon.graph
    with VirtioDisk(daemon, "m", features=features) as disk:

        async def move():
            services = disk.device.root.services
            await services.run(disk.queue.pause())
            disk.device.drop()
            target = daemon.daemon.objects.iothread("io").services
            node = graph.find("m")
            target = target if node.services is not target else daemon.daemon.services
            node.move(target)
            target.loop.call_soon_threadsafe(disk.queue.resume)

        for turn in range(6):
            data = bytes([turn + 1]) * 4096
            sent = disk.block.add(Type.OUT, 8 * turn, data)
            disk.publish()
            daemon.call(move)
            disk.wait()
            assert disk.block.status(sent) == 0
            assert disk.run(Type.IN, 8 * turn, length=4096) == (0, data)


def test_a_driver_is_notified_when_somebody_else_goes_on(daemon):
    """Who had the ring before may have been killed between showing that something is done and telling of it."""
    with VirtioDisk(daemon, "m") as disk:
        disk.run(Type.IN, length=512)
        daemon.call(disk.queue.stop)
        os.eventfd_write(disk.call_fd, 1)
        assert os.eventfd_read(disk.call_fd)
        disk.queue = disk.make_queue()
        daemon.call(lambda: _start(disk.queue))
        assert os.eventfd_read(disk.call_fd) == 1


class Notes:
    """What a transport keeps of what is in flight, with the order of events."""

    def __init__(self, ring=None, pending=()):
        self.ring = ring
        self.events = []
        self.heads = []
        self.left = list(pending)

    def begin(self, heads, chains=()):
        self.events.append(("begin", list(heads)))
        self.heads += heads

    def end(self, heads):
        self.events.append(("end", list(heads)))
        for head in heads:
            self.heads.remove(head)

    def published(self, used_index):
        self.events.append(("published", used_index))

    def pending(self):
        return self.left


@BOTH
def test_what_is_in_flight_is_noted_before_and_after(daemon, features):
    notes = Notes()
    with VirtioDisk(daemon, "m", features=features, inflight=notes) as disk:
        for kind, data in [(Type.OUT, bytes(512)), (Type.IN, b""), (Type.FLUSH, b""), (99, b"")]:
            disk.run(kind, 0, data, length=512 if kind == Type.IN else 0)
        sent = [disk.block.add(Type.IN, 0, length=512) for _ in range(3)]
        disk.publish()
        disk.wait(3)
        daemon.call(disk.queue.stop)
        assert not notes.heads
        begun = [head for what, heads in notes.events if what == "begin" for head in heads]
        ended = [head for what, heads in notes.events if what == "end" for head in heads]
        assert sorted(begun) == sorted(ended)
        assert [each.head for each in sent] == begun[-3:]
        kinds = [what for what, _ in notes.events]
        assert kinds[:3] == ["begin", "end", "published"]
        assert all(after == "published" for what, after in itertools.pairwise(kinds) if what == "end")
        assert notes.events[-1] == ("published", disk.queue.ring.next_used)


@BOTH
def test_what_somebody_else_had_in_flight_is_done_first_and_in_order(daemon, features):
    """The daemon was killed between taking three requests and giving them back, in another order than they came."""
    notes = Notes()
    with VirtioDisk(daemon, "m", features=features, inflight=notes) as disk:
        daemon.call(disk.queue.stop)
        ring = disk.queue.ring
        sent = [disk.block.add(Type.OUT, 0, bytes([number]) * 512) for number in range(1, 4)]
        disk.publish()
        chains = [ring.take() for _ in sent]
        notes.left = [(chain.head, chain.descriptors) for chain in reversed(chains)]
        notes.heads = [chain.head for chain in chains]
        disk.queue = disk.make_queue()
        after = disk.block.add(Type.IN, 0, length=512)
        disk.publish()
        daemon.call(lambda: _start(disk.queue))
        done = disk.wait(4)
        assert done == [*reversed(sent), after]
        assert disk.block.data(after) == b"\x01" * 512, "the oldest, which was written last here"
        daemon.call(disk.queue.stop)
        assert not notes.heads


def test_a_full_or_broken_disk_fails_requests(daemon, tmp_path, monkeypatch):
    nodes.add(daemon, "buffered", tmp_path, SIZE, name="f")
    with VirtioDisk(daemon, "f") as disk:
        assert disk.run(Type.OUT, 0, bytes(4096))[0] == 0

        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwritev", fail)
        assert disk.run(Type.OUT, 0, bytes(4096))[0] == 1
        monkeypatch.undo()
        assert disk.run(Type.OUT, 0, bytes(4096))[0] == 0
        assert not disk.failures


def test_an_image_that_is_cut_off_under_hot_reads(daemon, tmp_path):
    """Reads are copied from a mapping of the file, and it ends: they fail as reads do, and the rest is served."""
    place = nodes.add(daemon, "buffered", tmp_path, 8 << 20, name="f")
    data = random.Random(3).randbytes(8 << 20)
    place.path.write_bytes(data)
    with VirtioDisk(daemon, "f") as disk:
        for _ in range(3):
            assert disk.run(Type.IN, 0, length=4096) == (0, data[:4096])
            assert disk.run(Type.IN, 8192, length=4096) == (0, data[4 << 20 : (4 << 20) + 4096])
        window = daemon.daemon.graph.find("f").storage._window
        assert window._copies is not None, "it was read by copying"
        refresh = type(daemon.daemon.graph.find("f").storage).refresh_size

        async def cut():
            # The end of the file goes between the look at its size and the copy.
            storage = daemon.daemon.graph.find("f").storage
            storage.refresh_size = lambda: (refresh(storage), os.truncate(place.path, 1 << 20))[0]

        daemon.call(cut)
        assert disk.run(Type.IN, 8192, length=4096)[0] == 1
        assert window.lost
        assert disk.run(Type.IN, 0, length=4096) == (0, data[:4096])
        assert not disk.failures


def test_what_was_stopped_for_writing_too_slowly_goes_by_the_engine(daemon, tmp_path):
    nodes.add(daemon, "buffered", tmp_path, SIZE, name="f")
    with VirtioDisk(daemon, "f") as disk:

        async def throttle():
            daemon.daemon.graph.find("f").storage.pace.stop(time.monotonic() + 60)

        assert disk.run(Type.OUT, 0, b"\x01" * 4096)[0] == 0
        daemon.call(throttle)
        for length in (512, 4096, 65536):
            assert disk.run(Type.OUT, 0, b"\x02" * length)[0] == 0
            assert disk.run(Type.IN, 0, length=length) == (0, b"\x02" * length)


def test_resizing_is_noticed(daemon):
    with VirtioDisk(daemon, "m") as disk:
        assert not disk.device.resized()
        assert disk.run(Type.IN, SIZE // 512, length=512)[0] == 1

        async def resize():
            node = daemon.daemon.graph.find("m")
            await node.resize(2 * SIZE)
            return disk.device.resized()

        assert daemon.call(resize)
        assert int.from_bytes(disk.device.config()[:8], "little") == 2 * SIZE // 512
        assert disk.run(Type.IN, SIZE // 512, length=512)[0] == 0


def test_several_regions_at_both_ends_of_memory(daemon):
    """Header, data and status may each lie in another region."""
    memory = DriverMemory(4 << 20)
    half = 2 << 20
    high = 1 << 40

    def regions(memory, mapped):
        return [Region(memory.start, half, mapped[:half]), Region(high, half, mapped[half:])]

    with VirtioDisk(daemon, "m", memory=memory, regions=regions) as disk:
        low = memory.allocate(4096)

        def place(where, offset):
            return (low + offset if where == "low" else high + offset), (
                memory.at(low + offset, 600) if where == "low" else memory.view[half + offset :][:600]
            )

        for turn, (header, data, status) in enumerate(
            (h, d, s) for h in ("low", "high") for d in ("low", "high") for s in ("low", "high")
        ):
            at_header, view = place(header, 0)
            view[:16] = bytes([1, 0, 0, 0, 0, 0, 0, 0, turn, 0, 0, 0, 0, 0, 0, 0])
            at_data, payload = place(data, 1024)
            payload[:512] = bytes([turn + 1]) * 512
            at_status, answer = place(status, 2048)
            answer[0] = 0xFF
            disk.ring.add([(at_header, 16, False), (at_data, 512, False), (at_status, 1, True)])
            disk.publish()
            eventually(disk.ring.take)
            assert answer[0] == 0
            assert disk.run(Type.IN, turn, length=512) == (0, bytes([turn + 1]) * 512)
        assert not disk.failures


def test_complaints_are_few(daemon, caplog):
    caplog.set_level(logging.WARNING)
    with VirtioDisk(daemon, "m") as disk:
        for _ in range(50):
            assert disk.run(Type.IN, 1 << 40, length=512)[0] == 1
    assert 1 <= len([r for r in caplog.records if "is refused" in r.message]) <= 3


def test_an_idle_queue_takes_no_time(daemon):
    with VirtioDisk(daemon, "m") as disk:
        for _ in range(20):
            disk.run(Type.IN, length=512)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1


@BOTH
@pytest.mark.parametrize("node", ["m", "slow"])
def test_all_that_the_device_writes_is_logged(daemon, features, node):
    """For live migration: every byte that changed, and the log comes before the driver is told."""
    logged = set()
    note = logged.update
    with VirtioDisk(daemon, node, features=features, log=lambda at, length: note(range(at, at + length))) as disk:
        for kind, data in [(Type.OUT, b"\x55" * 4096), (Type.IN, b""), (Type.GET_ID, b""), (Type.FLUSH, b"")]:
            disk.block.add(kind, 0, data, length=4096 if kind == Type.IN else 20 if kind == Type.GET_ID else 0)
            disk.ring.publish()
            before = bytes(disk.memory.view)
            os.eventfd_write(disk.kick_fd, 1)
            eventually(disk.block.collect)
            daemon.call(disk.queue.pause)
            after = bytes(disk.memory.view)
            daemon.call(lambda: _start(disk.queue))
            changed = {disk.memory.start + at for at in range(32768) if before[at] != after[at]}
            assert before[32768:] == after[32768:]
            assert changed
            assert changed <= logged


def test_logging_may_begin_while_requests_wait(daemon, tmp_path):
    nodes.add(daemon, "direct", tmp_path, SIZE, name="f")
    logged = []
    with VirtioDisk(daemon, "f") as disk:
        storage = daemon.daemon.graph.find("f").storage
        read, waiting = storage.read, []
        storage.read = lambda *arguments: waiting.append(arguments)
        sent = disk.block.add(Type.IN, 0, length=4096)
        disk.publish()
        eventually(lambda: waiting)
        disk.guest.log = lambda at, length: logged.append((at, length))

        async def go_on():
            storage.read = read
            read(*waiting[0])

        daemon.call(go_on)
        disk.wait()
        assert disk.block.status(sent) == 0
        assert (sent.data, 4096) in logged
        assert (sent.status, 1) in logged
