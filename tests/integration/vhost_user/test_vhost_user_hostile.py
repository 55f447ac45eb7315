"""Front ends that break the protocol lose their connection, guests that break rings lose these. Nobody else does."""

import fcntl
import os
import socket

import pytest

from blkferry.errors import Error
from blkferry.testing.vhost_user import FEATURES, PROTOCOL, USER_START, FrontEnd
from blkferry.testing.virtio import GUEST_START, DriverMemory
from blkferry.wire.vhost_user import payloads as wire
from blkferry.wire.vhost_user.constants import LOG_ALL, PROTOCOL_FEATURES, ProtocolFeature, Request
from blkferry.wire.vhost_user.messages import build
from blkferry.wire.vhost_user.payloads import MemoryRegion, VringState
from blkferry.wire.virtio_blk import Type


def served(path) -> None:
    """An honest front end is served."""
    with FrontEnd(path) as front:
        assert front.run().run(Type.IN, 0, length=512) == (0, bytes(512))


def region(**changes: int) -> wire.SingleRegion:
    whole = MemoryRegion(GUEST_START, 1 << 20, USER_START, 0)
    return wire.SingleRegion(whole._replace(**changes))


PAGE = 4096
RUNNING = [
    (Request.SET_VRING_NUM, VringState(0, 8), "another size while it runs"),
    (Request.SET_VRING_BASE, VringState(0, 8), "another base while it runs"),
    (Request.SET_FEATURES, wire.U64((FEATURES | PROTOCOL_FEATURES) & ~(1 << 29)), "change while rings run"),
    (Request.SET_VRING_ADDR, wire.VringAddr(0, 0, 0, 0, 0, 0), "are not in one memory region"),
    (Request.SET_VRING_ADDR, wire.VringAddr(0, 0, USER_START, USER_START, USER_START + 1, 0), "not aligned"),
]
ALWAYS = [
    (Request.SET_FEATURES, wire.U64(1 << 63 | 1 << 32), "features that are not offered"),
    (Request.SET_FEATURES, wire.U64(1 << 9), "older than virtio 1.0"),
    (Request.SET_PROTOCOL_FEATURES, wire.U64(1 << 8), "not offered: 0x100"),
    (Request.SET_VRING_NUM, VringState(1, 8), "there is no vring 1, but 1 of them"),
    (Request.SET_VRING_NUM, VringState(0, 0), "cannot have 0 descriptors"),
    (Request.SET_VRING_NUM, VringState(0, 65536), "cannot have 65536 descriptors"),
    (Request.GET_VRING_BASE, VringState(256, 0), "there is no vring 256"),
    (Request.SET_VRING_ENABLE, VringState(0, 2), "enabled by 2"),
    (Request.SET_VRING_KICK, wire.VringFd(0, has_fd=False), "polled, without kicks"),
    (Request.SET_CONFIG, wire.Config(0, 0, bytes(8)), "8 bytes at 0 of the configuration cannot be written"),
    (Request.SET_CONFIG, wire.Config(32, 0, b"\2"), "1 bytes at 32 of the configuration cannot be written"),
    (Request.GET_INFLIGHT_FD, wire.Inflight(0, 0, 2, 64), "2 vrings of 64"),
    (Request.GET_INFLIGHT_FD, wire.Inflight(0, 0, 1, 0), "1 vrings of 0"),
    (Request.REM_MEM_REG, region(guest_start=0), "there is no memory region at 0x0"),
]


@pytest.mark.parametrize(("request_", "payload", "why"), ALWAYS, ids=lambda value: getattr(value, "name", None))
def test_messages_that_make_no_sense(host, caplog, request_, payload, why):
    with FrontEnd(host.export()) as front:
        front.negotiate()
        front.send(request_, payload)
        assert front.hung_up()
    assert f"protocol violation: {why}" in caplog.text or why in caplog.text
    served(host.path())


@pytest.mark.parametrize(("request_", "payload", "why"), RUNNING, ids=lambda value: getattr(value, "name", None))
def test_rings_that_move_while_they_run(host, caplog, request_, payload, why):
    with FrontEnd(host.export()) as front:
        front.run()
        front.send(request_, payload, need_reply=True)
        assert front.receive(request_, wire.U64)[0].value == 1  # said before the end
        assert front.hung_up()
    assert why in caplog.text
    served(host.path())


@pytest.mark.parametrize(
    ("payload", "size", "why"),
    [
        (region(), PAGE, "ends at 0x100000 of a file of 0x1000 bytes"),
        (region(mmap_offset=(1 << 63)), 1 << 20, "ends at"),
        (region(guest_start=GUEST_START + PAGE, user_start=0), 2 << 20, "overlap"),
        (region(guest_start=0, user_start=USER_START - PAGE), 2 << 20, "overlap"),
    ],
)
def test_memory_that_is_not_there(host, caplog, payload, size, why):
    memory = DriverMemory(2 << 20)
    with FrontEnd(host.export(), memory=memory) as front:
        front.negotiate()
        front.tell(Request.ADD_MEM_REG, region(), [memory.fd])
        os.ftruncate(memory.fd, 2 << 20)
        other = os.memfd_create("other")
        os.ftruncate(other, size)
        front.send(Request.ADD_MEM_REG, payload, [other])
        assert front.hung_up()
        os.close(other)
    assert why in caplog.text
    served(host.path())


@pytest.mark.parametrize("request_", [Request.ADD_MEM_REG, Request.SET_VRING_KICK, Request.SET_BACKEND_REQ_FD])
def test_descriptors_of_the_wrong_kind(host, request_):
    payload = {Request.ADD_MEM_REG: region(), Request.SET_VRING_KICK: wire.VringFd(0, has_fd=True)}.get(request_)
    read_only = os.open(__file__, os.O_RDONLY)
    pipe = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    with FrontEnd(host.export()) as front:
        front.negotiate()
        front.send(request_, payload, [pipe[0] if request_ is Request.ADD_MEM_REG else read_only])
        assert front.hung_up()
    served(host.path())
    assert len(os.listdir("/proc/self/fd")) <= before + 12  # those of the export and of the test's own front ends
    for fd in (read_only, *pipe):
        os.close(fd)


def test_memory_is_sealed_where_it_can_be(host):
    memory = DriverMemory(1 << 20)
    with FrontEnd(host.export(), memory=memory) as front:
        front.run()
        assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)


def test_memory_that_is_cut_off_ends_that_disk_only(host, caplog, tmp_path):
    """A file as memory, which nothing can seal: looking at it when it is cut off is SIGBUS, for who is not prepared."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(1 << 20))
    host.export("other")
    with FrontEnd(host.path("other")) as bystander, path.open("r+b") as file:
        beside = bystander.run()
        memory = DriverMemory(1 << 20, fd=os.dup(file.fileno()))
        with FrontEnd(host.export(), memory=memory) as front:
            vring = front.run()
            assert vring.run(Type.IN, 0, length=512) == (0, bytes(512))
            os.ftruncate(memory.fd, 0)
            os.eventfd_write(vring.kick_fd, 1)
            while "queue 0 stopped" not in caplog.text:
                assert beside.run(Type.IN, 0, length=512) == (0, bytes(512))
            assert front.ask(Request.GET_QUEUE_NUM, wire.U64).value == 1
            assert os.eventfd_read(vring.err_fd) == 1
        assert "cut off" in caplog.text
        assert beside.run(Type.IN, 0, length=512) == (0, bytes(512))
    served(host.path())


def test_a_ring_that_makes_no_sense_stops(host, caplog):
    host.export("other")
    with FrontEnd(host.export()) as front, FrontEnd(host.path("other")) as bystander:
        vring, beside = front.run(), bystander.run()
        vring.ring.make_available(999)
        vring.publish()
        while "queue 0 stopped" not in caplog.text:
            assert beside.run(Type.IN, 0, length=512) == (0, bytes(512))
        assert os.eventfd_read(vring.err_fd) == 1
        assert front.ask(Request.GET_STATUS, wire.U64).value == 64
        front.stop(vring)  # the guest may begin anew
        again = front.make_vring()
        front.start(again)
        assert again.run(Type.IN, 0, length=512) == (0, bytes(512))


def test_a_log_that_is_no_log(host):
    with FrontEnd(host.export()) as front:
        front.negotiate(FEATURES, PROTOCOL | ProtocolFeature.LOG_SHMFD)
        log = os.memfd_create("log", os.MFD_ALLOW_SEALING)
        front.send(Request.SET_LOG_BASE, wire.Log(PAGE, 0), [log])
        assert front.hung_up()
    with FrontEnd(host.path()) as front:
        front.negotiate(FEATURES, PROTOCOL | ProtocolFeature.LOG_SHMFD)
        os.ftruncate(log, PAGE)
        front.send(Request.SET_LOG_BASE, wire.Log(PAGE, 0), [log])
        front.receive(Request.SET_LOG_BASE, wire.U64)
        front.tell(Request.SET_FEATURES, wire.U64(FEATURES | PROTOCOL_FEATURES | LOG_ALL))
        front.share()
        vring = front.make_vring()
        fcntl.fcntl(log, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(ConnectionError):
            front.start(vring, flags=1)  # it does not cover the ring
    os.close(log)
    served(host.path())


def test_a_front_end_that_does_not_read_its_answers(host):
    with FrontEnd(host.export()) as front:
        front.negotiate()
        front.sock.settimeout(0.2)
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                front.send(Request.GET_CONFIG, wire.Config(0, 0, bytes(60)))
    served(host.path())


def test_what_breaks_off_in_the_middle(host, caplog):
    caplog.set_level("INFO")
    with FrontEnd(host.export()) as front:
        front.send_bytes(build(Request.SET_FEATURES, wire.U64(1))[:15], [front.memory.fd])
    served(host.path())
    assert "in the middle of a message" in caplog.text


# --- Addresses and options -----------------------------------------------------------------------------------------


def test_neither_a_live_socket_nor_a_file_is_taken_away(host):
    path = host.path()
    path.write_text("precious")
    with pytest.raises(Error, match="it exists and is not a socket"):
        host.export()
    assert path.read_text() == "precious"
    host.export("a")
    with pytest.raises(Error, match="another process listens there"):
        host.export("b", addr={"type": "unix", "path": str(host.path("a"))})
    served(host.path("a"))


def test_a_socket_that_is_passed(host):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(host.path()))
        fd = os.dup(listening.fileno())
    host.export(addr={"type": "fd", "str": str(fd)})
    served(host.path())
    with socket.socket() as inet, pytest.raises(Error, match="vhost-user needs a unix socket"):
        inet.bind(("127.0.0.1", 0))
        host.export("other", addr={"type": "fd", "str": str(os.dup(inet.fileno()))})
