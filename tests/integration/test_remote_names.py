"""What a node is called whose disk is in another server, with and without TLS: as qemu-storage-daemon calls it."""

from __future__ import annotations

import pytest
import qsd

import peers
import pki
from blkferry.testing.daemon import DaemonThread

pytestmark = peers.requires("qemu-storage-daemon")


@pytest.fixture
def servers(tmp_path, sockets):
    """What nodes are given to connect to each of two servers, one of which wants TLS."""
    pki.complete(tmp_path / "pki")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="n", filename=str(tmp_path / "disk"), read_only=True)
        daemon.execute("object-add", qom_type="tls-creds-x509", id="t", endpoint="server", dir=str(tmp_path / "pki"))
        inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        unix = {"type": "unix", "data": {"path": str(sockets / "nbd")}}
        daemon.execute("nbd-server-start", id="inet", addr=inet, tls_creds="t")
        daemon.execute("nbd-server-start", id="unix", addr=unix)
        for number, server in enumerate(("inet", "unix")):
            for name in ("", "disk"):
                export = f"e{number}{name}"
                daemon.execute("block-export-add", type="nbd", id=export, node_name="n", name=name, server=server)
        (port,) = [
            address["port"]
            for server in daemon.execute("query-nbd-servers")
            for address in server["addresses"]
            if address["type"] == "inet"
        ]
        yield [
            {"server": {"type": "unix", "path": str(sockets / "nbd")}},
            {"server": {"type": "inet", "host": "localhost", "port": port}, "tls-creds": "tls"},
        ]


def test_nodes_are_called_what_qemu_calls_them(servers, tmp_path):
    credentials = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "client", "dir": str(tmp_path / "pki")}
    commands = [("object-add", credentials)]
    for number, server in enumerate(servers):
        for name, export in (("omitted", {}), ("empty", {"export": ""}), ("disk", {"export": "disk"})):
            node = {"driver": "nbd", "node-name": f"{name}{number}", "read-only": True, **server, **export}
            commands.append(("blockdev-add", node))
    commands += [
        ("blockdev-add", {"driver": "raw", "node-name": "above", "read-only": True, "file": "disk0"}),
        ("blockdev-add", {"driver": "raw", "node-name": "nowhere", "file": "none"}),
        ("query-named-block-nodes", {"flat": True}),
    ]
    answers, other_answers = qsd.ours(commands), qsd.theirs(commands)
    assert answers[:-1] == other_answers[:-1]

    def names(nodes):
        return {node["node-name"]: (node["file"], node["image"]["filename"]) for node in nodes}

    assert names(answers[-1]) == names(other_answers[-1])
