"""A vhost-user-blk export and a front end that knows the protocol, and what becomes of those that do not."""

import gc
import os
import socket
import struct
from pathlib import Path

import pytest
from vhost_user_host import SIZE, eventually

from blkferry.errors import Error, ErrorKind
from blkferry.testing.vhost_user import FEATURES, PROTOCOL, USER_START, FrontEnd
from blkferry.testing.virtio import GUEST_START, DriverMemory
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import LOG_ALL, PROTOCOL_FEATURES, ProtocolFeature, Request, VringFlag
from blkferry.wire.vhost_user.messages import HEADER, build_reply
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import CONFIG_WRITEBACK, SEGMENT, Type
from blkferry.wire.virtio_blk import Feature as Blk

PACKED = FEATURES | int(Feature.RING_PACKED)
DATA = bytes(range(256)) * 16
INFLIGHT = PROTOCOL | ProtocolFeature.INFLIGHT_SHMFD


def remap(sector: int, sectors: int, flags: int = 0) -> bytes:
    return SEGMENT.pack(sector, sectors, flags)


# --- What works ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features", [FEATURES, FEATURES & ~int(Feature.EVENT_IDX), PACKED, PACKED & ~int(Feature.EVENT_IDX)]
)
def test_requests(host, features):
    with FrontEnd(host.export()) as front:
        front.negotiate(features)
        front.share()
        vring = front.make_vring()
        front.start(vring)
        assert vring.run(Type.OUT, 8, DATA) == (0, b"")
        assert vring.run(Type.IN, 8, length=4096) == (0, DATA)
        assert vring.run(Type.FLUSH) == (0, b"")
        assert vring.run(Type.WRITE_ZEROES, 0, remap(9, 1)) == (0, b"")
        assert vring.run(Type.IN, 8, length=4096) == (0, DATA[:512] + bytes(512) + DATA[1024:])
        assert vring.run(Type.DISCARD, 0, remap(8, 8)) == (0, b"")
        assert vring.run(Type.GET_ID, length=20) == (0, b"vhost_user_blk".ljust(20, b"\0"))
        assert vring.run(Type.IN, SIZE // 512, length=512)[0] == 1
        assert vring.run(14)[0] == 2
        (client,) = host.clients()
        assert client["requests"] == 9
        assert client["peer"] == f"pid {os.getpid()}"


def test_several_rings(host):
    with FrontEnd(host.export(num_queues=4)) as front:
        front.negotiate()
        front.share()
        assert front.ask(Request.GET_QUEUE_NUM, wire.U64).value == 4
        vrings = [front.make_vring(index) for index in range(4)]
        for vring in vrings:
            front.start(vring)
        for vring in vrings:
            assert vring.run(Type.OUT, vring.index, bytes([vring.index]) * 512) == (0, b"")
        for vring in vrings:
            assert vring.run(Type.IN, 3 - vring.index, length=512) == (0, bytes([3 - vring.index]) * 512)


def test_the_configuration(host):
    host.export(logical_block_size=4096, num_queues=3, serial="one of mine")
    with FrontEnd(host.path()) as front:
        front.negotiate()
        assert front.ask(Request.GET_MAX_MEM_SLOTS, wire.U64).value == 509
        config = front.ask(Request.GET_CONFIG, wire.Config, wire.Config(0, 0, bytes(60))).data
        capacity, size_max, seg_max = struct.unpack_from("<QII", config)
        assert (capacity, size_max, seg_max) == (SIZE // 512, 0, 126)
        assert struct.unpack_from("<IBBHIBxH", config, 20) == (4096, 0, 0, 1, 1, 1, 3)
        part = front.ask(Request.GET_CONFIG, wire.Config, wire.Config(32, 0, bytes(1)))
        assert part == wire.Config(32, 0, b"\1")
        front.send(Request.GET_CONFIG, wire.Config(0, 0, bytes(97)))
        assert front.sock.recv(100) == build_reply(Request.GET_CONFIG)
        front.share()
        vring = front.make_vring()
        front.start(vring)
        assert vring.run(Type.GET_ID, length=20)[1] == b"one of mine".ljust(20, b"\0")


def test_the_write_cache_tells_the_truth(host):
    """QEMU's back end says that there is none, so guests do not flush."""

    def writeback(front: FrontEnd) -> int:
        return front.ask(Request.GET_CONFIG, wire.Config, wire.Config(CONFIG_WRITEBACK, 0, bytes(1))).data[0]

    host.export("through", writethrough=True)
    with FrontEnd(host.path("through")) as front:
        front.negotiate()
        assert writeback(front) == 0
    with FrontEnd(host.export("back")) as front:
        front.negotiate()
        assert writeback(front) == 1
        front.tell(Request.SET_CONFIG, wire.Config(CONFIG_WRITEBACK, 0, b"\0"))
        assert writeback(front) == 0
        front.tell(Request.SET_CONFIG, wire.Config(CONFIG_WRITEBACK, 0, b"\1"))
        assert writeback(front) == 1
    with FrontEnd(host.path("back")) as front:  # a driver that cannot flush must not have to
        front.negotiate(FEATURES & ~int(Blk.FLUSH))
        assert writeback(front) == 0


def test_the_offered_features(host):
    host.export("ro", writable=False)
    for path, read_only in ((host.export(), 0), (host.path("ro"), 1)):
        with FrontEnd(path) as front:
            features = front.ask(Request.GET_FEATURES, wire.U64).value
            theirs = 0x175007E46 | read_only << 5  # those of qemu-storage-daemon 10.0
            assert features & theirs == theirs
            assert features & ~theirs == Feature.RING_PACKED
            protocol = front.ask(Request.GET_PROTOCOL_FEATURES, wire.U64).value
            assert protocol == 0x8F2B & ~(1 << 8 | 1 << 11) | 1 << 12 | 1 << 13 | 1 << 16


def test_a_read_only_disk(host):
    with FrontEnd(host.export(writable=False)) as front:
        vring = front.run()
        assert vring.run(Type.OUT, 0, DATA)[0] == 1
        assert vring.run(Type.DISCARD, 0, remap(0, 8))[0] == 1
        assert vring.run(Type.IN, 0, length=512) == (0, bytes(512))
        assert vring.run(Type.FLUSH) == (0, b"")


@pytest.mark.parametrize("features", [FEATURES, PACKED])
def test_a_ring_is_stopped_and_goes_on(host, features):
    with FrontEnd(host.export()) as front:
        front.negotiate(features)
        front.share()
        vring = front.make_vring(size=8)
        front.start(vring)
        for sector in range(13):
            assert vring.run(Type.OUT, sector, bytes([sector]) * 512)[0] == 0
        base = front.stop(vring)
        sent = vring.block.add(Type.IN, 12, length=512)
        vring.publish()
        assert not vring.block.collect()
        front.start(vring, base=base)
        vring.wait()
        assert vring.block.data(sent) == bytes([12]) * 512
        front.tell(Request.SET_VRING_ENABLE, wire.VringState(0, 0))
        sent = vring.block.add(Type.IN, 11, length=512)
        vring.publish()
        assert not vring.block.collect()
        front.tell(Request.SET_VRING_ENABLE, wire.VringState(0, 1))
        vring.wait()
        assert vring.block.data(sent) == bytes([11]) * 512


def test_memory_comes_and_goes(host):
    """As Cloud Hypervisor and libblkio do: regions are added one by one."""
    with FrontEnd(host.export(), memory=DriverMemory(1 << 20)) as front:
        front.negotiate()
        front.tell(Request.ADD_MEM_REG, wire.SingleRegion(front.region()), [front.memory.fd])
        vring = front.make_vring()
        front.start(vring)
        assert vring.run(Type.OUT, 0, DATA) == (0, b"")
        more = DriverMemory(1 << 20, start=GUEST_START + (1 << 30))
        region = wire.MemoryRegion(more.start + 4096, more.size - 4096, USER_START + (1 << 30), 4096)
        front.tell(Request.ADD_MEM_REG, wire.SingleRegion(region), [more.fd])
        buffers = [(front.memory.allocate(16), 16, False), (more.start + 4096, 4096, True)]
        front.memory.write(buffers[0][0], struct.pack("<IIQ", Type.IN, 0, 0))
        status = front.memory.allocate(1)
        vring.ring.add([*buffers, (status, 1, True)])
        vring.publish()
        eventually(lambda: vring.ring.take() is not None)
        assert more.read(more.start + 4096, 4096) == DATA
        front.tell(Request.REM_MEM_REG, wire.SingleRegion(region), [more.fd])
        assert vring.run(Type.IN, 0, length=4096) == (0, DATA)
        front.tell(Request.ADD_MEM_REG, wire.SingleRegion(region), [more.fd])
        front.tell(Request.SET_MEM_TABLE, wire.MemoryTable((front.region(),)), [front.memory.fd])
        assert vring.run(Type.IN, 0, length=4096) == (0, DATA)


def test_the_device_is_reset(host):
    with FrontEnd(host.export()) as front:
        vring = front.run()
        again = front.make_vring()
        vring.block.floor = front.memory.allocate(0)
        assert vring.run(Type.OUT, 0, DATA)[0] == 0
        front.tell(Request.SET_STATUS, wire.U64(15))
        assert front.ask(Request.GET_STATUS, wire.U64).value == 15
        front.tell(Request.RESET_DEVICE)
        assert front.ask(Request.GET_STATUS, wire.U64).value == 0
        vring.block.add(Type.IN, 0, length=512)
        vring.publish()
        front.tell(Request.SET_FEATURES, wire.U64(FEATURES | PROTOCOL_FEATURES))
        assert not vring.block.collect()
        front.start(again)
        assert again.run(Type.IN, 0, length=4096) == (0, DATA)


# --- One front end after the other -----------------------------------------------------------------------------


def test_the_next_front_end_waits_for_the_first_to_go(host):
    path = host.export()
    with FrontEnd(path) as first, FrontEnd(path) as second:
        first.run()
        second.send(Request.GET_FEATURES)
        second.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.receive(Request.GET_FEATURES, wire.U64)
        first.close()
        second.sock.settimeout(10)
        second.receive(Request.GET_FEATURES, wire.U64)
        assert second.run().run(Type.IN, 0, length=512) == (0, bytes(512))


def test_an_export_in_use_is_removed_by_force_only(host):
    with FrontEnd(host.export()) as front:
        vring = front.run()
        with pytest.raises(Error, match="export 'e' still in use") as refusal:
            host.daemon.execute("block-export-del", id="e")
        assert refusal.value.kind is ErrorKind.BUSY
        assert "mode='hard'" in refusal.value.hint
        assert vring.run(Type.IN, 0, length=512) == (0, bytes(512))
        host.daemon.execute("block-export-del", id="e", mode="hard")
        assert front.hung_up()
    eventually(lambda: ("BLOCK_EXPORT_DELETED", {"id": "e"}) in host.daemon.events)
    assert not host.path().exists()
    host.export()
    host.daemon.execute("block-export-del", id="e")
    assert not host.path().exists()


def test_the_front_end_stays_while_the_node_moves(host):
    host.daemon.execute("object-add", qom_type="iothread", id="io")
    with FrontEnd(host.export()) as front:
        vring = front.run()
        assert vring.run(Type.OUT, 0, DATA)[0] == 0
        host.export("other", iothread="io")
        assert vring.run(Type.IN, 0, length=4096) == (0, DATA)
        assert front.ask(Request.GET_QUEUE_NUM, wire.U64).value == 1
    with FrontEnd(host.path("other")) as front:
        assert front.run().run(Type.IN, 0, length=4096) == (0, DATA)


def test_nothing_of_the_guest_is_kept(host):
    """Not even until the garbage collector comes: its memory may be most of the machine's."""

    def mappings() -> int:
        return sum("memfd:driver" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    gc.disable()
    try:
        memory = DriverMemory(1 << 20)
        before = mappings()
        with FrontEnd(host.export(), memory=memory) as front:
            assert front.run().run(Type.IN, 0, length=512) == (0, bytes(512))
            assert mappings() == before + 1
        eventually(lambda: mappings() == before)
        memory.close()
    finally:
        gc.enable()


# --- Resizing --------------------------------------------------------------------------------------------------


def test_the_front_end_is_told_of_another_size(host, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE))
    host.daemon.execute("blockdev-add", driver="file", node_name="file", filename=str(image))
    path = host.export(node="file")
    host.daemon.execute("block_resize", node_name="file", size=SIZE * 2)  # nobody there: qemu-storage-daemon crashes
    with FrontEnd(path) as front:
        front.negotiate(protocol=PROTOCOL | ProtocolFeature.BACKEND_REQ)
        config = wire.Config(0, 0, bytes(8))
        assert front.ask(Request.GET_CONFIG, wire.Config, config).data == (SIZE * 2 // 512).to_bytes(8, "little")
        host.daemon.execute("block_resize", node_name="file", size=SIZE * 3)  # nor has it told us where it listens
        ours, theirs = socket.socketpair()
        with ours, theirs:
            front.tell(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
            front.share()
            vring = front.make_vring()
            front.start(vring)
            assert vring.run(Type.IN, SIZE * 4 // 512 - 1, length=512)[0] == 1
            host.daemon.execute("block_resize", node_name="file", size=SIZE * 4)
            ours.settimeout(10)
            assert ours.recv(100) == HEADER.pack(2, 1, 0)
            assert front.ask(Request.GET_CONFIG, wire.Config, config).data == (SIZE * 4 // 512).to_bytes(8, "little")
            assert vring.run(Type.IN, SIZE * 4 // 512 - 1, length=512) == (0, bytes(512))
        host.daemon.execute("block_resize", node_name="file", size=SIZE)  # it does not listen any more
        assert vring.run(Type.IN, SIZE // 512, length=512)[0] == 1


# --- The dirty log ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [FEATURES, PACKED])
def test_what_is_written_to_memory_is_logged(host, features):
    log = os.memfd_create("log")
    size = (GUEST_START + (16 << 20)) // 4096 // 8
    os.ftruncate(log, size + 4096)

    def dirty() -> set[int]:
        """Bytes of the log, each for 32 KiB of memory, that say so."""
        return {index for index, byte in enumerate(os.pread(log, size, 4096)) if byte}

    with FrontEnd(host.export()) as front:
        front.negotiate(features, PROTOCOL | ProtocolFeature.LOG_SHMFD)
        front.share()
        vring = front.make_vring()
        front.start(vring)
        front.memory.allocate(1 << 20)
        vring.block.floor = front.memory.allocate(0)
        assert vring.run(Type.IN, 0, length=512)[0] == 0
        front.send(Request.SET_LOG_BASE, wire.Log(size, 4096), [log])
        assert front.receive(Request.SET_LOG_BASE, wire.U64)[0].value == 0
        assert vring.run(Type.IN, 0, length=512)[0] == 0
        assert not dirty()
        front.tell(Request.SET_FEATURES, wire.U64(features | PROTOCOL_FEATURES | LOG_ALL))
        base = front.stop(vring)
        front.start(vring, base=base, flags=VringFlag.LOG)
        sent = vring.block.add(Type.IN, 0, length=100 << 10)
        vring.publish()
        vring.wait()
        span = 8 * 4096
        pages = {(sent.data + offset) // span for offset in range(0, 100 << 10, 4096)} | {sent.status // span}
        ring = vring.ring
        used = ring.descriptor_address if features & Feature.RING_PACKED else ring.device_address
        assert dirty() == pages | {used // span, ring.device_address // span}
    os.close(log)
