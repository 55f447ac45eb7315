"""Random histories of a disk with bitmaps: whatever changes since a bitmap was cleared is marked in it.

Restarts keep what is persistent; a copy of the image while it is open is what a crash leaves.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import peers
from blkferry.errors import Error
from blkferry.graph.bitmaps import DirtyBitmap
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-img")
SIZE = 1 << 20
offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // 4096 - 1).map(lambda n: n * 4096)
lengths = st.sampled_from([1, 512, 4096, 65536, 150_000])
names = st.sampled_from(["a", "b", "c"])


class Histories(RuleBasedStateMachine):
    """`since` is what the disk was when each recording bitmap last said that nothing had changed."""

    @initialize(cluster=st.sampled_from(["512", "4k", "64k"]))
    def begin(self, cluster):
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "disk"
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(self.path), str(SIZE))
        self.since: dict[str, bytes] = {}
        self.persistent: set[str] = set()
        self.disk = bytearray(SIZE)
        self.open()

    def open(self):
        self.daemon = DaemonThread().__enter__()
        file = {"driver": "file", "filename": str(self.path)}
        self.daemon.execute("blockdev-add", driver="qcow2", node_name="n", file=file, discard="unmap")
        self.daemon.export("n", writable=True)
        self.client = self.daemon.client().__enter__()

    def shut(self):
        self.client.disconnect()
        self.client.close()
        self.daemon.stop()

    def bitmap(self, name) -> DirtyBitmap:
        return self.daemon.daemon.graph.nodes["n"].dirty_bitmaps[name]

    @rule(at=offsets, length=lengths, byte=st.integers(0, 255))
    def write(self, at, length, byte):
        length = min(length, SIZE - at)
        self.client.write(at, bytes([byte]) * length)
        self.disk[at : at + length] = bytes([byte]) * length

    @rule(at=offsets, length=lengths)
    def zero(self, at, length):
        length = min(length, SIZE - at)
        self.client.zero(at, length)
        self.disk[at : at + length] = bytes(length)

    @rule(at=offsets, length=lengths)
    def discard(self, at, length):
        self.client.trim(at, min(length, SIZE - at))
        self.disk[:] = self.client.read(0, SIZE)  # what it discards reads as it likes

    @rule(name=names, granularity=st.sampled_from([512, 4096, 65536]), persistent=st.booleans())
    def add(self, name, granularity, persistent):
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

    @rule(name=names)
    def remove(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-remove", node="n", name=name)
            del self.since[name]
            self.persistent.discard(name)

    @rule(name=names)
    def clear(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-clear", node="n", name=name)
            self.since[name] = bytes(self.disk)

    @rule(name=names)
    def pause_and_start_afresh(self, name):
        if name in self.since:
            self.daemon.execute("block-dirty-bitmap-disable", node="n", name=name)
            self.client.write(0, b"\x77" * 4096)
            self.disk[:4096] = b"\x77" * 4096
            self.daemon.execute("block-dirty-bitmap-clear", node="n", name=name)
            self.daemon.execute("block-dirty-bitmap-enable", node="n", name=name)
            self.since[name] = bytes(self.disk)

    @rule(into=names, source=names)
    def merge(self, into, source):
        if into in self.since and source in self.since:
            self.daemon.execute("block-dirty-bitmap-merge", node="n", target=into, bitmaps=[source])

    @rule()
    def restart(self):
        self.shut()
        peers.run("qemu-img", "check", "-q", str(self.path))
        self.open()
        self.since = {name: was for name, was in self.since.items() if name in self.persistent}
        assert set(self.daemon.daemon.graph.nodes["n"].dirty_bitmaps) == self.persistent

    @rule()
    def crash(self):
        self.client.flush()
        copy = self.directory / "crashed"
        shutil.copy(self.path, copy)
        self.shut()
        shutil.move(copy, self.path)
        self.open()
        for name, bitmap in list(self.daemon.daemon.graph.nodes["n"].dirty_bitmaps.items()):
            assert bitmap.inconsistent
            self.daemon.execute("block-dirty-bitmap-remove", node="n", name=name)
        self.since, self.persistent = {}, set()

    @invariant()
    def every_change_is_marked(self):
        for name, was in getattr(self, "since", {}).items():
            at = 0
            for length, dirty in self.bitmap(name).runs(0, SIZE):
                assert dirty or was[at : at + length] == self.disk[at : at + length], (name, at, length)
                at += length

    def teardown(self):
        if hasattr(self, "daemon"):
            assert self.client.read(0, SIZE) == self.disk
            self.shut()
            shutil.rmtree(self.directory)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
