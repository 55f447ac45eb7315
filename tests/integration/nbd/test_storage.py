"""What the storage does to requests: errors, truncation, full disks, durability; and what the client sees of it."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from serving import SIZE, eventually

from blkferry.errors import Error
from blkferry.extent import Status
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.fault import VERBS, insert
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode

ROOT = os.geteuid() == 0


@pytest.fixture
def faulty():
    """A daemon that exports node "fault" over a memory disk of 0x55 bytes."""
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        daemon.export("m", "plain", "plain")

        async def make():
            return insert(daemon.daemon.graph, "fault", "m")

        daemon.fault = daemon.call(make)
        daemon.export("fault")
        with daemon.client("plain") as client:
            client.write(0, b"\x55" * SIZE)
        yield daemon


# --- Errors -----------------------------------------------------------------------------------------------------

OF_VERB = {
    "read": (Cmd.READ, 4096),
    "write": (Cmd.WRITE, 4096),
    "remap": (Cmd.WRITE_ZEROES, 4096),
    "discard": (Cmd.TRIM, 4096),
    "prefetch": (Cmd.CACHE, 4096),
    "flush": (Cmd.FLUSH, 0),
}


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_is_reported_to_its_request_only(faulty, verb, mode):
    command, length = OF_VERB[verb]
    wanted = {
        errno.EIO: Errno.EIO,
        errno.ENOSPC: Errno.ENOSPC,
        errno.EDQUOT: Errno.ENOSPC,
        errno.EPERM: Errno.EPERM,
        errno.EROFS: Errno.EPERM,
        errno.ENOMEM: Errno.ENOMEM,
        errno.ESHUTDOWN: Errno.ESHUTDOWN,
        errno.EBADF: Errno.EINVAL,
    }
    with faulty.client(mode=mode) as client:
        for code, error in wanted.items():
            faulty.fault.errors[verb] = code
            payload = bytes(length) if command == Cmd.WRITE else b""
            failing = client.submit(command, 0, length, 0, payload)
            client.push()
            result = client.wait(failing)
            assert result.error == error
            if mode is not Mode.SIMPLE:
                assert os.strerror(code) in result.text
            faulty.fault.errors.clear()
            assert client.call(command, 0, length, 0, payload).error == 0
        assert client.read(SIZE - 10, 10) == b"\x55" * 10


@pytest.mark.parametrize(("mode", "flags"), [*((mode, 0) for mode in Mode), (Mode.STRUCTURED, 4), (Mode.EXTENDED, 4)])
def test_one_of_many_in_flight_fails(faulty, mode, flags):
    calls = iter(range(1000))
    faulty.fault.errors["read"] = lambda: errno.EIO if next(calls) % 3 == 1 else 0
    with faulty.client(mode=mode) as client:
        cookies = [client.submit(Cmd.READ, 512 * n, 512, flags) for n in range(90)]
        errors = [client.wait(cookie).error for cookie in cookies]
        assert sorted(set(errors)) == [0, Errno.EIO]
        assert errors.count(Errno.EIO) == 30
        faulty.fault.errors.clear()
        assert client.read(0, SIZE) == b"\x55" * SIZE


def test_an_error_after_the_first_chunk_of_a_sparse_read(faulty, monkeypatch):
    """Half an answer is out of date, not sent: the reply is one error and the stream goes on."""
    with faulty.client(mode=Mode.STRUCTURED) as client:
        root = faulty.daemon.exports.get("e").root

        async def status(start, length):
            return [Status(length // 4, zero=bool(n % 2), allocated=not n % 2) for n in range(4)]

        monkeypatch.setattr(root, "status", status)
        calls = iter(range(1000))
        faulty.fault.errors["read"] = lambda: errno.EIO if next(calls) == 1 else 0
        result = client.call(Cmd.READ, 0, 65536)
        assert (result.error, result.chunks) == (Errno.EIO, [])
        assert len(client.call(Cmd.READ, 0, 65536).chunks) == 4


def test_fast_zero_is_refused_where_it_would_not_be(faulty):
    faulty.fault.errors["remap"] = errno.ENOTSUP
    with faulty.client() as client:
        assert client.call(Cmd.WRITE_ZEROES, 0, 4096, CmdFlag.FAST_ZERO).error == Errno.ENOTSUP
        assert client.read(0, 4096) == b"\x55" * 4096
        client.zero(0, 4096)  # written instead
        assert client.read(0, 8192) == bytes(4096) + b"\x55" * 4096


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_fua_reaches_a_driver_that_takes_its_own_writes(faulty, command):
    with faulty.client() as client:
        payload = b"x" * 512 if command == Cmd.WRITE else b""
        assert client.call(command, 0, 512, 0, payload).error == 0
        assert "flush" not in {call[0] for call in faulty.fault.calls}
        assert client.call(command, 0, 512, CmdFlag.FUA, payload).error == 0
        assert faulty.fault.calls[-1] == ("flush",)


def test_an_error_of_our_own_is_an_error_of_the_request(faulty, monkeypatch):
    async def broken(start, length):
        raise ValueError("a bug")

    with faulty.client() as client:
        monkeypatch.setattr(faulty.fault, "discard", broken)
        assert client.call(Cmd.TRIM, 0, 512).error == Errno.EIO
        assert client.read(0, 10) == b"\x55" * 10


# --- Files that are cut off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("where", ["buffered", "direct", "tmpfs"])
def test_a_file_that_is_cut_off_below_a_request(where, mode, tmp_path):
    path = f"/dev/shm/blkferry-{os.getpid()}.img" if where == "tmpfs" else str(tmp_path / "f.img")
    try:
        with open(path, "wb") as file:
            file.write(b"\x55" * SIZE)
        with DaemonThread() as daemon:
            cache = {"direct": where == "direct"}
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=path, cache=cache)
            daemon.export("f")
            with daemon.client(mode=mode) as client:
                assert client.read(0, SIZE) == b"\x55" * SIZE
                half = SIZE // 2
                os.truncate(path, half)
                for offset, length in ((half, 512), (half, 4096), (half, half), (0, SIZE), (half - 512, 1024)):
                    assert client.call(Cmd.READ, offset, length).error == Errno.EIO, (offset, length)
                    if mode is not Mode.SIMPLE:
                        assert client.call(Cmd.READ, offset, length, CmdFlag.DF).error == Errno.EIO, (offset, length)
                assert client.read(0, half) == b"\x55" * half
                assert client.read(half - 512, 512) == b"\x55" * 512
                client.write(half, b"\x66" * half)  # a write makes it whole again
                assert client.read(half - 1, half + 1) == b"\x55" + b"\x66" * half
    finally:
        os.unlink(path)


# --- Read-only disks --------------------------------------------------------------------------------------------


def test_auto_read_only_takes_what_the_host_allows(small_disk):
    path = small_disk / "f.img"
    path.write_bytes(b"\x55" * 4096)
    with DaemonThread() as daemon:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(Error, match="Read-only file system") as refused:
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path))
        assert "read-only=on" in refused.value.hint
        daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), auto_read_only=True)
        daemon.export("f", writable=False)
        with daemon.client() as client:
            assert client.read(0, 4096) == b"\x55" * 4096
        with pytest.raises(Error, match="for writing: Read-only file system"):
            daemon.export("f", "w", "w", writable=True)
        with daemon.client() as client:
            assert client.read(0, 4096) == b"\x55" * 4096


# --- Full disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 1 MiB."""
    if not ROOT:
        pytest.skip("only root can mount")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("length", [4096, 1 << 20])
def test_a_full_disk_fails_writes_and_nothing_else(small_disk, length, mode):
    path = small_disk / "f.img"
    path.touch()
    os.truncate(path, 16 << 20)
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), discard="unmap")
        daemon.export("f")
        with daemon.client(mode=mode) as client, daemon.client() as other:
            offsets = range(0, 3 << 20, length)
            cookies = [client.submit(Cmd.WRITE, offset, length, 0, b"w" * length) for offset in offsets]
            results = [client.wait(cookie) for cookie in cookies]
            errors = {result.error for result in results}
            assert errors == ({0, Errno.ENOSPC} if length == 4096 else {Errno.ENOSPC} | errors)
            assert client.call(Cmd.WRITE, 8 << 20, length, CmdFlag.FUA, b"w" * length).error == Errno.ENOSPC
            assert other.call(Cmd.WRITE, 8 << 20, 4096, 0, b"w" * 4096).error == Errno.ENOSPC
            for result in results:
                if not result.error:
                    assert client.read(result.request.offset, 4096) == b"w" * 4096
            client.flush()
            client.trim(0, 4 << 20)
            client.write(0, b"room again")
            assert client.read(0, 12) == b"room again\0\0"


# --- Durability -------------------------------------------------------------------------------------------------


class Recorder:
    """Stands before an engine and keeps account of what was asked to be durable; fails fdatasync on demand."""

    def __init__(self, engine):
        self.engine = engine
        self.synced = 0
        self.durable_writes = 0
        self.fail = 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def fdatasync(self, fd, done):
        self.synced += 1
        if self.fail:
            done(-self.fail)
        else:
            self.engine.fdatasync(fd, done)

    def write(self, fd, buffer, start, length, offset, flags, done):
        self.durable_writes += bool(flags & os.RWF_DSYNC)
        self.engine.write(fd, buffer, start, length, offset, flags, done)


@pytest.fixture(params=["io_uring", "threads"])
def recorded(request, tmp_path):
    path = tmp_path / "f.img"
    path.write_bytes(bytes(SIZE))
    with DaemonThread(engine="auto" if request.param == "io_uring" else "threads") as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), discard="unmap")
        daemon.export("f")
        with daemon.client() as client:
            client.flush()  # a file that was just opened is not known to be clean
        storage = daemon.daemon.graph.nodes["f"].storage
        recorder = storage.engine = Recorder(storage.engine)
        daemon.recorder = recorder
        yield daemon


def test_flush_costs_nothing_when_nothing_was_written(recorded):
    with recorded.client() as client:
        client.flush()
        client.read(0, 4096)
        client.flush()
        assert recorded.recorder.synced == 0
        client.write(0, b"x")
        client.flush()
        client.flush()
        assert recorded.recorder.synced == 1


@pytest.mark.parametrize("length", [10, 200_000])
def test_a_flush_in_the_same_burst_covers_the_writes_before_it(recorded, length):
    with recorded.client() as client:
        for turn in range(1, 6):
            client.submit(Cmd.WRITE, 0, length, 0, b"x" * length)
            last = client.submit(Cmd.FLUSH)
            client.push()
            assert client.wait(last).error == 0
            assert recorded.recorder.synced == turn


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_a_flush_covers_what_others_wrote_before_they_left(recorded, command):
    with recorded.client() as client:
        client.submit(command, 0, 4096, 0, b"x" * 4096 if command == Cmd.WRITE else b"")
        client.push()
        if command == Cmd.WRITE:
            client.submit(Cmd.WRITE, 0, 4096, 0, b"x" * 4096)
        else:
            client.wait_any()
        client.disconnect()
    eventually(lambda: not recorded.daemon.exports.get("e").clients)
    with recorded.client() as client:
        client.flush()
        assert recorded.recorder.synced == 1


def test_fua_makes_each_change_durable(recorded):
    recorder = recorded.recorder
    with recorded.client() as client:
        client.write(0, b"x" * 512, CmdFlag.FUA)
        client.write(0, b"x" * 200_000, CmdFlag.FUA)
        assert recorder.durable_writes + recorder.synced == 2
        client.zero(0, 4096, CmdFlag.FUA)
        client.trim(0, 4096, CmdFlag.FUA)
        assert recorder.durable_writes + recorder.synced == 4
        client.write(0, b"")
        client.write(0, b"x")
        client.read(0, 10, CmdFlag.FUA)
        assert recorder.durable_writes + recorder.synced == 5


def test_writethrough_makes_every_change_durable(recorded):
    recorded.export("f", "wt", "wt", writethrough=True)
    recorder = recorded.recorder
    with recorded.client("wt") as client:
        for n, length in enumerate((1, 512, 200_000), 1):
            client.write(0, b"x" * length)
            assert recorder.durable_writes + recorder.synced == n
        client.zero(0, 100)
        client.trim(0, 4096)
        assert recorder.durable_writes + recorder.synced == 5
        burst = [client.submit(Cmd.WRITE, n, 1, 0, b"y") for n in range(20)]
        for cookie in burst:
            client.wait(cookie)
        assert recorder.durable_writes + recorder.synced == 25


def test_a_failed_flush_is_never_forgotten(recorded):
    """The kernel reports a lost page once. Whoever asks later must not be told that all is well."""
    with recorded.client() as client, recorded.client() as other:
        client.write(0, b"x")
        recorded.recorder.fail = errno.EIO
        assert client.call(Cmd.FLUSH).error == Errno.EIO
        recorded.recorder.fail = 0
        assert client.call(Cmd.FLUSH).error == Errno.EIO
        assert other.call(Cmd.FLUSH).error == Errno.EIO
        assert other.call(Cmd.WRITE_ZEROES, 0, 512, CmdFlag.FUA).error == Errno.EIO
        assert other.read(0, 1) in (b"x", b"\0")


def test_no_flush_never_syncs(tmp_path):
    path = tmp_path / "f.img"
    path.write_bytes(bytes(SIZE))
    with DaemonThread() as daemon:
        daemon.execute(
            "blockdev-add", driver="file", node_name="f", filename=str(path), cache={"direct": False, "no-flush": True}
        )
        daemon.export("f")
        storage = daemon.daemon.graph.nodes["f"].storage
        storage.engine = recorder = Recorder(storage.engine)
        with daemon.client() as client:
            client.write(0, b"x" * 512, CmdFlag.FUA)
            client.flush()
        assert (recorder.synced, recorder.durable_writes) == (0, 0)


def test_a_slow_flush_lets_reads_pass(recorded):
    """A flush goes by the engine: nothing else of the connection waits for it."""
    real = recorded.recorder.engine.fdatasync
    held = []
    recorded.recorder.fdatasync = lambda fd, done: held.append((fd, done))
    with recorded.client() as client:
        client.write(0, b"x")
        flush = client.submit(Cmd.FLUSH)
        reads = [client.submit(Cmd.READ, 512 * n, 512) for n in range(50)]
        for cookie in reads:
            assert client.wait(cookie).error == 0
        assert client.in_flight == 1
        (fd, done) = held.pop()
        recorded.loop.call_soon_threadsafe(real, fd, done)
        assert client.wait(flush).error == 0


def test_a_kernel_that_takes_no_submissions_loses_none(tmp_path, monkeypatch):
    """Out of memory, say: what was queued stays queued, also when the queue is full."""
    path = tmp_path / "f.img"
    path.write_bytes(b"".join(n.to_bytes(512) for n in range(SIZE // 512)))
    with DaemonThread() as daemon:
        ring = daemon.daemon.services.engine
        if ring.name != "io_uring":
            pytest.skip("this kernel refuses io_uring")
        cache = {"direct": True}
        daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), cache=cache)
        daemon.export("f", "one", "one")
        daemon.export("f", "two", "two")
        real, refusals = ring._enter, iter(range(20))
        monkeypatch.setattr(ring, "_enter", lambda: None if next(refusals, None) is not None else real())
        with daemon.client("one") as one, daemon.client("two") as two:
            for client in (one, two):
                for n in range(1000):
                    client.submit(Cmd.READ, 512 * n, 512)
                client.push()
            for client in (one, two):
                for _ in range(1000):
                    result = client.wait_any()
                    assert result.data == (result.request.offset // 512).to_bytes(512)
