"""Numbers and structures, against what strace has seen qemu-storage-daemon 10.0 send on x86-64."""

from __future__ import annotations

import struct

from blkferry.wire.vduse import ioctls
from blkferry.wire.vduse.ioctls import Access, DeviceConfig, Ioctl, IotlbEntry, QueueInfo

SEEN = {
    Ioctl.SET_API_VERSION: 0x40088101,
    Ioctl.CREATE_DEV: 0x41508102,
    Ioctl.DESTROY_DEV: 0x41008103,
    Ioctl.IOTLB_GET_FD: 0xC0208110,
    Ioctl.DEV_GET_FEATURES: 0x80088111,
    Ioctl.VQ_SETUP: 0x40208114,
    Ioctl.VQ_GET_INFO: 0xC0308115,
    Ioctl.VQ_SETUP_KICKFD: 0x40088116,
    Ioctl.VQ_INJECT_IRQ: 0x40048117,
}


def test_numbers():
    assert {request: int(request) for request in SEEN} == SEEN


def test_what_is_passed_is_as_long_as_its_number_says():
    built = {
        Ioctl.SET_API_VERSION: ioctls.build_version(0),
        Ioctl.DESTROY_DEV: ioctls.build_name("disk0"),
        Ioctl.IOTLB_GET_FD: IotlbEntry.ask(0),
        Ioctl.VQ_SETUP: ioctls.build_queue_config(0, 256),
        Ioctl.VQ_GET_INFO: QueueInfo.ask(0),
        Ioctl.VQ_SETUP_KICKFD: ioctls.build_queue_eventfd(0, 3),
        Ioctl.VQ_INJECT_IRQ: ioctls.build_index(1),
    }
    assert {request: len(data) for request, data in built.items()} == {
        request: request >> 16 & 0x3FFF for request in built
    }


def test_a_device_is_described_with_its_configuration_behind():
    config = bytes(range(96))
    built = DeviceConfig("disk0", vendor_id=7, device_id=2, features=1 << 33, queues=3, config=config).build()
    assert len(built) == 336 + 96
    assert built[:256] == b"disk0".ljust(256, b"\0")
    assert struct.unpack_from("=IIQII", built, 256) == (7, 2, 1 << 33, 3, 4096)
    assert built[280:332] == bytes(52)
    assert built[332:336] == struct.pack("=I", 96)
    assert built[336:] == config


def test_a_region_of_memory():
    answer = struct.pack("=QQQB7x", 0x1000, 0x4000000, 0x4002FFF, 3)
    assert IotlbEntry.parse(answer) == IotlbEntry(0x1000, 0x4000000, 0x4002FFF, Access.READ | Access.WRITE)
    assert struct.unpack("=QQQB7x", IotlbEntry.ask(0x4000010)) == (0, 0x4000010, 0x4000010, 0)


def test_a_virtqueue():
    answer = struct.pack("=IIQQQHHHHB7x", 1, 256, 0x4000000, 0x4001000, 0x4002000, 5, 0, 0, 0, 1)
    assert QueueInfo.parse(answer) == QueueInfo(1, 256, 0x4000000, 0x4001000, 0x4002000, 5, ready=True)
    assert not QueueInfo.parse(QueueInfo.ask(1)).ready


def test_small_ones():
    assert ioctls.build_queue_config(1, 256) == struct.pack("=IH", 1, 256) + bytes(26)
    assert ioctls.build_queue_eventfd(1, ioctls.NO_EVENTFD) == struct.pack("=Ii", 1, -1)
    assert ioctls.build_config_data(8, b"abc") == struct.pack("=II", 8, 3) + b"abc"
    assert ioctls.parse_features(struct.pack("=Q", 1 << 32)) == 1 << 32
