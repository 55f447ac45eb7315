"""Random histories of a disk with bitmaps: whatever changes since a bitmap was cleared is marked in it.

Two exports and jobs write, on any loop. Restarts keep what is persistent; a copy of the image while it is open is what
a crash leaves. What goes to an overlay is not marked in the bitmaps of its base. Bitmaps are cleared, begin and end to
record, and overlays come, while somebody writes.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import peers
from blkferry.daemon.imaging.copying import put
from blkferry.errors import Error
from blkferry.graph.bitmaps import DirtyBitmap
from blkferry.graph.loan import lend
from blkferry.graph.permissions import Permission
from blkferry.testing.daemon import DaemonThread
from blkferry.wire.nbd.constants import CmdFlag

pytestmark = peers.requires("qemu-img")
SIZE = 1 << 20
offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // 4096 - 1).map(lambda n: n * 4096)
lengths = st.sampled_from([1, 512, 4096, 65536, 150_000])
names = st.sampled_from(["a", "b", "c"])
exports = st.sampled_from(["e", "f"])
on_top = precondition(lambda self: self.frozen is None)
with_holes = precondition(lambda self: self.kind == "qcow2")  # a raw image without any is one piece of its export


def eventually(condition) -> None:
    """Wait for what happens soon."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Histories(RuleBasedStateMachine):
    """`since` is what the disk was when each recording bitmap last said that nothing had changed.

    `frozen` is what it was when it got an overlay, which is thrown away when all starts anew.
    """

    kind = "qcow2"
    frozen: bytes | None = None

    @initialize(cluster=st.sampled_from(["512", "4k", "64k"]), iothread=st.booleans())
    def begin(self, cluster, iothread):
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "disk"
        self.iothread = iothread
        self.disk = bytearray(SIZE) if self.kind == "qcow2" else bytearray(b"r" * SIZE)
        if self.kind == "qcow2":
            options = ("-q", "-f", "qcow2", "-o", f"cluster_size={cluster}")
            peers.run("qemu-img", "create", *options, str(self.path), str(SIZE))
        else:
            self.path.write_bytes(self.disk)
        self.since: dict[str, bytes] = {}
        self.persistent: set[str] = set()
        self.open()

    def open(self):
        self.daemon = DaemonThread().__enter__()
        file = {"driver": "file", "filename": str(self.path)}
        self.daemon.execute("blockdev-add", driver=self.kind, node_name="n", file=file, discard="unmap")
        more = {}
        if self.iothread:
            self.daemon.execute("object-add", qom_type="iothread", id="io")
            more["iothread"] = "io"
        self.serve(more)

    def serve(self, more):
        for name in ("e", "f"):
            self.daemon.export("n", name, name, writable=True, **more)
        self.clients = {name: self.daemon.client(name).__enter__() for name in ("e", "f")}
        self.client = self.clients["e"]

    def disconnect(self):
        for client in self.clients.values():
            client.disconnect()
            client.close()

    def shut(self):
        self.disconnect()
        self.daemon.stop()
        if self.frozen is not None:
            self.disk[:], self.frozen = self.frozen, None

    def bitmap(self, name) -> DirtyBitmap:
        return self.daemon.daemon.graph.nodes["n"].dirty_bitmaps[name]

    def within(self, at, length):
        """A range of the disk, which may have become shorter."""
        at = min(at, len(self.disk) - 1)
        return at, min(length, len(self.disk) - at)

    @rule(at=offsets, length=lengths, byte=st.integers(0, 255), export=exports, flags=st.sampled_from([0, CmdFlag.FUA]))
    def write(self, at, length, byte, export, flags):
        at, length = self.within(at, length)
        self.clients[export].write(at, bytes([byte]) * length, flags)
        self.disk[at : at + length] = bytes([byte]) * length

    @with_holes
    @rule(at=offsets, length=lengths)
    def zero(self, at, length):
        at, length = self.within(at, length)
        self.client.zero(at, length)
        self.disk[at : at + length] = bytes(length)

    @with_holes
    @rule(at=offsets, length=lengths)
    def discard(self, at, length):
        self.client.trim(*self.within(at, length))
        self.look()  # what it discards reads as it likes

    def look(self):
        self.disk[:] = self.client.read(0, len(self.disk))

    @on_top
    @rule(at=offsets, length=lengths, byte=st.integers(0, 255))
    def job(self, at, length, byte):
        """What convert, commit and rebase do to the node that they write to."""
        at, length = self.within(at, length)
        graph = self.daemon.daemon.graph

        async def work():
            async with lend(graph, "n", "a job", Permission.WRITE) as loan:
                if byte:
                    await loan.run(put(loan.root, at, memoryview(bytes([byte]) * length)))
                else:
                    await loan.run(loan.root.write_zeroes(at, length, unmap=True))

        self.daemon.call(work)
        self.disk[at : at + length] = bytes([byte]) * length

    @on_top
    @rule(size=st.sampled_from([SIZE // 2, SIZE - 512, SIZE, SIZE + 4096, SIZE * 3 // 2]))
    def resize(self, size):
        with pytest.raises(Error, match="resize"):
            self.daemon.execute("block_resize", node_name="n", size=size)
        self.disconnect()
        for name in ("e", "f"):
            self.daemon.execute("block-export-del", id=name, mode="hard")
        eventually(lambda: not self.daemon.daemon.exports.ids)
        self.daemon.execute("block_resize", node_name="n", size=size)
        self.serve({"iothread": "io"} if self.iothread else {})
        self.disk[:] = self.resized(self.disk, size)
        self.since = {name: self.resized(was, size) for name, was in self.since.items()}

    @staticmethod
    def resized(content, size):
        return bytes(content[:size]) + bytes(max(size - len(content), 0))

    @on_top
    @rule(busy=st.booleans())
    def overlay(self, busy):
        path = self.directory / "overlay"
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(len(self.disk)))
        file = {"driver": "file", "filename": str(path)}
        self.daemon.execute("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
        with self.writes(busy):
            self.daemon.execute("blockdev-snapshot", node="n", overlay="over")
        self.frozen = bytes(self.disk)
        if busy:
            self.look()
            self.daemon.export("n", "base", "base", writable=False)
            with self.daemon.client("base") as client:
                self.frozen = client.read(0, len(self.disk))
            self.daemon.execute("block-export-del", id="base", mode="hard")

    @on_top
    @rule(name=names, other=names, how=st.sampled_from(["enable", "disable"]))
    def start_afresh_amid_writes(self, name, other, how):
        """What is written after it is marked, and so stays what was written before where nothing was cleared."""
        if name not in self.since or other not in self.since:
            return
        actions = [("clear", name), ("enable", name)] if name == other else [("clear", name), (how, other)]
        with self.writes(True) as written:
            self.daemon.execute(
                "transaction",
                actions=[
                    {"type": f"block-dirty-bitmap-{action}", "data": {"node": "n", "name": each}}
                    for action, each in actions
                ],
            )
            begun = len(written) + 1  # one may be on its way
            eventually(lambda: len(written) > begun + 2)
        self.look()
        for each in {name, other} if how == "enable" else {name}:
            for at in written[begun:]:
                assert next(self.bitmap(each).runs(at, at + 512)) == (512, True)
        self.since[name] = bytes(self.disk)
        if how == "disable" and name != other:
            self.daemon.execute("block-dirty-bitmap-enable", node="n", name=other)
            self.since[other] = bytes(self.disk)

    @on_top
    @rule(name=names, granularity=st.sampled_from([512, 4096, 65536]), persistent=st.booleans())
    def add(self, name, granularity, persistent):
        persistent = persistent and self.kind == "qcow2"
        if name in self.since:
            with pytest.raises(Error, match="already exists"):
                self.daemon.execute("block-dirty-bitmap-add", node="n", name=name)
            return
        self.daemon.execute(
            "block-dirty-bitmap-add", node="n", name=name, granularity=granularity, persistent=persistent
        )
        self.since[name] = bytes(self.disk)
        if persistent:
            self.persistent.add(name)

    @on_top
    @rule(name=names)
    def remove(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-remove", node="n", name=name)
            del self.since[name]
            self.persistent.discard(name)

    @on_top
    @rule(name=names)
    def clear(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-clear", node="n", name=name)
            self.since[name] = bytes(self.disk)

    @on_top
    @rule(name=names)
    def pause_and_start_afresh(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-disable", node="n", name=name)
            self.client.write(0, b"\x77" * 4096)
            self.disk[:4096] = b"\x77" * 4096
            self.daemon.execute("block-dirty-bitmap-clear", node="n", name=name)
            self.daemon.execute("block-dirty-bitmap-enable", node="n", name=name)
            self.since[name] = bytes(self.disk)

    @on_top
    @rule(into=names, source=names)
    def merge(self, into, source):
        if into in self.since and source in self.since:
            self.daemon.execute("block-dirty-bitmap-merge", node="n", target=into, bitmaps=[source])

    @rule()
    def restart(self):
        self.shut()
        if self.kind == "qcow2":
            peers.run("qemu-img", "check", "-q", str(self.path))
        self.open()
        self.since = {name: was for name, was in self.since.items() if name in self.persistent}
        assert set(self.daemon.daemon.graph.nodes["n"].dirty_bitmaps) == self.persistent

    @on_top
    @rule(busy=st.booleans())
    def crash(self, busy):
        self.client.flush()
        copy = self.directory / "crashed"
        with self.writes(busy):
            shutil.copy(self.path, copy)
        self.shut()
        shutil.move(copy, self.path)
        if self.kind == "qcow2":
            peers.run("qemu-img", "check", "-q", "-r", "leaks", str(self.path))  # there is nothing worse
        self.open()
        if busy:
            self.look()  # of what was not flushed anything may be there
        for name, bitmap in list(self.daemon.daemon.graph.nodes["n"].dirty_bitmaps.items()):
            assert bitmap.inconsistent
            self.daemon.execute("block-dirty-bitmap-remove", node="n", name=name)
        self.since, self.persistent = {}, set()

    @contextmanager
    def writes(self, busy):
        """Meanwhile a client writes sectors, if `busy`; a list of where it has, in order."""
        stop, written = threading.Event(), []
        writer = threading.Thread(target=self.keep_writing, args=(stop, written))
        if busy:
            writer.start()
        try:
            yield written
        finally:
            stop.set()
            if busy:
                writer.join()

    def keep_writing(self, stop, written):
        client, number = self.clients["f"], 0
        while not stop.is_set():
            number += 1
            at = number * 7919 % (len(self.disk) // 512) * 512
            client.write(at, bytes([number % 256]) * 512)
            written.append(at)

    @invariant()
    def every_change_is_marked(self):
        now = getattr(self, "disk", b"") if self.frozen is None else self.frozen
        for name, was in getattr(self, "since", {}).items():
            at = 0
            for length, dirty in self.bitmap(name).runs(0, len(now)):
                assert dirty or was[at : at + length] == now[at : at + length], (name, at, length)
                at += length

    def teardown(self):
        if hasattr(self, "daemon"):
            assert self.client.read(0, len(self.disk)) == self.disk
            self.shut()
            shutil.rmtree(self.directory)


class RawHistories(Histories):
    """Of an image whose exports see to the marking themselves."""

    kind = "raw"


TestHistories, TestRawHistories = Histories.TestCase, RawHistories.TestCase
TestHistories.settings = TestRawHistories.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
