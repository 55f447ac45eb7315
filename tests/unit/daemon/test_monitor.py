import asyncio
import errno
import json
import logging
import os
import pty
import socket
import struct

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blkferry.daemon import chardev as chardev_module
from blkferry.daemon import monitor as monitor_module
from blkferry.daemon.channel import READ_AHEAD, Channel
from blkferry.daemon.chardev import ConnectingChardev, NullChardev, SocketChardev, StdioChardev, make
from blkferry.daemon.monitor import MAX_UNSENT_EVENTS, Monitor
from blkferry.errors import Error, ErrorKind
from blkferry.schema.char import ChardevNull, ChardevSocket, ChardevStdio
from blkferry.schema.sockets import SocketAddressInet, SocketAddressUnix

BIG = "x" * 500_000
PATIENCE_S = 10


class Toy:
    """Commands that show what the monitor does with them."""

    version = (10, 0, 2)
    package = "toy"

    def __init__(self):
        self.started = []
        self.finished = []
        self.subscribers = []
        self.gate = asyncio.Event()
        self.quitting = asyncio.Event()

    def subscribe(self, callback):
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback)

    def emit(self, name, data):
        for callback in list(self.subscribers):
            callback(name, data)

    async def execute(self, name, arguments):
        self.started.append(name)
        match name:
            case "echo":
                result = arguments
            case "wait":
                await self.gate.wait()
                result = {}
            case "big":
                result = BIG
            case "emit":
                self.emit("FIRST", {"n": 1})
                await asyncio.sleep(0)
                self.emit("SECOND", {"n": 2})
                result = {}
            case "quit":
                self.quitting.set()
                await asyncio.sleep(0.02)  # the daemon begins to stop before the reply is out
                result = {}
            case "bug":
                raise RuntimeError(name)
            case "object":
                result = object()
            case "refuse":
                raise Error(ErrorKind.NOT_FOUND, "Job not found", hint="query-jobs lists them")
            case _:
                raise Error(ErrorKind.UNKNOWN_COMMAND, f"The command {name} has not been found")
        self.finished.append(name)
        return result


class Client:
    """A socket and no cleverness."""

    @classmethod
    async def connect(cls, path, *, negotiate=True):
        self = cls()
        self.reader, self.writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        if negotiate:
            assert "QMP" in await self.read()
            assert await self.ask("qmp_capabilities") == {"return": {}}
        return self

    def send(self, *names):
        self.writer.write(b"".join(json.dumps({"execute": name}).encode() for name in names))

    async def read(self):
        line = await asyncio.wait_for(self.reader.readline(), PATIENCE_S)
        return json.loads(line) if line else None

    async def ask(self, name):
        self.send(name)
        return await self.read()

    async def close(self):
        self.writer.close()
        await self.writer.wait_closed()


@pytest.fixture
async def toy():
    return Toy()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "qmp")


@pytest.fixture
async def monitor(toy, path):
    monitor = Monitor(SocketChardev("c", SocketAddressUnix(path=path)), toy, clock_ns=lambda: 5_000_006_000)
    await monitor.start()
    yield monitor
    toy.gate.set()
    await monitor.stop()
    assert toy.subscribers == []


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the conditions know nothing of being awaited
            await asyncio.sleep(0.005)


# -- with a client that nobody here wrote


async def test_the_public_client(monitor, toy, path):
    client = QMPClient("test")
    await client.connect(path)
    assert client.greeting.QMP.version == {
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": "toy",
    }
    assert await client.execute("echo", {"a": ["\u00e9", 2**64 - 1]}) == {"a": ["\u00e9", 2**64 - 1]}
    with pytest.raises(ExecuteError, match="Job not found") as caught:
        await client.execute("refuse")
    assert caught.value.error_class == "GenericError"
    with pytest.raises(ExecuteError) as caught:
        await client.execute("nope")
    assert caught.value.error_class == "CommandNotFound"
    assert len(await client.execute("big")) == len(BIG)
    with client.listener() as events:
        await client.execute("emit")
        first, second = await events.get(), await events.get()
    assert (first["event"], first["data"], second["event"]) == ("FIRST", {"n": 1}, "SECOND")
    assert first["timestamp"] == {"seconds": 5, "microseconds": 6}
    await client.disconnect()


async def test_the_public_client_over_tcp(toy):
    chardev = SocketChardev("c", SocketAddressInet(host="127.0.0.1", port="0"))
    monitor = Monitor(chardev, toy)
    await monitor.start()
    (address,) = chardev.addresses
    client = QMPClient("test")
    await client.connect(("127.0.0.1", int(address.port)))
    assert await client.execute("echo") == {}
    assert chardev.filename == f"tcp:127.0.0.1:{address.port},server=on"
    await client.disconnect()
    await monitor.stop()


# -- the conversation


async def test_events_precede_the_reply_of_the_command_that_caused_them(monitor, path):
    client = await Client.connect(path)
    client.send("emit")
    assert [(await client.read()).get("event") for _ in range(3)] == ["FIRST", "SECOND", None]
    await client.close()


async def test_commands_run_in_order_one_by_one(monitor, toy, path):
    client = await Client.connect(path)
    client.send("wait", "echo", "nope", "echo")
    await until(lambda: toy.started == ["wait"])
    await asyncio.sleep(0.02)
    assert toy.started == ["wait"]
    toy.gate.set()
    assert [next(iter(await client.read())) for _ in range(4)] == ["return", "return", "error", "return"]
    await client.close()


async def test_bad_input_does_not_end_the_conversation(monitor, path):
    client = await Client.connect(path)
    client.writer.write(b"rubbish\n\xff{]")
    for _ in range(3):
        assert (await client.read())["error"]["desc"].startswith("JSON parse error, ")
    assert await client.ask("echo") == {"return": {}}
    await client.close()


@pytest.mark.parametrize("command", ["bug", "object"])
async def test_a_fault_of_ours_is_told_and_logged(monitor, path, caplog, command):
    client = await Client.connect(path)
    desc = f"Internal error in command '{command}', the daemon's log has the details"
    assert await client.ask(command) == {"error": {"class": "GenericError", "desc": desc}}
    assert caplog.records[-1].exc_info
    assert await client.ask("echo") == {"return": {}}
    await client.close()


async def test_pretty(toy, path):
    monitor = Monitor(SocketChardev("c", SocketAddressUnix(path=path)), toy, pretty=True)
    await monitor.start()
    reader, writer = await asyncio.open_unix_connection(path)
    assert (await reader.readuntil(b"}\r\n")).startswith(b'{\n    "QMP": {\n        "version"')
    writer.close()
    await monitor.stop()


# -- who is served when


async def test_one_client_at_a_time(monitor, path):
    first = await Client.connect(path)
    second = await Client.connect(path, negotiate=False)
    greeting = asyncio.create_task(second.read())
    assert await first.ask("echo") == {"return": {}}
    await asyncio.sleep(0.02)
    assert not greeting.done()
    await first.close()
    assert "QMP" in await greeting
    assert (await second.ask("echo"))["error"]["class"] == "CommandNotFound"
    assert await second.ask("qmp_capabilities") == {"return": {}}
    await second.close()


async def test_each_monitor_gets_events_once_it_has_negotiated(monitor, toy, tmp_path, path):
    other_path = str(tmp_path / "other")
    other = Monitor(SocketChardev("d", SocketAddressUnix(path=other_path)), toy)
    await other.start()
    clients = [await Client.connect(path), await Client.connect(other_path, negotiate=False)]
    assert "QMP" in await clients[1].read()
    toy.emit("EARLY", {})
    await clients[1].ask("qmp_capabilities")
    toy.emit("LATE", {})
    assert (await clients[0].read())["event"] == "EARLY"
    assert (await clients[0].read())["event"] == "LATE"
    assert (await clients[1].read())["event"] == "LATE"
    for client in clients:
        await client.close()
    await other.stop()


async def test_a_client_that_goes_while_its_command_runs(monitor, toy, path):
    first = await Client.connect(path)
    first.send("wait")
    await until(lambda: toy.started == ["wait"])
    await first.close()
    second = await Client.connect(path)
    assert await second.ask("echo") == {"return": {}}
    assert toy.finished == ["echo"]
    toy.gate.set()
    await until(lambda: toy.finished == ["echo", "wait"])
    await until(lambda: len(toy.subscribers) == 1)
    assert await second.ask("echo") == {"return": {}}
    await second.close()


async def test_a_client_that_only_stops_talking_gets_its_replies(monitor, path):
    client = await Client.connect(path)
    client.send("echo", "big", "echo")
    client.writer.write_eof()
    assert [await client.read() for _ in range(4)] == [{"return": {}}, {"return": BIG}, {"return": {}}, None]
    await client.close()


async def test_conversations_with_the_departed_are_few(monitor, toy, path, monkeypatch):
    monkeypatch.setattr(monitor_module, "MAX_CONVERSATIONS", 2)
    for count in (1, 2):
        client = await Client.connect(path)
        client.send("wait")
        await until(lambda count=count: len(toy.started) == count)
        await client.close()
    third = await Client.connect(path, negotiate=False)
    greeting = asyncio.create_task(third.read())
    await asyncio.sleep(0.05)
    assert not greeting.done()
    toy.gate.set()
    assert "QMP" in await greeting
    await third.close()


# -- clients that do not read


async def test_replies_wait_for_their_reader(monitor, toy, path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    commands = 50
    sock.sendall(b'{"execute": "qmp_capabilities"}' + b'{"execute": "big"}' * commands)
    await until(lambda: toy.started)
    await asyncio.sleep(0.1)
    assert len(toy.finished) <= 3
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 24)
    for _ in range(2 + commands):
        assert await asyncio.wait_for(reader.readline(), PATIENCE_S)
    assert len(toy.finished) == commands
    writer.close()


async def test_a_client_that_does_not_read_events_is_dropped(monitor, toy, path, caplog):
    idle = await Client.connect(path)
    idle.reader._transport.pause_reading()
    sent = 0
    while "does not read its events" not in caplog.text:
        toy.emit("FLOOD", {"text": "y" * 1000})
        sent += 1000
        assert sent < 5 * MAX_UNSENT_EVENTS
    assert sent > MAX_UNSENT_EVENTS
    client = await Client.connect(path)
    assert await client.ask("echo") == {"return": {}}
    await client.close()
    await idle.close()


async def test_a_burst_of_events_after_a_large_reply_drops_nobody(monitor, toy, path):
    client = await Client.connect(path)
    client.reader._transport.pause_reading()
    client.send("big")
    await until(lambda: toy.finished)
    for _ in range(100):
        toy.emit("BURST", {"text": "y" * 1000})
    client.reader._transport.resume_reading()
    lines = [await client.read() for _ in range(101)]
    assert lines[0] == {"return": BIG}
    assert all(line["event"] == "BURST" for line in lines[1:])
    await client.close()


async def test_a_reset_connection(toy):
    chardev = SocketChardev("c", SocketAddressInet(host="127.0.0.1", port="0"))
    monitor = Monitor(chardev, toy)
    await monitor.start()
    port = int(chardev.addresses[0].port)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b'{"execute": "qmp_capabilities"}{"execute": "wait"}')
        await until(lambda: toy.started)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    toy.gate.set()
    await until(lambda: toy.finished == ["wait"] and not toy.subscribers)
    await monitor.stop()


# -- the end


async def test_quit_replies_before_the_connection_closes(monitor, toy, path):
    client = await Client.connect(path)
    client.send("quit", "echo")
    await toy.quitting.wait()
    await monitor.stop()
    assert await client.read() == {"return": {}}
    assert await client.read() is None
    assert toy.finished == ["quit"]
    assert not os.path.exists(path)
    await client.close()


async def test_stop_does_not_wait_for_ever(monitor, toy, path, monkeypatch):
    monkeypatch.setattr(monitor_module, "COMMAND_GRACE_S", 0.05)
    monkeypatch.setattr(monitor_module, "FLUSH_GRACE_S", 0.05)
    client = await Client.connect(path)
    client.send("wait")
    await until(lambda: toy.started)
    await asyncio.wait_for(monitor.stop(), PATIENCE_S)
    assert await client.read() is None
    await client.close()


async def test_stop_with_a_client_that_does_not_read(monitor, toy, path, monkeypatch):
    monkeypatch.setattr(monitor_module, "FLUSH_GRACE_S", 0.05)
    client = await Client.connect(path)
    client.reader._transport.pause_reading()
    client.send("big")
    await until(lambda: toy.finished)
    await asyncio.wait_for(monitor.stop(), PATIENCE_S)
    assert toy.subscribers == []
    await client.close()


async def test_stop_before_start_and_twice(toy, path):
    monitor = Monitor(SocketChardev("c", SocketAddressUnix(path=path)), toy)
    await monitor.stop()
    await monitor.start()
    assert os.path.exists(path)
    await monitor.stop()
    await monitor.stop()
    assert not os.path.exists(path)


# -- chardevs


async def test_a_chardev_has_one_user(monitor, toy):
    with pytest.raises(Error, match="Device 'c' is in use") as caught:
        await Monitor(monitor._chardev, toy).start()
    assert caught.value.kind is ErrorKind.BUSY


async def test_a_chardev_is_free_again_after_its_monitor_failed_or_stopped(toy, tmp_path):
    chardev = SocketChardev("c", SocketAddressUnix(path=str(tmp_path / "no" / "s")))
    monitor = Monitor(chardev, toy)
    with pytest.raises(Error, match="No such file"):
        await monitor.start()
    (tmp_path / "no").mkdir()
    await monitor.start()
    await monitor.stop()
    assert not chardev.claimed


async def test_a_monitor_that_fails_says_so(toy, caplog):
    class Broken(NullChardev):
        async def accept(self):
            raise RuntimeError("broken")

    monitor = Monitor(Broken("c"), toy)
    await monitor.start()
    await until(lambda: "monitor on c failed" in caplog.text)
    await monitor.stop()


async def test_filenames(monitor, path):
    chardev = monitor._chardev
    assert chardev.filename == f"disconnected:unix:{path},server=on"
    client = await Client.connect(path)
    assert chardev.filename == f"unix:{path},server=on"
    await client.close()


async def test_accepting_goes_on_after_a_failure(monitor, path, monkeypatch, caplog):
    accept = chardev_module._accept
    failures = [OSError(errno.EMFILE, "Too many open files")]

    def accept_unluckily(sock):
        if failures:
            raise failures.pop()
        return accept(sock)

    monkeypatch.setattr(chardev_module, "_accept", accept_unluckily)
    monkeypatch.setattr(chardev_module, "ACCEPT_PAUSE_S", 0.01)
    client = await Client.connect(path)
    assert "Too many open files" in caplog.text
    await client.close()


async def test_make():
    address = SocketAddressUnix(path="/s")
    assert isinstance(make("c", ChardevSocket(addr=address)), SocketChardev)
    assert isinstance(make("c", ChardevStdio()), StdioChardev)
    assert isinstance(make("c", ChardevNull()), NullChardev)
    assert isinstance(make("c", ChardevSocket(addr=address, server=False)), ConnectingChardev)
    with pytest.raises(Error, match="'wait' option is incompatible with socket in client connect mode"):
        make("c", ChardevSocket(addr=address, server=False, wait=True))


async def test_a_monitor_that_connects(toy, path):
    chardev = ConnectingChardev("c", SocketAddressUnix(path=path))
    monitor = Monitor(chardev, toy)
    with pytest.raises(Error, match=f"Failed to connect to '{path}': No such file or directory"):
        await monitor.start()
    assert chardev.filename == f"disconnected:unix:{path}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        await monitor.start()
        assert chardev.filename == f"unix:{path}"
        peer, _ = server.accept()
        client = Client()
        client.reader, client.writer = await asyncio.open_connection(sock=peer)
        assert "QMP" in await client.read()
        assert await client.ask("qmp_capabilities") == {"return": {}}
        assert chardev.filename == f"unix:{path}"
        await client.close()
        await until(lambda: chardev.filename == f"disconnected:unix:{path}")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    await monitor.stop()


async def test_a_chardev_that_connects_hangs_up_when_it_stops(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        chardev = ConnectingChardev("c", SocketAddressUnix(path=path))
        await chardev.start()
        await chardev.start()
        peer, _ = server.accept()
        with peer:
            chardev.stop()
            chardev.stop()
            assert peer.recv(1) == b""
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


async def test_nobody_comes_to_a_null_chardev(toy):
    monitor = Monitor(NullChardev("c"), toy)
    await monitor.start()
    await asyncio.sleep(0.01)
    await monitor.stop()


@pytest.fixture
def stdio(monkeypatch):
    """Let two other descriptors be standard input and output."""

    def replace(stdin: int, stdout: int) -> None:
        monkeypatch.setattr(chardev_module, "STDIN", stdin)
        monkeypatch.setattr(chardev_module, "STDOUT", stdout)

    return replace


COMMANDS = b'{"execute": "qmp_capabilities"}\n{"execute": "echo", "id": 1}\n'


def check_output(output: bytes) -> None:
    greeting, negotiated, echoed = map(json.loads, output.splitlines())
    assert "QMP" in greeting
    assert negotiated == {"return": {}}
    assert echoed == {"return": {}, "id": 1}


async def test_stdio_on_pipes(toy, stdio):
    our_stdin, their_stdout = os.pipe()
    their_stdin, our_stdout = os.pipe()
    stdio(our_stdin, our_stdout)
    monitor = Monitor(StdioChardev("c"), toy)
    await monitor.start()
    os.write(their_stdout, COMMANDS)
    await until(lambda: toy.finished)
    os.close(their_stdout)
    await until(lambda: not toy.subscribers)
    check_output(os.read(their_stdin, 1 << 16))
    assert os.get_blocking(our_stdin)
    assert os.get_blocking(our_stdout)
    await monitor.stop()
    for fd in (our_stdin, our_stdout, their_stdin):
        os.close(fd)


async def test_stdio_on_files(toy, stdio, tmp_path):
    (tmp_path / "in").write_bytes(COMMANDS + b" " * 300_000)
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "wb") as stdout:
        stdio(stdin.fileno(), stdout.fileno())
        monitor = Monitor(StdioChardev("c"), toy)
        await monitor.start()
        await until(lambda: toy.finished and not toy.subscribers)
        await monitor.stop()
    check_output((tmp_path / "out").read_bytes())


async def test_stdio_on_dev_null(toy, stdio):
    with open(os.devnull, "r+b", buffering=0) as null:
        stdio(null.fileno(), null.fileno())
        monitor = Monitor(StdioChardev("c"), toy)
        await monitor.start()
        await asyncio.sleep(0.02)
        assert toy.subscribers == []
        await monitor.stop()


async def test_stdio_on_a_terminal(toy, stdio):
    ours, theirs = pty.openpty()
    stdio(theirs, theirs)
    monitor = Monitor(StdioChardev("c"), toy)
    await monitor.start()
    os.write(ours, COMMANDS)
    await until(lambda: toy.finished)
    await monitor.stop()
    assert b'"id": 1}' in os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)


async def test_stdio_that_is_closed(toy, stdio):
    stdio(999_999, 999_999)
    with pytest.raises(Error, match="Standard input or output is closed"):
        await Monitor(StdioChardev("c"), toy).start()


async def test_a_channel_reads_only_a_little_ahead():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        channel = Channel(ours.fileno(), ours.fileno(), lambda: None)
        sent = 0
        for _ in range(200):
            try:
                sent += theirs.send(b"x" * 65536)
            except BlockingIOError:
                pass
            await asyncio.sleep(0)
        assert len(channel._inbox) <= 2 * READ_AHEAD
        theirs.shutdown(socket.SHUT_WR)
        received = 0
        while data := await channel.receive():
            received += len(data)
        assert received == sent
        assert channel.ended.is_set()
        assert not channel.lost
        channel.close()
        channel.send(b"into the void")
        assert channel.unsent == 0


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.DEBUG, logger="blkferry")
