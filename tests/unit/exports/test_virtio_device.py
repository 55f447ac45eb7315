"""What a virtio block device offers, and what it makes of what its driver wants."""

import pytest

from blkferry.errors import Error, ErrorKind
from blkferry.exports.virtio_blk.device import Device
from blkferry.exports.virtio_blk.queue import STATUS_OF_KIND
from blkferry.graph.root import Root
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import Feature as Blk
from blkferry.wire.virtio_blk import Status

QEMU = 0x175007E46
"""What qemu-storage-daemon 10.0 offers over vhost-user for a writable node."""

VHOST_USER = int(Blk.SIZE_MAX | Blk.CONFIG_WCE | Blk.MQ) | 1 << 26 | 1 << 30


@pytest.fixture(scope="module")
def root():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="null-co", node_name="n", size=(1 << 20) + 100)
        yield Root(daemon.daemon.graph.find("n"), "the test's disk")


def device(root, **options):
    return Device(root, name="d", **{"writable": True} | options)


def test_features_are_qemus_and_packed_rings(root):
    assert device(root, also=VHOST_USER).offered == QEMU | int(Feature.RING_PACKED)
    assert device(root, writable=False, also=VHOST_USER).offered == QEMU | int(Feature.RING_PACKED | Blk.RO)


@pytest.mark.parametrize("size", [0, 1, 256, 513, 4 << 20, -512])
def test_block_sizes_that_cannot_be(root, size):
    with pytest.raises(Error, match="logical-block-size must be a power of 2 between 512 and 2097152") as raised:
        device(root, logical_block_size=size)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
    assert raised.value.hint


@pytest.mark.parametrize("size", [512, 4096, 2 << 20])
def test_block_sizes_that_can(root, size):
    config = device(root, logical_block_size=size).config()
    assert int.from_bytes(config[20:24], "little") == size
    assert int.from_bytes(config[44:48], "little") == size // 512


def test_numbers_of_queues(root):
    with pytest.raises(Error, match="num-queues must be greater than 0"):
        device(root, queues=0)
    with pytest.raises(Error, match="num-queues must be at most 256"):
        device(root, queues=257)
    assert device(root, queues=256).config()[34:36] == b"\0\1"


def test_capacity_is_in_whole_sectors(root):
    assert int.from_bytes(device(root).config()[:8], "little") == 2049


def test_a_driver_may_only_accept_what_is_offered(root):
    made = device(root)
    with pytest.raises(Error, match="not offered: 0x800"):
        made.accept(int(Feature.VERSION_1 | Blk.CONFIG_WCE))
    with pytest.raises(Error, match="older than virtio"):
        made.accept(int(Blk.FLUSH))
    made.accept(int(Feature.VERSION_1 | Blk.FLUSH))
    assert made.features == int(Feature.VERSION_1 | Blk.FLUSH)


def test_the_cache_is_what_driver_and_export_say(root):
    made = device(root)
    assert made.config()[32] == 1
    made.accept(int(Feature.VERSION_1))
    assert made.config()[32] == 0, "nobody would flush"
    made.reset()
    assert made.config()[32] == 1
    root.writethrough = True
    try:
        made = device(root)
        made.accept(int(Feature.VERSION_1 | Blk.FLUSH))
        assert made.config()[32] == 0
        made.set_writeback(True)
        assert made.config()[32] == 1
        made.reset()
        assert made.config()[32] == 0
    finally:
        root.writethrough = False


def test_every_kind_of_error_has_a_status():
    assert set(STATUS_OF_KIND) == set(ErrorKind)
    assert set(STATUS_OF_KIND.values()) <= {Status.IOERR, Status.UNSUPP}
