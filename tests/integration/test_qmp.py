"""A whole daemon driven over QMP by the client that QEMU's own project publishes."""

import asyncio
import contextlib

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blkferry import Daemon
from blkferry.daemon.chardev import SocketChardev
from blkferry.daemon.commands import HANDLERS
from blkferry.daemon.monitor import Monitor
from blkferry.schema.registry import COMMANDS
from blkferry.schema.sockets import SocketAddressUnix


@contextlib.asynccontextmanager
async def controlled(sockets):
    """A daemon, and a client that has negotiated."""
    async with Daemon() as daemon:
        monitor = Monitor(SocketChardev("qmp", SocketAddressUnix(path=str(sockets / "qmp"))), daemon)
        await monitor.start()
        daemon.monitors.append(monitor)
        client = QMPClient("test")
        await client.connect(str(sockets / "qmp"))
        try:
            yield daemon, client
        finally:
            await client.disconnect()


async def refused(client, command, arguments=None):
    with pytest.raises(ExecuteError) as caught:
        await client.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


def memory(name="disk", **more):
    return {"driver": "memory", "node-name": name, "size": 1 << 20, **more}


async def test_every_command_of_the_schema_is_there():
    assert set(COMMANDS) == set(HANDLERS)


async def test_introspection_describes_what_is_there(sockets):
    async with controlled(sockets) as (_, client):
        commands = {entry["name"] for entry in await client.execute("query-commands")}
        assert {"blockdev-add", "block-export-add", "quit", "query-qmp-schema"} <= commands
        schema = {entry["name"]: entry for entry in await client.execute("query-qmp-schema")}
        assert {name for name, entry in schema.items() if entry["meta-type"] == "command"} == commands
        add = schema[schema["blockdev-add"]["arg-type"]]
        assert {variant["case"] for variant in add["variants"]} >= {"file", "host_device", "memory", "null-co", "raw"}
        version = await client.execute("query-version")
        assert version["qemu"] == {"major": 10, "minor": 0, "micro": 2}
        assert version["package"].startswith("blkferry ")


async def test_an_image_goes_in_and_an_export_comes_out(sockets, image):
    disk = image(1 << 20)
    async with controlled(sockets) as (_, client):
        await client.execute("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(disk.path)})
        await client.execute(
            "blockdev-add", {"driver": "raw", "node-name": "r", "file": "f", "offset": 512, "size": 1024}
        )
        address = {"type": "unix", "data": {"path": str(sockets / "nbd")}}
        await client.execute("nbd-server-start", {"addr": address})
        await client.execute("block-export-add", {"type": "nbd", "id": "e1", "node-name": "r", "writable": True})
        await client.execute("block-export-add", {"type": "nbd", "id": "e2", "node-name": "f"})
        exports = await client.execute("query-block-exports")
        assert exports == [
            {"id": "e2", "type": "nbd", "node-name": "f", "shutting-down": False, "clients": []},
            {"id": "e1", "type": "nbd", "node-name": "r", "shutting-down": False, "clients": []},
        ]
        nodes = {node["node-name"]: node for node in await client.execute("query-named-block-nodes")}
        assert nodes["r"]["image"]["virtual-size"] == 1024
        assert nodes["f"]["file"] == str(disk.path)
        assert nodes["f"]["ro"] is False
        assert nodes["f"]["cache"] == {"writeback": True, "direct": False, "no-flush": False}


async def test_the_event_comes_when_the_id_is_free(sockets):
    async with controlled(sockets) as (_, client):
        await client.execute("blockdev-add", memory())
        await client.execute("nbd-server-start", {"addr": {"type": "unix", "path": str(sockets / "nbd")}})
        await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"})
        with client.listener("BLOCK_EXPORT_DELETED") as listener:
            await client.execute("block-export-del", {"id": "e"})
            event = await asyncio.wait_for(listener.get(), 5)
            assert event["data"] == {"id": "e"}
            assert event["timestamp"]["seconds"] > 1_700_000_000
            await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"})
            await client.execute("nbd-server-stop")
            event = await asyncio.wait_for(listener.get(), 5)
            assert event["data"] == {"id": "e"}
        assert await client.execute("query-block-exports") == []


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("nope", None, ("CommandNotFound", "The command nope has not been found")),
        ("blockdev-add", {"driver": "memory", "node-name": "x"}, ("GenericError", "Parameter 'size' is missing")),
        (
            "blockdev-add",
            {"driver": "nope", "node-name": "x"},
            ("GenericError", "Parameter 'driver' does not accept value 'nope'"),
        ),
        ("blockdev-add", memory(colour="red"), ("GenericError", "Parameter 'colour' is unexpected")),
        (
            "blockdev-add",
            {"driver": "memory", "size": 512},
            ("GenericError", "'node-name' must be specified for the root node"),
        ),
        ("blockdev-add", memory("1x"), ("GenericError", "Invalid node-name: '1x'")),
        ("blockdev-add", memory("x" * 32), ("GenericError", "Node name too long")),
        ("blockdev-add", memory("disk"), ("GenericError", "Duplicate nodes with node-name='disk'")),
        (
            "blockdev-add",
            {"driver": "raw", "node-name": "r", "file": "disk", "offset": 511},
            ("GenericError", "Specified offset is not multiple of 512"),
        ),
        (
            "blockdev-add",
            memory(**{"node-name": "z", "detect-zeroes": "unmap"}),
            (
                "GenericError",
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ),
        ),
        (
            "blockdev-add",
            {"driver": "file", "node-name": "f", "filename": "/nonexistent"},
            ("GenericError", "Could not open '/nonexistent': No such file or directory"),
        ),
        (
            "blockdev-add",
            {"driver": "file", "node-name": "f", "filename": "/dev/null", "aio": "native"},
            ("GenericError", "aio=native was specified, but it requires cache.direct=on, which was not specified."),
        ),
        ("blockdev-del", {"node-name": "nope"}, ("GenericError", "Failed to find node with node-name='nope'")),
        (
            "block_resize",
            {"node-name": "nope", "size": 512},
            ("GenericError", "Cannot find device='' nor node-name='nope'"),
        ),
        ("block_resize", {"node-name": "disk", "size": -1}, ("GenericError", "Parameter 'size' expects a >0 size")),
        (
            "block-export-add",
            {"type": "nbd", "id": "9", "node-name": "disk"},
            ("GenericError", "Invalid block export id"),
        ),
        (
            "block-export-add",
            {"type": "nbd", "id": "e", "node-name": "nope"},
            ("GenericError", "Cannot find device='' nor node-name='nope'"),
        ),
        (
            "block-export-add",
            {"type": "nbd", "id": "e", "node-name": "disk"},
            ("GenericError", "NBD server not running"),
        ),
        (
            "block-export-add",
            {"type": "nbd", "id": "e", "node-name": "disk", "iothread": "io9"},
            ("GenericError", 'iothread "io9" not found'),
        ),
        ("block-export-del", {"id": "nope"}, ("GenericError", "Export 'nope' is not found")),
        ("nbd-server-stop", None, ("GenericError", "NBD server not running")),
        ("object-del", {"id": "nope"}, ("GenericError", "object 'nope' not found")),
    ],
)
async def test_bad_input_is_named_and_leaves_nothing_behind(sockets, command, arguments, expected):
    async with controlled(sockets) as (daemon, client):
        await client.execute("blockdev-add", memory())
        assert await refused(client, command, arguments) == expected
        assert list(daemon.graph.nodes) == ["disk"]
        assert daemon.graph.nodes["disk"].parents == []
        assert await client.execute("query-block-exports") == []


async def test_a_node_in_use_stays(sockets):
    async with controlled(sockets) as (_, client):
        await client.execute("blockdev-add", memory())
        await client.execute("blockdev-add", {"driver": "raw", "node-name": "top", "file": "disk"})
        assert await refused(client, "blockdev-del", {"node-name": "disk"}) == (
            "GenericError",
            "Node 'disk' is busy: node is used as file of node 'top'",
        )
        await client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(sockets / "nbd")}}})
        await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "top"})
        assert await refused(client, "blockdev-del", {"node-name": "top"}) == ("GenericError", "Node top is in use")
        class_, text = await refused(client, "block_resize", {"node-name": "top", "size": 4096})
        assert class_ == "GenericError"
        assert "Permission conflict on node 'top'" in text
        assert "export 'e'" in text
        await client.execute("block-export-del", {"id": "e"})
        await client.execute("blockdev-del", {"node-name": "top"})
        await client.execute("blockdev-del", {"node-name": "disk"})


async def test_resize_reaches_the_nodes_above(sockets):
    async with controlled(sockets) as (daemon, client):
        await client.execute(
            "blockdev-add", {"driver": "raw", "node-name": "top", "file": {**memory(), "node-name": "d"}}
        )
        await client.execute("block_resize", {"node-name": "top", "size": 3 << 20})
        assert daemon.graph.find("top").length == 3 << 20
        await client.execute("block_resize", {"node-name": "d", "size": 1 << 20})
        assert daemon.graph.find("top").length == 1 << 20


async def test_inline_children_go_with_their_parent(sockets):
    async with controlled(sockets) as (daemon, client):
        await client.execute(
            "blockdev-add", {"driver": "raw", "node-name": "top", "file": {"driver": "memory", "size": 4096}}
        )
        assert len(daemon.graph.nodes) == 2
        await client.execute("blockdev-del", {"node-name": "top"})
        assert daemon.graph.nodes == {}


async def test_an_iothread_in_use_is_refused(sockets):
    async with controlled(sockets) as (daemon, client):
        await client.execute("object-add", {"qom-type": "iothread", "id": "io1"})
        await client.execute("blockdev-add", memory())
        await client.execute("nbd-server-start", {"addr": {"type": "unix", "path": str(sockets / "nbd")}})
        await client.execute(
            "block-export-add",
            {"type": "nbd", "id": "e", "node-name": "disk", "iothread": "io1", "fixed-iothread": True},
        )
        assert daemon.graph.find("disk").services is daemon.objects.iothread("io1").services
        assert await refused(client, "object-del", {"id": "io1"}) == (
            "GenericError",
            "object 'io1' is in use, can not be deleted",
        )
        await client.execute("block-export-del", {"id": "e"})
        await client.execute("blockdev-del", {"node-name": "disk"})
        await client.execute("object-del", {"id": "io1"})


async def test_quit_asks_whoever_runs_the_daemon_to_stop_it(sockets):
    async with controlled(sockets) as (daemon, client):
        await client.execute("quit")
        await asyncio.wait_for(daemon.finished.wait(), 5)
