"""Exports coming, going, moving and sharing, with clients and requests in them."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
from serving import SIZE, count_files, eventually, in_flight
from test_model import Run

from blkferry.errors import Error, ErrorKind
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.fault import insert
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, Mode
from blkferry.wire.nbd.transmission import Request

DELETED = "BLOCK_EXPORT_DELETED"


@pytest.fixture
def daemon():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=SIZE, discard="unmap")
        yield daemon


@pytest.fixture
def slow(daemon):
    """A daemon whose node "slow" answers reads when `daemon.slow.gates["read"]` is set."""

    async def make():
        node = insert(daemon.daemon.graph, "slow", "m")
        node.gates["read"] = asyncio.Event()
        return node

    daemon.slow = daemon.call(make)
    yield daemon
    if not daemon.loop.is_closed():
        open_gate(daemon)


def open_gate(daemon):
    daemon.loop.call_soon_threadsafe(daemon.slow.gates["read"].set)


def wait_until_in_flight(daemon, count=1):
    eventually(lambda: sum(call[0] == "read" for call in daemon.slow.calls) >= count)


def query(daemon):
    return {export["id"]: export["shutting-down"] for export in daemon.execute("query-block-exports")}


def remove(daemon, export_id):
    """Remove an export whose last client is leaving."""
    eventually(lambda: not daemon.daemon.exports.get(export_id).in_use)
    try:
        daemon.execute("block-export-del", id=export_id)
    except Error:  # it had not even arrived
        eventually(lambda: not daemon.daemon.exports.get(export_id).in_use)
        daemon.execute("block-export-del", id=export_id)


def refused(daemon, command, **arguments):
    with pytest.raises(Error) as caught:
        daemon.execute(command, **arguments)
    return caught.value


# --- Adding -----------------------------------------------------------------------------------------------------


def test_the_order_and_words_of_the_checks(daemon):
    def add(**changes):
        arguments = {"type": "nbd", "id": "e2", "node_name": "m"} | changes
        return str(refused(daemon, "block-export-add", **arguments))

    assert add() == "NBD server not running"
    daemon.export("m", "taken")
    daemon.execute("blockdev-add", driver="memory", node_name="ro", size=SIZE, read_only=True)
    assert add(id="1x", node_name="nothing") == "Invalid block export id"
    assert add(id="e", node_name="nothing") == "Block export id 'e' is already in use"
    assert add(node_name="nothing") == "Cannot find device='' nor node-name='nothing'"
    assert add(node_name="ro", writable=True, iothread="io9") == "Cannot export read-only node as writable"
    assert add(iothread="io9", name="taken") == 'iothread "io9" not found'
    assert add(name="x" * 4097) == f"export name '{'x' * 4097}' too long"
    assert add(description="y" * 4097) == f"description '{'y' * 4097}' too long"
    assert add(name="taken") == "NBD server already has export named 'taken'"
    assert query(daemon) == {"e": False}
    assert daemon.events == []
    daemon.execute("block-export-del", id="e")
    daemon.execute("block_resize", node_name="m", size=SIZE)  # nobody holds the permission that failed adds took


def test_exports_are_read_only_unless_asked(daemon):
    daemon.serve()
    daemon.execute("block-export-add", type="nbd", id="e", node_name="m", description="a disk")
    with daemon.client("m") as client:
        assert client.description == "a disk"
        assert client.flags & 0x2
        assert client.block_size == (1, 4096, 32 << 20)
        with pytest.raises(PermissionError):
            client.write(0, b"x")


def test_two_exports_of_one_node_see_each_other(daemon):
    daemon.export("m", "a", "a")
    daemon.export("m", "b", "b", writable=False)
    with daemon.client("a") as one, daemon.client("b") as other:
        one.write(1000, b"hello")
        assert other.read(1000, 5) == b"hello"
        daemon.execute("block-export-del", id="a", mode="hard")
        assert one.ended()
        assert other.read(1000, 5) == b"hello"


def test_listing_is_in_order_of_creation_and_queries_newest_first(daemon):
    for name in ("one", "two", "three"):
        daemon.export("m", name, name)
    with Client.open(daemon.socket) as client:
        client.greet()
        names = [reply.payload[4:].decode() for reply in client.option(3)[:-1]]
    assert names == ["one", "two", "three"]
    assert list(query(daemon)) == ["three", "two", "one"]


# --- Removing ---------------------------------------------------------------------------------------------------


def test_safe_removal_waits_for_clients_to_leave(daemon):
    daemon.export("m")
    with daemon.client() as client:
        error = refused(daemon, "block-export-del", id="e")
        assert (error.kind, str(error)) == (ErrorKind.BUSY, "export 'e' still in use")
        assert "pid" in error.hint
        client.write(0, b"still served")
        client.disconnect()
    remove(daemon, "e")
    assert daemon.events == [(DELETED, {"id": "e"})]
    assert str(refused(daemon, "block-export-del", id="e")) == "Export 'e' is not found"
    with pytest.raises(Error, match="not present"):
        daemon.client()


def test_hard_removal_is_visible_until_the_last_request_ends(slow):
    slow.export("slow")
    client = slow.client()
    client.submit(Cmd.READ, 0, 4096)
    client.push()
    wait_until_in_flight(slow)
    slow.execute("block-export-del", id="e", mode="hard")  # returns at once
    assert client.ended()
    assert query(slow) == {"e": True}
    assert str(refused(slow, "block-export-del", id="e")) == "Export 'e' is already shutting down"
    assert str(refused(slow, "block-export-del", id="e", mode="hard")) == "Export 'e' is already shutting down"
    again = {"type": "nbd", "id": "e", "node_name": "m"}
    assert str(refused(slow, "block-export-add", **again)) == "Block export id 'e' is already in use"
    assert str(refused(slow, "blockdev-del", node_name="slow")).startswith("Node slow is in use")
    assert slow.events == []
    open_gate(slow)
    eventually(lambda: slow.events == [(DELETED, {"id": "e"})])
    slow.execute("block-export-add", **again)
    client.close()


def test_stopping_the_server_ends_everything_of_it(slow):
    for number in range(3):
        slow.export("slow", f"n{number}", f"e{number}")
    half_way = Client.open(slow.socket)
    half_way.greet()
    client = slow.client("n1")
    client.submit(Cmd.READ, 0, 512)
    client.push()
    wait_until_in_flight(slow)
    stopping = slow.begin("nbd-server-stop")
    assert half_way.ended()
    assert client.ended()
    time.sleep(0.05)
    assert not stopping.done()  # it waits for the request
    late = refused(slow, "block-export-add", type="nbd", id="late", node_name="m")
    assert str(late) == "NBD server not running"
    with Client.open(slow.socket, timeout=0.2) as too_late, pytest.raises(TimeoutError):
        too_late.greet()
    open_gate(slow)
    stopping.result(5)
    assert slow.events == [(DELETED, {"id": f"e{number}"}) for number in (2, 1, 0)]
    assert query(slow) == {}
    assert str(refused(slow, "nbd-server-stop")) == "NBD server not running"
    slow.export("m")  # and it can be started again
    slow.client().close()
    for each in (half_way, client):
        each.close()


def test_the_end_of_the_daemon_answers_what_was_asked(slow):
    slow.export("slow")
    client = slow.client()
    cookie = client.submit(Cmd.READ, 0, 4096)
    client.push()
    wait_until_in_flight(slow)
    slow.loop.call_soon_threadsafe(slow.daemon.finished.set)
    time.sleep(0.05)
    open_gate(slow)
    assert client.wait(cookie).data == bytes(4096)
    assert client.ended()
    slow.stop()
    assert slow.events == [(DELETED, {"id": "e"})]
    client.close()


def test_a_client_that_leaves_is_counted_until_its_request_ends(slow):
    slow.export("slow")
    client = slow.client()
    client.submit(Cmd.READ, 0, 4096)
    client.push()
    wait_until_in_flight(slow)
    client.close()
    time.sleep(0.05)
    assert str(refused(slow, "block-export-del", id="e")) == "export 'e' still in use"
    open_gate(slow)
    eventually(lambda: not slow.daemon.exports.get("e").in_use)
    slow.execute("block-export-del", id="e")


def test_slow_requests_do_not_block_control(daemon):
    daemon.execute("blockdev-add", driver="null-co", node_name="n", size=SIZE, latency_ns=300_000_000)
    daemon.export("n")
    with daemon.client() as client:
        began = time.monotonic()
        cookies = [client.submit(Cmd.READ, 0, 4096) for _ in range(40)]
        client.push()
        daemon.export("n", "again", "e2")
        assert query(daemon) == {"e2": False, "e": False}
        assert time.monotonic() - began < 0.25
        for cookie in cookies:
            assert client.wait(cookie).data == bytes(4096)
        assert time.monotonic() - began < 1.5  # all at the same time


# --- Nodes in use -----------------------------------------------------------------------------------------------


def test_nodes_in_use_stay(daemon):
    daemon.execute("blockdev-add", driver="raw", node_name="r", file="m")
    daemon.export("r")
    assert str(refused(daemon, "blockdev-del", node_name="r")) == "Node r is in use"
    assert "node 'r'" in str(refused(daemon, "blockdev-del", node_name="m"))
    assert "is busy: node is used as file of" in str(refused(daemon, "blockdev-del", node_name="m"))
    daemon.execute("block-export-del", id="e")
    daemon.execute("blockdev-del", node_name="r")
    daemon.execute("blockdev-del", node_name="m")


def test_an_export_forbids_resizing_and_is_named(daemon):
    daemon.execute("blockdev-add", driver="raw", node_name="r", file="m")
    daemon.export("r", "", "the-export")
    for node in ("r", "m"):
        error = refused(daemon, "block_resize", node_name=node, size=2 * SIZE)
        assert str(error).startswith(f"Permission conflict on node '{node}': permissions 'resize' are both required by")
    assert "unshared by export 'the-export'" in str(refused(daemon, "block_resize", node_name="r", size=2 * SIZE))
    with daemon.client() as client:
        assert client.size == SIZE
    remove(daemon, "the-export")
    for size in (2 * SIZE, 1000, 3 * SIZE):
        daemon.execute("block_resize", node_name="r", size=size)
        daemon.export("r", "", "again")
        with daemon.client() as client:
            assert client.size == size + -size % 512
            client.write(client.size - 100, b"z" * 100)
            assert client.read(client.size - 200, 200) == bytes(100) + b"z" * 100
        remove(daemon, "again")


def test_a_file_is_reopened_for_the_first_writer_under_traffic(tmp_path):
    path = tmp_path / "f.img"
    path.write_bytes(b"a" * SIZE)
    with DaemonThread() as daemon:
        daemon.execute(
            "blockdev-add",
            driver="raw",
            node_name="r",
            file={"driver": "file", "filename": str(path), "node-name": "f"},
            cache={"direct": True},
        )
        assert not daemon.daemon.graph.nodes["f"].storage.writable
        daemon.export("r", "ro", "ro", writable=False)
        stop, faults, reads = threading.Event(), [], []

        def read_on():
            try:
                with daemon.client("ro") as client:
                    for _ in range(32):
                        client.submit(Cmd.READ, 0, 65536)
                    while not stop.is_set():
                        result = client.wait_any()
                        assert (result.error, len(result.data)) == (0, 65536)
                        reads.append(1)
                        client.submit(Cmd.READ, 0, 65536)
            except BaseException as error:  # noqa: BLE001 - for the main thread
                faults.append(error)

        thread = threading.Thread(target=read_on)
        thread.start()
        for turn in range(20):
            daemon.export("r", "rw", "rw")
            with daemon.client("rw") as client:
                client.write(SIZE - 512, bytes([turn]) * 512)
            daemon.execute("block-export-del", id="rw", mode="hard")
            eventually(lambda: "rw" not in query(daemon))
        stop.set()
        thread.join()
        assert faults == []
        assert len(reads) > 20
        assert path.read_bytes() == b"a" * (SIZE - 512) + bytes([19]) * 512


# --- Iothreads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "direct", "buffered"])
def test_nodes_move_between_threads_under_traffic(kind, tmp_path):
    with DaemonThread() as daemon:
        if kind == "memory":
            daemon.execute("blockdev-add", driver="memory", node_name="f", size=SIZE, discard="unmap")
        else:
            path = tmp_path / "f.img"
            path.write_bytes(bytes(SIZE))
            cache = {"direct": kind == "direct"}
            daemon.execute("blockdev-add", driver="file", node_name="f", filename=str(path), cache=cache)
        daemon.execute("blockdev-add", driver="raw", node_name="r", file="f")
        for name in ("io1", "io2"):
            daemon.execute("object-add", qom_type="iothread", id=name)
        daemon.export("r")
        clients = [daemon.client(mode=mode) for mode in (Mode.EXTENDED, Mode.SIMPLE)]
        faults = []
        run = Run(clients, random.Random(7))
        stop = threading.Event()

        def traffic():
            try:
                while not stop.is_set():
                    run.go(50)
            except BaseException as error:  # noqa: BLE001 - for the main thread
                faults.append(error)

        thread = threading.Thread(target=traffic)
        thread.start()
        homes = set()
        for turn in range(12):
            name = f"e{turn}"
            daemon.export("r" if turn % 2 else "f", name, name, iothread=f"io{turn % 2 + 1}", writable=False)
            homes.add(id(daemon.daemon.graph.nodes["f"].services))
            error = refused(daemon, "object-del", id=f"io{turn % 2 + 1}")
            assert error.kind is ErrorKind.BUSY
            assert "node 'f'" in error.hint
            with daemon.client(name) as other:
                assert len(other.read(0, 100_000)) == 100_000
            time.sleep(0.03)
        stop.set()
        thread.join()
        assert faults == []
        assert len(homes) == 2
        for client in clients:
            client.close()
        for export_id in query(daemon):
            daemon.execute("block-export-del", id=export_id, mode="hard")
        eventually(lambda: query(daemon) == {})
        for services in {daemon.daemon.services, *(thing.services for thing in daemon.daemon.objects.values())}:
            eventually(lambda services=services: services.buffers.used == 0)
        daemon.execute("blockdev-del", node_name="r")
        daemon.execute("blockdev-del", node_name="f")
        for name in ("io1", "io2"):
            daemon.execute("object-del", id=name)
        assert str(refused(daemon, "object-del", id="io1")) == "object 'io1' not found"


def test_a_half_sent_write_survives_the_move(daemon):
    daemon.execute("object-add", qom_type="iothread", id="io1")
    daemon.export("m")
    payload = random.Random(3).randbytes(300_000)
    with daemon.client(mode=Mode.EXTENDED) as client:
        request = Request(0x20, Cmd.WRITE, 99, 1000, len(payload))
        client.expect(request)
        client.send(request.build(Mode.EXTENDED) + payload[:100_000])
        eventually(lambda: any(each.payload for each in daemon.daemon.exports.get("e").clients))
        daemon.export("m", "moved", "e2", iothread="io1")
        client.send(payload[100_000:])
        assert client.wait(99).error == 0
        assert client.read(1000, len(payload)) == payload


def test_a_fixed_thread_is_kept(daemon):
    for name in ("io1", "io2"):
        daemon.execute("object-add", qom_type="iothread", id=name)
    daemon.export("m", "a", "a", iothread="io1", fixed_iothread=True)
    home = daemon.daemon.graph.nodes["m"].services
    assert home is daemon.daemon.objects["io1"].services
    fixed = {"type": "nbd", "node_name": "m", "iothread": "io2"}
    error = refused(daemon, "block-export-add", id="b", name="b", fixed_iothread=True, **fixed)
    assert str(error) == "Cannot change iothread of active block backend"
    daemon.execute("block-export-add", id="c", name="c", **fixed)  # not fixed: it silently stays
    assert daemon.daemon.graph.nodes["m"].services is home
    with daemon.client("c") as client:
        assert client.read(0, 512) == bytes(512)


# --- Leaving nothing --------------------------------------------------------------------------------------------


def test_a_hundred_lives_leave_nothing_open(daemon):
    daemon.execute("object-add", qom_type="iothread", id="io1")

    def live():
        daemon.export("m", iothread="io1")
        with daemon.client() as client:
            client.write(0, b"x" * 100_000)
            client.submit(Cmd.READ, 0, SIZE)
            client.push()
            daemon.execute("block-export-del", id="e", mode="hard")
            try:
                client.wait_any()
            except ConnectionEnded:
                pass
        eventually(lambda: query(daemon) == {})

    live()
    before = count_files()
    for _ in range(30):
        live()
    eventually(lambda: count_files() == before)
    assert in_flight(daemon.daemon) == {}
    assert len(daemon.events) == 31


def test_who_comes_while_the_nodes_are_drained_waits_like_the_others(tmp_path):
    """Its write must not land in the middle of a snapshot."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="file", node_name="disk", filename=str(tmp_path / "disk"))
        daemon.export("disk", "disk", writable=True)

        async def drained() -> bytes:
            graph = daemon.daemon.graph
            async with graph.changing, graph.drained(graph.tree_of(graph.nodes["disk"])):
                clients.append(await asyncio.to_thread(daemon.client, "disk"))
                cookies.append(clients[0].submit(Cmd.WRITE, 0, 4096, payload=b"\1" * 4096))
                await asyncio.to_thread(clients[0].push)
                await asyncio.sleep(0.1)  # a write that is not held back has long been done by then
                return (tmp_path / "disk").read_bytes()[:4096]

        clients, cookies = [], []
        assert daemon.call(drained) == bytes(4096)
        with clients[0] as client:
            assert client.wait(cookies[0]).error == 0
        assert (tmp_path / "disk").read_bytes()[:4096] == b"\1" * 4096
