"""Daemons that are killed while they write to qcow2 images: nothing worse than leaks, and what was flushed is there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

import peers
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd

pytestmark = peers.requires("qemu-img")

SECTOR = 512
SECTORS = 4096
ZERO = bytes(SECTOR)

CASES = {
    "plain": "cluster_size=4k",
    "lazy": "cluster_size=1k,refcount_bits=64,lazy_refcounts=on",
    "subclusters": "cluster_size=16k,extended_l2=on",
}


class Load:
    """One client. `allowed` are the values that each sector may have now."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.allowed: list[set[bytes]] = [{ZERO} for _ in range(SECTORS)]
        self.writes = 0
        self.flushes = 0

    def run(self, socket: str) -> None:
        """Write until the server is gone."""
        client = Client.connect(socket)
        try:
            while True:
                self._batch(client)
        except (OSError, ConnectionEnded):
            client.close()

    def _batch(self, client: Client) -> None:
        """Some requests at once that have no sector in common, then a flush."""
        rng = self.rng
        cuts = sorted(rng.sample(range(SECTORS), 17))
        after: dict[int, set[bytes]] = {}
        for first, end in pairwise(cuts):
            count = min(end - first, rng.choice([1, 3, 8, 64]))
            sectors = range(first, first + count)
            kind = rng.random()
            if kind < 0.7:
                self.writes += 1
                values = [b"%07x:%07x." % (self.writes, sector) * 32 for sector in sectors]
                after |= {sector: {value} for sector, value in zip(sectors, values, strict=True)}
                self._submit(client, Cmd.WRITE, first, count, b"".join(values), after)
            elif kind < 0.85:
                after |= {sector: {ZERO} for sector in sectors}
                self._submit(client, Cmd.WRITE_ZEROES, first, count, b"", after)
            else:
                after |= {sector: self.allowed[sector] | {ZERO} for sector in sectors}
                self._submit(client, Cmd.TRIM, first, count, b"", after)
        while client.in_flight:
            client.wait_any()
        client.flush()
        self.flushes += 1
        for sector, values in after.items():
            self.allowed[sector] = values

    def _submit(
        self, client: Client, command: int, first: int, count: int, data: bytes, after: dict[int, set[bytes]]
    ) -> None:
        for sector in range(first, first + count):
            self.allowed[sector] = self.allowed[sector] | after[sector]
        client.submit(command, first * SECTOR, count * SECTOR, payload=data)

    def compare(self, content: bytes) -> None:
        for sector, allowed in enumerate(self.allowed):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            assert found in allowed, f"sector {sector} holds {found[:16]!r}, not one of {[v[:16] for v in allowed]}"
            self.allowed[sector] = {found}


def serve(path: Path, socket: str, options: str) -> subprocess.Popen[bytes]:
    command = [
        *(str(Path(sys.executable).with_name("blkferry-qsd")),),
        *("--blockdev", f"driver=file,node-name=f,filename={path}"),
        *("--blockdev", f"driver=qcow2,node-name=n,file=f,discard=unmap{options}"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=e,node-name=n,name=,writable=on"),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not os.path.exists(socket):
        assert process.poll() is None, "the daemon has ended"
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def kill(case: str, tmp_path: Path, sockets: Path, *, seed: int, rounds: int) -> None:
    """Serve, write, and die, again and again with the same image."""
    create = CASES[case]
    rng = random.Random(f"{case} {seed}")
    image = tmp_path / "image.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", create, image, str(SECTORS * SECTOR))
    load = Load(image, rng)
    for number in range(rounds):
        socket = str(sockets / f"{number}.sock")
        process = serve(image, socket, rng.choice(["", ",cache.direct=on", ",l2-cache-size=4096"]))
        try:
            client = threading.Thread(target=load.run, args=[socket])
            client.start()
            time.sleep(rng.uniform(0.03, 0.4))
        finally:
            process.kill()
            process.wait()
        client.join(20)
        assert not client.is_alive()
        code = peers.run("qemu-img", "check", image, expect=None).returncode
        if code == 2:
            info = peers.run("qemu-img", "info", image).stdout
            assert case == "lazy", info
            assert "corrupt: false" in info
            peers.run("qemu-img", "check", "-r", "all", image)
        else:
            assert code in {0, 3}, "0: sound, 3: leaks"
        peers.run("qemu-img", "convert", "-O", "raw", image, tmp_path / "raw")
        load.compare((tmp_path / "raw").read_bytes())
    assert load.flushes


@pytest.mark.parametrize("case", CASES)
def test_a_daemon_that_is_killed(case, tmp_path, sockets):
    kill(case, tmp_path, sockets, seed=1, rounds=2)
