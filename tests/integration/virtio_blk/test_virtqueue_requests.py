"""What a driver asks is done, over every kind of node, with every kind of ring; and what it may not ask is refused."""

import itertools
import os
import random
import struct
import time

import pytest

from blkferry.exports.virtio_blk import slow
from blkferry.testing import nodes
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio import NEXT, WRITE
from blkferry.testing.virtio_device import FEATURES, VirtioDisk
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import Feature as Blk
from blkferry.wire.virtio_blk import Type

SIZE = 1 << 20
OK, IOERR, UNSUPP = 0, 1, 2
PACKED = FEATURES | int(Feature.RING_PACKED)
ENGINES = ["auto", "threads"]


@pytest.fixture(scope="module", params=ENGINES)
def daemon(request):
    with DaemonThread(engine=request.param) as running:
        yield running


@pytest.fixture
def node(daemon, request, tmp_path):
    """The name of a node of the kind that the test asks for."""
    kind = getattr(request, "param", "buffered")
    if kind == "qcow2":
        add_qcow2(daemon, tmp_path / "n.qcow2")
    else:
        nodes.add(daemon, kind, tmp_path, SIZE, name="n")
    yield "n"
    for name in ("n", "n-file", "n-below"):
        if name in daemon.daemon.graph.nodes:
            daemon.execute("blockdev-del", node_name=name)


def add_qcow2(daemon, path):
    path.touch()
    daemon.execute("blockdev-add", driver="file", node_name="n-file", filename=str(path), discard="unmap")
    daemon.execute("blockdev-create", job_id="j", options={"driver": "qcow2", "file": "n-file", "size": SIZE})
    deadline = time.monotonic() + 10
    while daemon.execute("query-jobs")[0]["status"] != "concluded":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    daemon.execute("job-dismiss", id="j")
    daemon.execute("blockdev-add", driver="qcow2", node_name="n", file="n-file", discard="unmap")


def segment(sector, sectors, flags=0):
    return struct.pack("<QII", sector, sectors, flags)


@pytest.mark.parametrize("node", [*nodes.KINDS, *nodes.SHUFFLED, "qcow2"], indirect=True)
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_histories_agree_with_a_model(daemon, node, features):
    """Several requests at once, whose ranges do not overlap, in descriptors cut anywhere."""
    rng = random.Random(5)
    with VirtioDisk(daemon, node, features=features, size=512, memory_size=8 << 20) as disk:
        model = bytearray(disk.device.size)
        sectors = len(model) // 512
        for turn in range(60):
            disk.block.indirect = rng.random() < 0.5
            disk.block.cut = rng.choice([512, 1000, 4096, 1 << 20])
            wanted = {}
            at = 0
            while len(wanted) < rng.choice([1, 4]) and at < sectors - 200:
                at += rng.randrange(100)
                count = rng.choice([1, 8, 8, 8, 100])
                start, end = at * 512, (at + count) * 512
                match rng.choice([Type.IN, Type.IN, Type.OUT, Type.OUT, Type.WRITE_ZEROES, Type.FLUSH]):
                    case Type.IN:
                        wanted[disk.block.add(Type.IN, at, length=end - start)] = bytes(model[start:end])
                    case Type.OUT:
                        model[start:end] = rng.randbytes(end - start)
                        wanted[disk.block.add(Type.OUT, at, bytes(model[start:end]))] = None
                    case Type.WRITE_ZEROES:
                        model[start:end] = bytes(end - start)
                        wanted[disk.block.add(Type.WRITE_ZEROES, 0, segment(at, count, rng.randrange(2)))] = None
                    case Type.FLUSH:
                        wanted[disk.block.add(Type.FLUSH)] = None
                at += count
            disk.publish()
            disk.wait(len(wanted))
            for sent, data in wanted.items():
                assert disk.block.status(sent) == OK, (turn, sent)
                if data is not None:
                    assert disk.block.data(sent) == data, (turn, sent)
                    assert sent.written == len(data) + 1
                else:
                    assert sent.written == 1
        disk.block.cut = 1 << 20
        assert disk.run(Type.IN, length=len(model)) == (OK, bytes(model))
        assert not disk.failures
        assert not disk.guest.lost


@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_what_is_refused(daemon, node, features):
    with VirtioDisk(daemon, node, features=features, logical_block_size=4096) as disk:
        last = SIZE // 512
        assert disk.run(Type.IN, last - 8, length=4096)[0] == OK
        assert disk.run(Type.IN, last - 8, length=512)[0] == OK, "as QEMU: only the start is in blocks"
        for sector, length in [
            (last, 512),
            (last - 8, 4608),
            (1, 4096),
            (0, 100),
            ((1 << 64) - 8, 4096),
            (1 << 55, 4096),
        ]:
            assert disk.run(Type.IN, sector, length=length)[0] == IOERR, (sector, length)
            assert disk.run(Type.OUT, sector, bytes(length))[0] == IOERR, (sector, length)
        for kind in (2, 3, 10, 14, 0x7FFFFFFF):
            assert disk.run(kind, 0, length=512)[0] == UNSUPP
        assert disk.run(Type.IN | 1 << 31, 0, length=4096)[0] == OK, "the obsolete BARRIER bit"
        for kind in (Type.DISCARD, Type.WRITE_ZEROES):
            assert disk.run(kind, 0, segment(0, 8))[0] == OK
            assert disk.run(kind, 0, segment(0, 0))[0] == OK
            assert disk.run(kind, 0, segment(0, 8)[:15])[0] == IOERR
            assert disk.run(kind, 0, segment(0, 8) * 2)[0] == UNSUPP
            assert disk.run(kind, 0, segment(0, 8, 2))[0] == UNSUPP
            for sector, count in [(0, 32776), (1, 8), (0, 1), (last, 8), ((1 << 64) - 8, 8), (1 << 55, 8)]:
                assert disk.run(kind, 0, segment(sector, count))[0] == IOERR, (kind, sector, count)
        assert disk.run(Type.DISCARD, 0, segment(0, 8, 1))[0] == UNSUPP
        assert disk.run(Type.WRITE_ZEROES, 0, segment(0, 8, 1))[0] == OK
        assert not disk.failures


@pytest.mark.parametrize("serial", ["", "abc", "x" * 20, "y" * 40])
@pytest.mark.parametrize("length", [1, 20, 64])
def test_the_serial_is_cut_and_padded(daemon, node, serial, length):
    with VirtioDisk(daemon, node, serial=serial) as disk:
        status, data = disk.run(Type.GET_ID, length=length)
        assert status == OK
        assert data == serial.encode()[:20].ljust(20, b"\0")[:length].ljust(length, b"\0")


def test_read_only_devices_say_so_and_refuse_changes(daemon, node):
    with VirtioDisk(daemon, node, writable=False) as disk:
        assert disk.device.offered & Blk.RO
        assert disk.run(Type.OUT, 0, bytes(512))[0] == IOERR
        assert disk.run(Type.DISCARD, 0, segment(0, 8))[0] == IOERR
        assert disk.run(Type.WRITE_ZEROES, 0, segment(0, 8))[0] == IOERR
        assert disk.run(Type.FLUSH)[0] == OK
        assert disk.run(Type.IN, 0, length=512)[0] == OK


@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_how_a_request_is_cut_into_descriptors_means_nothing(daemon, node, features):
    """Section 2.7.4: header and status may share descriptors with the data, or lie in several."""
    with VirtioDisk(daemon, node, features=features) as disk:
        disk.run(Type.OUT, 0, bytes(range(256)) * 4)
        memory = disk.memory
        for cut_header in (16, 1, 7):
            for cut_data in (512, 5, 513):
                where = memory.allocate(1024)
                memory.write(where, struct.pack("<IIQ", Type.IN, 0, 1))
                buffers = [(where, cut_header, False)]
                if cut_header < 16:
                    buffers.append((where + cut_header, 16 - cut_header, False))
                buffers.append((where + 16, cut_data, True))
                if cut_data < 513:
                    buffers.append((where + 16 + cut_data, 513 - cut_data, True))
                head = disk.ring.add(buffers)
                disk.publish()
                while (used := disk.ring.take()) is None:
                    pass
                assert used == (head, 513)
                assert memory.read(where + 16, 513) == bytes(range(256)) * 2 + b"\0"


def test_an_indirect_table_is_chained_as_it_says(daemon, node):
    """Section 2.7.5.3: by the next field, which need not be the entry that follows."""
    with VirtioDisk(daemon, node) as disk:
        assert disk.run(Type.OUT, 0, b"\x55" * 512)[0] == OK
        memory = disk.memory
        header, data, status, table = (memory.allocate(512, 512) for _ in range(4))
        memory.write(header, struct.pack("<IIQ", Type.IN, 0, 0))
        for order in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            memory.write(data, bytes(512))
            memory.write(status, b"\xff")
            head = disk.ring.add([(header, 16, False), (data, 512, True), (status, 1, True)], table=table)
            entries = [(header, 16, NEXT), (data, 512, NEXT | WRITE), (status, 1, WRITE)]
            for at, (address, length, flags) in zip(order, entries, strict=True):
                after = dict(itertools.pairwise(order)).get(at, 0)
                disk.ring.put_descriptor(memory.at(table, 48), at, address, length, flags, after)
            disk.publish()
            while (used := disk.ring.take()) is None:
                pass
            if order[0]:  # the chain begins with the first entry of the table, which is its status
                assert used == (head, 1)
                assert memory.read(status, 1) == b"\1"
            else:
                assert used == (head, 513)
                assert memory.read(data, 512) == b"\x55" * 512
                assert memory.read(status, 1) == b"\0"


def test_an_indirect_table_that_leads_out_of_itself(daemon, node):
    with VirtioDisk(daemon, node) as disk:
        disk.block.indirect = True
        sent = disk.block.add(Type.IN, 0, length=512)
        table = disk.memory.allocate(0) - 48
        disk.ring.put_descriptor(disk.memory.at(table, 48), 1, sent.data, 512, NEXT | WRITE, 3)
        disk.publish()
        deadline = time.monotonic() + 5
        while not disk.failures and not disk.ring.take():
            assert time.monotonic() < deadline
        assert disk.failures == ["descriptor 3 of a table of 3"]


def test_a_request_without_header_or_status_fails_alone(daemon, node):
    with VirtioDisk(daemon, node) as disk:
        where = disk.memory.allocate(64)
        for buffers in (
            [(where, 16, False)],
            [(where, 15, False), (where + 20, 1, True)],
            [(where + 20, 1, True)],
        ):
            disk.memory.write(where + 20, b"\xff")
            disk.ring.add(buffers)
            disk.publish()
            while (used := disk.ring.take()) is None:
                pass
            assert used[1] == sum(length for _, length, write in buffers if write)
            if used[1]:
                assert disk.memory.read(where + 20, 1) == b"\1"
        assert disk.run(Type.IN, length=512)[0] == OK
        assert not disk.failures


def test_large_requests_are_done_piece_by_piece(daemon, tmp_path):
    size = 8 << 20
    nodes.add(daemon, "buffered", tmp_path, size, name="large")
    data = random.Random(1).randbytes(size - 4096)
    with VirtioDisk(daemon, "large", memory_size=32 << 20) as disk:
        disk.block.cut = 3 << 20
        assert disk.run(Type.OUT, 8, data)[0] == OK
        assert disk.run(Type.IN, 0, length=size) == (OK, bytes(4096) + data)
        assert (disk.queue.bytes_read, disk.queue.bytes_written) == (size, len(data))
    daemon.execute("blockdev-del", node_name="large")


def test_writes_are_durable_at_once_for_a_driver_that_cannot_flush(daemon, node, monkeypatch):
    with VirtioDisk(daemon, node) as disk:
        device = disk.device
        assert device.writeback
        assert device.config()[32] == 1
        device.accept(device.features & ~int(Blk.FLUSH))
        assert device.config()[32] == 0
        storage = daemon.daemon.graph.find(node).storage
        engine, flags = storage.engine, []

        def note(call):
            def write(fd, what, *rest):
                flags.append(rest[-2])
                call(fd, what, *rest)

            return write

        monkeypatch.setattr(engine, "write", note(engine.write))
        monkeypatch.setattr(engine, "writev", note(engine.writev))
        assert disk.run(Type.OUT, 0, bytes(4096))[0] == OK
        disk.block.cut = 1000
        assert disk.run(Type.OUT, 0, bytes(4096))[0] == OK
        assert flags == [os.RWF_DSYNC] * 2
        device.accept(device.features | int(Blk.FLUSH))
        assert device.writeback
        device.set_writeback(False)
        assert device.config()[32] == 0
        device.reset()
        assert device.writeback


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_file_that_ends_amid_a_sector(daemon, tmp_path, direct):
    path = tmp_path / "odd"
    path.write_bytes(b"\x55" * (SIZE + 100))
    daemon.execute("blockdev-add", driver="file", node_name="odd", filename=str(path), cache={"direct": direct})
    with VirtioDisk(daemon, "odd") as disk:
        last = SIZE // 512
        assert disk.device.size == SIZE + 512
        assert disk.run(Type.IN, last, length=512) == (OK, b"\x55" * 100 + bytes(412))
        assert disk.run(Type.IN, last - 7, length=4096) == (OK, b"\x55" * (3584 + 100) + bytes(412))
        assert disk.run(Type.OUT, last, b"\xaa" * 512)[0] == OK
        assert disk.run(Type.IN, last - 1, length=1024) == (OK, b"\x55" * 512 + b"\xaa" * 512)
    daemon.execute("blockdev-del", node_name="odd")


@pytest.mark.parametrize("node", ["buffered", "qcow2", "direct"], indirect=True)
def test_dirty_bitmaps_hear_of_every_write(daemon, node):
    with VirtioDisk(daemon, node) as disk:
        assert disk.run(Type.OUT, 0, bytes(SIZE // 2))[0] == OK, "so that what follows overwrites"
        daemon.execute("block-dirty-bitmap-add", node=node, name="b", granularity=4096)
        bitmap = daemon.daemon.graph.find(node).dirty_bitmaps["b"]
        wanted = set()
        for granule in (3, 3, 40, 200):
            assert disk.run(Type.OUT, 8 * granule, b"\x55" * 4096)[0] == OK
            wanted.add(granule)
            assert bitmap.dirty_bytes == 4096 * len(wanted)
        assert disk.run(Type.OUT, 8 * 50 + 7, b"\x55" * 1024)[0] == OK
        assert bitmap.dirty_bytes == 4096 * (len(wanted) + 2)
        assert disk.run(Type.WRITE_ZEROES, 0, segment(8 * 60, 8))[0] == OK
        assert bitmap.dirty_bytes == 4096 * (len(wanted) + 3)
        daemon.execute("block-dirty-bitmap-clear", node=node, name="b")
        assert disk.run(Type.OUT, 8 * 3, b"\x66" * 4096)[0] == OK
        assert bitmap.dirty_bytes == 4096


@pytest.mark.parametrize("features", [FEATURES, PACKED])
def test_another_servers_disk_costs_no_task_for_a_request(daemon, monkeypatch, features):
    monkeypatch.setattr(slow, "read", None)
    monkeypatch.setattr(slow, "write", None)
    data = random.Random(1).randbytes(20_000 // 512 * 512)
    with DaemonThread() as upstream:
        upstream.execute("blockdev-add", driver="memory", node_name="m", size=SIZE)
        path = upstream.export("m", writable=True)
        daemon.execute("blockdev-add", driver="nbd", node_name="n", server={"type": "unix", "path": path})
        try:
            with VirtioDisk(daemon, "n", features=features) as disk:
                disk.block.cut = 4096
                assert disk.run(Type.OUT, 3, data) == (OK, b"")
                assert disk.run(Type.IN, 3, length=len(data)) == (OK, data)
                monkeypatch.undo()  # waiting for a server that is gone does
                upstream.execute("block-export-del", id="e", mode="hard")
                assert disk.run(Type.OUT, 3, data)[0] == IOERR
                assert disk.run(Type.IN, 3, length=512)[0] == IOERR
        finally:
            daemon.execute("blockdev-del", node_name="n")
