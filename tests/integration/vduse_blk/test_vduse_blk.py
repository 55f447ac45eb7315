"""VDUSE devices without a kernel: the whole export, with a stand-in for what is behind its ioctls."""

from __future__ import annotations

import struct
import time

import pytest
from click.testing import CliRunner
from fake_vduse import DRIVER_OK, FakeKernel

from blkferry.cli.app import app
from blkferry.errors import Error
from blkferry.exports.vduse_blk import bus, control, export, runtime
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.virtio import DriverMemory
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio_blk import Status, Type

SIZE = 1 << 20
ENTRIES = 64
ADD = {"type": "vduse-blk", "id": "e", "node_name": "m", "name": "disk0", "writable": True, "queue_size": ENTRIES}
DATA = bytes(range(256)) * 16


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """The kernel that a device is made in, or found in."""
    made = FakeKernel()
    monkeypatch.setattr(control, "create", lambda config: (made.fd, made.found))
    monkeypatch.setattr(control, "destroy", lambda name: not made.attached)
    monkeypatch.setattr(export, "KernelDevice", lambda fd: made)
    monkeypatch.setattr(bus, "is_attached", lambda name: made.attached)
    monkeypatch.setattr(bus, "endpoint", lambda name: "/dev/vdx" if made.attached else None)
    monkeypatch.setattr(bus, "detach", lambda name: detach(made))
    monkeypatch.setattr(runtime, "directory", lambda: str(tmp_path))
    made.log = tmp_path / "vduse-disk0.log"
    return made


def detach(kernel):
    kernel.reset()
    kernel.attached = False


@pytest.fixture
def daemon():
    with DaemonThread() as running:
        running.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        running.execute("blockdev-add", driver="null-co", node_name="slow", size=SIZE, latency_ns=200_000_000)
        yield running


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def make_qcow2(path):
    created = CliRunner().invoke(app, ["image", "create", "-f", "qcow2", str(path), str(SIZE)])
    assert created.exit_code == 0
    return path


def in_flight(kernel):
    """How many requests the log has: those that are marked, and those that began together."""
    log = kernel.log.read_bytes()
    return sum(log[80 : 80 + 16 * ENTRIES : 16]) + int.from_bytes(log[72:74], "little")


def test_from_the_first_request_to_a_reset_and_again(kernel, daemon):
    daemon.execute("block-export-add", **ADD)
    for _ in range(2):
        kernel.arrive()
        assert kernel.run(Type.OUT, 8, DATA) == (0, b"")
        assert kernel.run(Type.IN, 8, length=4096) == (0, DATA)
        assert kernel.run(Type.FLUSH) == (0, b"")
        assert kernel.ask(0, struct.pack("<I", 0))[:6] == struct.pack("<IH", 0, 3)
        assert not in_flight(kernel)
        assert kernel.log.read_bytes()[74:76] == struct.pack("<H", 3)
        kernel.reset()
        assert not any(kernel.log.read_bytes()[68:])
        kernel.have_driver(DriverMemory(4 << 20))
    assert len(kernel.mapped) == 2
    (info,) = daemon.execute("query-block-exports")
    assert info["clients"] == [{"peer": "/dev/vdx", "requests": 3, "received": 4096, "sent": 4096}]
    daemon.execute("block-export-del", id="e", mode="hard")
    eventually(lambda: not kernel.log.exists())


def test_requests_that_were_there_before_the_driver_was_ready(kernel, daemon):
    """The kernel takes no interrupts until it has seen the answer, so the first one is tried again."""
    daemon.execute("block-export-add", **ADD)
    for _ in range(3):
        kernel.block.add(Type.IN, length=512)
    kernel.publish()
    kernel.ready = True
    kernel.ask(1, bytes([DRIVER_OK]))
    time.sleep(0.05)
    kernel.driver_ok = True
    assert len(kernel.wait(3)) == 3


@pytest.mark.parametrize("features", [0, int(Feature.VERSION_1 | Feature.SR_IOV)])
def test_features_that_will_not_do(kernel, daemon, features, caplog):
    daemon.execute("block-export-add", **ADD)
    kernel.set_status(3)
    kernel.features_accepted = features
    kernel.ask(1, bytes([11]), result=1)
    assert "the driver" in caplog.text


def test_new_memory_is_found_while_requests_are_under_way(kernel, daemon):
    daemon.execute("block-export-add", **ADD | {"node_name": "slow"})
    kernel.arrive()
    kernel.block.add(Type.IN, length=512)
    kernel.publish()
    eventually(lambda: in_flight(kernel) == 1)
    kernel.ask(2, struct.pack("<QQ", 0, (1 << 64) - 1))
    assert len(kernel.wait()) == 1
    assert len(kernel.mapped) == 2
    assert kernel.run(Type.IN, length=512) == (0, bytes(512))


def test_what_was_in_flight_in_a_crash_is_done_by_the_next_daemon(kernel, daemon):
    daemon.execute("block-export-add", **ADD | {"node_name": "slow"})
    kernel.arrive()
    for sector in range(5):
        kernel.block.add(Type.OUT, sector, bytes([sector + 1]) * 512)
    kernel.publish()
    eventually(lambda: in_flight(kernel) == 5)
    log, memory = kernel.log.read_bytes(), bytes(kernel.memory.view)
    kernel.wait(5)
    daemon.execute("block-export-del", id="e", mode="hard")
    eventually(lambda: not kernel.log.exists())

    survivor = DriverMemory(4 << 20)
    kernel.have_driver(survivor)
    heads = [kernel.block.add(Type.OUT, sector, bytes([sector + 1]) * 512) for sector in range(5)]
    kernel.ring.publish()
    survivor.view[:] = memory
    kernel.log.write_bytes(log)
    kernel.found = kernel.attached = kernel.ready = kernel.driver_ok = True
    kernel.open()
    daemon.execute("block-export-add", **ADD)
    assert {sent.head for sent in kernel.wait(5)} == {sent.head for sent in heads}
    expected = b"".join(bytes([sector + 1]) * 512 for sector in range(5))
    assert kernel.run(Type.IN, length=5 * 512) == (0, expected)
    assert not in_flight(kernel)


def test_what_a_crash_takes_from_a_qcow2_image_is_told_by_the_next_flush(kernel, daemon, tmp_path, caplog):
    image = tmp_path / "disk.qcow2"
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(make_qcow2(image)))
    daemon.execute("blockdev-add", driver="qcow2", node_name="q", file="f")
    daemon.execute("block-export-add", **ADD | {"node_name": "q"})
    kernel.arrive()
    assert kernel.run(Type.FLUSH) == (0, b"")
    assert kernel.log.read_bytes()[0] == 0
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")
    assert kernel.log.read_bytes()[0] == 1
    log = kernel.log.read_bytes()
    assert kernel.run(Type.FLUSH) == (0, b"")
    assert kernel.log.read_bytes()[0] == 0
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")
    assert kernel.log.read_bytes()[0] == 0  # it is in place
    daemon.execute("block-export-del", id="e", mode="hard")
    eventually(lambda: not kernel.log.exists())

    kernel.log.write_bytes(log)
    kernel.have_driver(DriverMemory(4 << 20))
    kernel.found = kernel.attached = kernel.ready = kernel.driver_ok = True
    kernel.open()
    daemon.execute("block-export-add", **ADD | {"node_name": "q"})
    assert "writes since the last flush are lost" in caplog.text
    assert kernel.run(Type.IN, 0, length=4096) == (0, DATA)
    assert kernel.log.read_bytes()[0] == 1
    assert kernel.run(Type.FLUSH)[0] == Status.IOERR
    assert kernel.log.read_bytes()[0] == 0
    assert kernel.run(Type.FLUSH) == (0, b"")


def test_a_device_that_was_made_with_other_options(kernel, daemon):
    kernel.found = kernel.ready = kernel.driver_ok = True
    for other in ({"num_queues": 2}, {"queue_size": 32}, {"writable": False}):
        kernel.open()
        with pytest.raises(Error, match="'disk0' was made with other options"):
            daemon.execute("block-export-add", **ADD | other)
    kernel.open()
    kernel.log.write_bytes(bytes(100))
    with pytest.raises(Error, match="is one of other options"):
        daemon.execute("block-export-add", **ADD)
    assert kernel.log.read_bytes() == bytes(100)


def test_a_ring_that_makes_no_sense_is_not_taken_over(kernel, daemon):
    kernel.found = kernel.ready = kernel.driver_ok = True
    kernel.ring.driver_address += 1
    with pytest.raises(Error, match="virtqueue 0: the driver area is not aligned"):
        daemon.execute("block-export-add", **ADD)
    assert kernel.kick_fd < 0
    kernel.ring.driver_address -= 1
    kernel.open()
    daemon.execute("block-export-add", **ADD)
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")


def test_a_ring_that_goes_wrong_is_told_of_and_served_again_after_a_reset(kernel, daemon, caplog):
    daemon.execute("block-export-add", **ADD)
    kernel.arrive()
    kernel.ring.make_available(4711)
    kernel.publish()
    eventually(lambda: "virtqueue 0: descriptor 4711 of a table of 64" in caplog.text)
    kernel.reset()
    kernel.have_driver(DriverMemory(4 << 20))
    kernel.arrive()
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")


def test_another_size_is_announced(kernel, daemon, tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    daemon.execute("block-export-add", **ADD | {"node_name": "f"})
    daemon.execute("block_resize", node_name="f", size=2 * SIZE)
    assert (len(kernel.configs), kernel.config_interrupts) == (1, 0)
    kernel.arrive()
    daemon.execute("block_resize", node_name="f", size=3 * SIZE)
    assert [struct.unpack_from("<Q", config) for config in kernel.configs] == [(4096,), (6144,)]
    assert kernel.config_interrupts == 1
    assert kernel.run(Type.IN, 6143, length=512) == (0, bytes(512))


def test_a_device_moves_with_its_node(kernel, daemon):
    for name in ("io0", "io1"):
        daemon.execute("object-add", qom_type="iothread", id=name)
    daemon.execute("block-export-add", **ADD | {"iothread": "io0"})
    kernel.arrive()
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")
    daemon.export("m", export_id="n", iothread="io1")
    assert kernel.run(Type.IN, 0, length=4096) == (0, DATA)
    kernel.reset()


def test_a_safe_removal_is_refused_and_a_hard_one_takes_it_off_the_bus(kernel, daemon):
    daemon.execute("block-export-add", **ADD)
    kernel.arrive()
    with pytest.raises(Error, match="export 'e' still in use") as caught:
        daemon.execute("block-export-del", id="e")
    assert "vdpa dev del disk0" in caught.value.hint
    daemon.execute("block-export-del", id="e", mode="hard")
    eventually(lambda: daemon.events == [("BLOCK_EXPORT_DELETED", {"id": "e"})])
    assert not kernel.attached


def test_what_cannot_be_taken_off_the_bus_answers_with_errors_until_it_is(kernel, daemon, monkeypatch, caplog):
    def refuse(name):
        raise Error(export.ErrorKind.DENIED, "Not today", hint="Try tomorrow.")

    monkeypatch.setattr(bus, "detach", refuse)
    daemon.execute("block-export-add", **ADD | {"node_name": "slow"})
    kernel.arrive()
    sent = [kernel.block.add(Type.IN, length=512) for _ in range(3)]
    kernel.publish()
    eventually(lambda: in_flight(kernel) == 3)
    daemon.execute("block-export-del", id="e", mode="hard")
    kernel.wait(3)
    assert {kernel.block.status(each) for each in sent} == {Status.OK}
    eventually(lambda: "all requests to 'disk0' fail" in caplog.text)
    assert [kernel.run(Type.IN, length=512)[0] for _ in range(3)] == [Status.IOERR] * 3
    assert not in_flight(kernel)
    daemon.execute("blockdev-del", node_name="slow")
    (info,) = daemon.execute("query-block-exports")
    assert info["shutting-down"]
    kernel.reset()
    kernel.attached = False
    eventually(lambda: daemon.execute("query-block-exports") == [])
    assert not kernel.log.exists()


@pytest.mark.parametrize("removed", [False, True], ids=["served", "being removed"])
def test_a_daemon_that_ends_leaves_the_device_to_another_one(kernel, daemon, removed, monkeypatch, caplog):
    daemon.execute("block-export-add", **ADD)
    kernel.arrive()
    if removed:
        monkeypatch.setattr(bus, "detach", lambda name: None)
        daemon.execute("block-export-del", id="e", mode="hard")
        eventually(lambda: "all requests to 'disk0' fail" in caplog.text)
    daemon.stop()
    assert "'disk0' stays on the vDPA bus" in caplog.text
    assert kernel.log.exists()
    assert kernel.attached


def test_the_kernel_gives_a_device_up(kernel, daemon, caplog):
    daemon.execute("block-export-add", **ADD)
    kernel.arrive()
    kernel.give_up()
    eventually(lambda: "the kernel has given it up" in caplog.text)
    kernel.attached = False
    daemon.execute("block-export-del", id="e")


def test_a_block_device_from_python(kernel, daemon, monkeypatch):
    kernel.attached = False

    def attach(name):
        kernel.attached = True
        kernel.arrive()

    monkeypatch.setattr(bus, "attach", attach)

    async def make():
        disk = await daemon.daemon.attach("m", writable=True)
        return disk, await daemon.daemon.block_device(disk, "disk0", queue_size=64)

    disk, device = daemon.call(make)
    assert (device.path, device.taken_over) == ("/dev/vdx", False)
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")
    with pytest.raises(Error, match="still in use"):
        daemon.call(device.remove)
    daemon.call(lambda: device.remove(force=True))
    assert not kernel.attached
    assert daemon.call(lambda: disk.read(0, 4096)) == DATA


def test_a_block_device_goes_with_its_daemon(kernel, daemon, monkeypatch, caplog):
    monkeypatch.setattr(bus, "attach", lambda name: pytest.fail("it is there already"))

    async def make():
        disk = await daemon.daemon.attach("m", writable=True)
        return await daemon.daemon.block_device(disk, "disk0", queue_size=64)

    kernel.found = kernel.ready = kernel.driver_ok = True
    assert daemon.call(make).taken_over
    assert kernel.run(Type.OUT, 0, DATA) == (0, b"")
    daemon.stop()
    assert not kernel.attached
    assert not kernel.log.exists()
    assert not caplog.records


def test_a_block_device_that_cannot_be_attached_is_not_left(kernel, daemon, monkeypatch):
    kernel.attached = False

    def refuse(name):
        raise Error(export.ErrorKind.DENIED, "Not today")

    monkeypatch.setattr(bus, "attach", refuse)

    async def make():
        disk = await daemon.daemon.attach("m")
        await daemon.daemon.block_device(disk, "disk0", queue_size=64)

    with pytest.raises(Error, match="Not today"):
        daemon.call(make)
    assert daemon.execute("query-block-exports") == []
