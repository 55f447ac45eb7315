"""What was in flight when a daemon died: the next one does it, and tells what it cannot know."""

import os

import pytest
from vhost_user_host import eventually

from blkferry.exports.vhost_user_blk.inflight import InflightBuffer, PackedInflight, SplitInflight
from blkferry.testing.vhost_user import FEATURES, PROTOCOL, FrontEnd, Vring
from blkferry.testing.virtio import DriverMemory, PackedDriver
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import ProtocolFeature, Request
from blkferry.wire.virtio.chain import Inflight, Ring
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory
from blkferry.wire.virtio.packed import PackedState
from blkferry.wire.virtio_blk import Type
from peers import requires, run

PACKED = FEATURES | int(Feature.RING_PACKED)
INFLIGHT = PROTOCOL | ProtocolFeature.INFLIGHT_SHMFD
DATA = bytes(range(256)) * 16


class Dead:
    """What a daemon has done to a ring and its record before it died: took three requests, and answered the second."""

    def __init__(self, described: wire.Inflight, fd: int, vring: Vring) -> None:
        buffer = InflightBuffer(described, os.dup(fd))
        region, driver = buffer.region(0, vring.ring.size), vring.ring
        guest = GuestMemory([driver.memory.region()])
        if isinstance(driver, PackedDriver):
            used = driver.next_used, driver.used_wrap
            self.record: Inflight = PackedInflight(region, driver.size, driver.descriptors, used)
            self.ring: Ring = driver.ring(guest, PackedState(*used, *used))
        else:
            self.record = SplitInflight(region, driver.size, driver.used[1])
            self.ring = driver.ring(guest)
        for _ in range(3):
            chain = self.ring.take()
            self.record.begin([chain.head], [chain])
            if len(chain.readable) == 1:
                answered = chain
        self.ring.put(answered, 513)
        self.record.end([answered.head])

    def show(self, *, note: bool) -> None:
        """Show the driver what was answered, and note that or not."""
        self.ring.publish()
        if note:
            self.record.published(self.ring.next_used)


@pytest.mark.parametrize("progress", ["not shown", "shown", "noted"])
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_what_was_in_flight_is_done_by_the_next_daemon(host, features, progress):
    """Nothing twice, and nothing never, wherever the one before has died."""
    path = host.export()
    memory = DriverMemory(16 << 20)
    with FrontEnd(path, memory=memory) as front:
        front.negotiate(features, INFLIGHT)
        front.send(Request.GET_INFLIGHT_FD, wire.Inflight(0, 0, 1, 16))
        described, (fd,) = front.receive(Request.GET_INFLIGHT_FD, wire.Inflight)
        assert (described.num_queues, described.queue_size) == (1, 16)
        front.tell(Request.SET_INFLIGHT_FD, described, [fd])
        front.share()
        vring = front.make_vring(size=16)
        front.start(vring)
        for sector in range(37):
            assert vring.run(Type.OUT, sector, bytes([sector]) * 512)[0] == 0
        front.stop(vring)
        front.vrings.clear()  # it stays, for the next one
    first = vring.block.add(Type.OUT, 100, b"A" * 512)
    second = vring.block.add(Type.IN, 1, length=512)
    third = vring.block.add(Type.OUT, 101, b"C" * 512)
    memory.write(second.data, b"2" * 512)
    vring.ring.publish()
    dead = Dead(described, fd, vring)
    if progress != "not shown":
        dead.show(note=progress == "noted")
    with FrontEnd(path, memory=memory) as front:
        front.negotiate(features, INFLIGHT)
        front.tell(Request.SET_INFLIGHT_FD, described, [fd])
        front.share()
        front.vrings.append(vring)
        front.start(vring, base=0x1234)  # front ends do not know after a crash
        assert set(map(id, vring.wait(3))) == {id(first), id(second), id(third)}
        assert [vring.block.status(sent) for sent in (first, third)] == [0, 0]
        # What the driver has seen as answered is not done again.
        assert vring.block.data(second) == (bytes([1]) if progress == "not shown" else b"2") * 512
        for sector, letter in ((100, b"A"), (101, b"C"), (36, bytes([36]))):
            assert vring.run(Type.IN, sector, length=512) == (0, letter * 512)
    os.close(fd)


@requires("qemu-img")
def test_a_crash_that_may_have_lost_writes_fails_the_next_flush(host, tmp_path):
    """A format's metadata dies with its daemon, if it was not flushed. The guest must not believe that it was."""
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    file = {"driver": "file", "filename": str(image)}
    host.daemon.execute("blockdev-add", driver="qcow2", node_name="q", file=file)
    path = host.export(node="q")

    def session(buffer: tuple[wire.Inflight, int] | None) -> tuple[list[int], tuple[wire.Inflight, int]]:
        """Write and flush twice; the statuses of that, and the buffer."""
        with FrontEnd(path) as front:
            front.negotiate(FEATURES, INFLIGHT)
            if buffer is None:
                front.send(Request.GET_INFLIGHT_FD, wire.Inflight(0, 0, 1, 8))
                described, (fd,) = front.receive(Request.GET_INFLIGHT_FD, wire.Inflight)
                buffer = described, fd
            front.tell(Request.SET_INFLIGHT_FD, buffer[0], [buffer[1]])
            front.share()
            vring = front.make_vring(size=8)
            front.start(vring)
            statuses = [vring.run(kind, 0, data)[0] for kind, data in ((Type.OUT, DATA), (Type.FLUSH, b""))]
            return [*statuses, vring.run(Type.FLUSH)[0]], buffer

    statuses, (described, fd) = session(None)
    assert statuses == [0, 0, 0]
    eventually(lambda: not any(os.pread(fd, 8, described.mmap_size - 8)))  # an orderly end
    assert session((described, fd))[0] == [0, 0, 0]
    eventually(lambda: not any(os.pread(fd, 8, described.mmap_size - 8)))
    os.pwrite(fd, b"somebody", described.mmap_size - 8)  # who did not come to one
    assert session((described, fd))[0] == [0, 1, 0]
    os.close(fd)
