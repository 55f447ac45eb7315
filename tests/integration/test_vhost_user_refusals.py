"""What a vhost-user-blk export refuses: as qemu-storage-daemon does, and what that regrets later."""

import pytest
from qsd import compare

from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread
from peers import requires

SIZE = 1 << 20


@requires("qemu-storage-daemon")
def test_what_is_refused_in_the_same_words(sockets):
    path = {"type": "unix", "path": str(sockets / "disk")}
    export = {"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": path}
    compare(
        [
            ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": SIZE}),
            ("block-export-add", export | {"addr": {"type": "inet", "host": "localhost", "port": "0"}}),
            ("block-export-add", export | {"num-queues": 0}),
            ("block-export-add", export | {"num-queues": 65536}),
            ("block-export-add", export | {"logical-block-size": 256}),
            ("block-export-add", export | {"logical-block-size": 513}),
            ("block-export-add", export | {"logical-block-size": 4 << 20}),
            ("block-export-add", {name: export[name] for name in export if name != "addr"}),
            ("block-export-add", export | {"logical-block-size": 4096}),
            ("block-export-del", {"id": "e"}),
        ]
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"logical-block-size": 0}, "must be a power of 2 between 512 and 2097152"),  # which kills the original later
        ({"num-queues": 257}, "num-queues must be at most 256"),  # messages have eight bits for them
        ({"serial": "x" * 21}, "too long"),
    ],
)
def test_what_only_we_refuse(sockets, options, why):
    path = {"type": "unix", "path": str(sockets / "disk")}
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="n", size=SIZE)
        with pytest.raises(Error, match=why):
            daemon.execute("block-export-add", type="vhost-user-blk", id="e", node_name="n", addr=path, **options)
        assert not daemon.execute("query-block-exports")
        assert not (sockets / "disk").exists()
