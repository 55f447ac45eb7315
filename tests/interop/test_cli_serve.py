"""`blkferry serve` as a process: ready line, clients, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import time

import pytest
from cli_process import finish, running, wait_for

import pki
from blkferry.testing.nbd import Client, ConnectionEnded
from blkferry.wire.nbd.constants import Cmd, Mode
from peers import requires, run

MIB = 1 << 20


def serve(*argv, cwd=None):
    return running("blkferry", "serve", *argv, cwd=cwd)


def test_serves_until_sigterm_and_leaves_nothing(image, sockets):
    disk = image(4 * MIB)
    path = sockets / "nbd"
    with serve("--socket", path, disk.path) as server:
        assert server.line() == f"{disk.path}: 4 MiB, read-only, at\n"
        with Client.connect(str(path), "disk.raw") as client:
            assert client.read(0, 4096) == disk.expect(0, 4096)
            with pytest.raises(PermissionError):
                client.write(0, bytes(512))
        assert server.line() == f"  nbd+unix:///disk.raw?socket={path}\n"
        code, _, complaints = server.end()
    assert (code, complaints) == (0, "")
    assert os.listdir(sockets) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_ends_it_ends_it_well(image, sockets, number):
    with serve("-q", "-s", sockets / "nbd", image().path) as server:
        server.line()
        assert server.end(number) == (0, "", "")
    assert os.listdir(sockets) == []


def test_json_names_the_port_that_was_found(image):
    disk = image(MIB)
    with serve("--json", "--port", "0", "-n", "x y", disk.path) as server:
        ready = json.loads(server.line())
        assert ready["pid"] == server.pid
        (export,) = ready["exports"]
        assert (export["name"], export["image"], export["size"], export["writable"]) == (
            "x y",
            str(disk.path),
            MIB,
            False,
        )
        (uri,) = export["uris"]
        port = int(uri.removeprefix("nbd://127.0.0.1:").removesuffix("/x%20y"))
        with Client.connect(("127.0.0.1", port), "x y") as client:
            assert client.read(MIB - 512, 512) == disk.expect(MIB - 512, 512)
        assert server.end() == (0, "", "")


def test_what_was_written_is_in_the_image(image, sockets):
    disk = image(MIB, [])
    with serve("-w", "-q", "-s", sockets / "nbd", disk.path) as server:
        server.line()
        with Client.connect(str(sockets / "nbd"), "disk.raw") as client:
            client.write(4096, b"x" * 4096)
            client.trim(0, 4096)
        assert server.end()[0] == 0
    assert disk.path.read_bytes()[4096:8192] == b"x" * 4096


def test_memory_disks_and_several_images(image, sockets):
    disk = image(MIB)
    with serve("-q", "-s", "nbd", disk.path, "memory:64k", cwd=sockets) as server:
        assert [server.line(), server.line()] == [
            f"nbd+unix:///{name}?socket={sockets}/nbd\n" for name in ("disk.raw", "memory")
        ]
        with Client.connect(str(sockets / "nbd"), "memory") as client:
            client.write(0, b"scratch")
            assert (client.size, client.read(0, 8)) == (64 << 10, b"scratch\0")
        with Client.connect(str(sockets / "nbd"), "disk.raw") as client:
            assert client.read(0, 512) == disk.expect(0, 512)
        assert server.end() == (0, "", "")


def test_a_second_signal_cuts_off_who_does_not_read(image, sockets):
    disk = image(64 * MIB, [])
    with serve("-q", "-s", sockets / "nbd", disk.path) as server:
        server.line()
        with Client.connect(str(sockets / "nbd"), "disk.raw", mode=Mode.SIMPLE) as client:
            for offset in range(0, 64 * MIB, 16 * MIB):
                client.submit(Cmd.READ, offset, 16 * MIB)
            client.push()
            # The first answer has begun, and does not fit into the socket: the daemon waits for us to take it.
            wait_for(lambda: readable(client.sock))
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: refuses(sockets / "nbd"))
            assert server.process.poll() is None
            assert server.end() == (0, "", "")
            assert time.monotonic() - begun < 4  # patience would have been 5 seconds
            with pytest.raises(ConnectionEnded):
                client.read(0, 512)
    assert os.listdir(sockets) == []


def readable(sock):
    try:
        return sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


def refuses(path):
    """Whether the daemon no longer takes clients: the greeting stays out."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.2)
        try:
            sock.connect(str(path))
            return not sock.recv(8)
        except (TimeoutError, ConnectionError, FileNotFoundError):
            return True


def test_a_client_gets_its_answers_before_the_end(image, sockets):
    disk = image(64 * MIB)
    with serve("-q", "-s", sockets / "nbd", disk.path) as server:
        server.line()
        with Client.connect(str(sockets / "nbd"), "disk.raw") as client:
            cookies = [client.submit(Cmd.READ, offset, 8 * MIB) for offset in range(0, 64 * MIB, 8 * MIB)]
            client.push()
            wait_for(lambda: readable(client.sock))
            server.process.send_signal(signal.SIGTERM)
            first = client.wait(cookies[0])
            assert first.data == disk.expect(0, 8 * MIB)
        assert server.end()[0] == 0


def test_qmp_while_it_serves(image, sockets):
    with serve("-q", "-s", sockets / "nbd", "--qmp", sockets / "qmp", image().path) as server:
        server.line()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(sockets / "qmp"))
            with sock.makefile("rw") as qmp:
                assert "QMP" in json.loads(qmp.readline())
                answers = []
                for command in ("qmp_capabilities", "query-block-exports", "quit"):
                    qmp.write(json.dumps({"execute": command}))
                    qmp.flush()
                    answers.append(json.loads(qmp.readline())["return"])
        assert [export["id"] for export in answers[1]] == ["disk0"]
        assert server.process.wait(10) == 0
    assert os.listdir(sockets) == []


def qcow2(path):
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(1 << 16))


@pytest.mark.parametrize(
    ("make", "argv", "texts"),
    [
        (None, [], ["Could not open 'disk'", "No such file"]),
        (lambda path: path.mkdir(), [], ["'disk' is a directory"]),
        (lambda path: path.touch(), [], ["'disk' is empty", "truncate -s 1G disk"]),
        (os.mkfifo, [], ["neither a regular file nor a block device"]),
        (lambda path: path.write_bytes(b"QED\0" + bytes(508)), [], ["qed image", "--format raw"]),
        (lambda path: path.touch(), ["-f", "vmdk"], ["Unknown file format 'vmdk'", "qcow2, raw"]),
        (qcow2, [], ["Could not open 'disk': Unsupported cluster size"]),
        (lambda path: path.write_bytes(bytes(512)), ["--qmp", "nowhere/qmp"], ["nowhere/qmp"]),
        (lambda path: path.write_bytes(bytes(512)), ["-n", "x" * 4097], ["too long"]),
    ],
)
def test_what_cannot_be_served_is_a_sentence(make, argv, texts, sockets):
    if make is not None:
        make(sockets / "disk")
    said = finish("blkferry", "serve", "-s", "nbd", *argv, "disk", cwd=sockets)
    assert (said.returncode, said.stdout) == (1, "")
    for text in texts:
        assert text in said.stderr
    assert said.stderr.startswith("blkferry: ")
    assert "Traceback" not in said.stderr
    assert os.listdir(sockets) == (["disk"] if make is not None else [])


def test_the_bytes_of_a_container_when_asked_for(sockets):
    qcow2(sockets / "disk")
    with serve("-q", "-s", "nbd", "-f", "raw", "disk", cwd=sockets) as server:
        server.line()
        with Client.connect(str(sockets / "nbd"), "disk") as client:
            assert client.read(0, 4) == b"QFI\xfb"
        assert server.end()[0] == 0


@requires("qemu-io")
def test_one_disk_at_several_addresses(image, sockets):
    addresses = ["-s", sockets / "one", "-s", sockets / "two", "--host", "127.0.0.1", "--host", "127.0.0.2"]
    with serve("-w", "--json", *addresses, "--port", "0", image(MIB).path) as server:
        (export,) = json.loads(server.line())["exports"]
        unix, tcp = export["uris"][:2], export["uris"][2:]
        assert unix == [f"nbd+unix:///disk.raw?socket={sockets}/{name}" for name in ("one", "two")]
        assert [uri.rpartition(":")[0] for uri in tcp] == ["nbd://127.0.0.1", "nbd://127.0.0.2"]
        for number, uri in enumerate(export["uris"]):
            run("qemu-io", "-f", "raw", "-c", f"write -P {number + 1} {number}k 1k", uri)
        for uri in export["uris"]:
            reads = [part for number in range(4) for part in ("-c", f"read -P {number + 1} {number}k 1k")]
            assert "failed" not in run("qemu-io", "-f", "raw", "-r", *reads, uri).stdout
        assert server.end() == (0, "", "")
    assert os.listdir(sockets) == []


def test_one_address_that_is_taken_leaves_none_behind(image, sockets):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = finish("blkferry", "serve", "-s", sockets / "nbd", "--port", port, image().path)
    assert said.stderr.startswith(f"blkferry: Port {port} of 127.0.0.1 is taken\n")
    assert os.listdir(sockets) == []


def test_a_taken_port_names_the_remedy(image):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = finish("blkferry", "serve", "--port", str(port), image().path)
    assert said.returncode == 1
    assert said.stderr.startswith(f"blkferry: Port {port} of 127.0.0.1 is taken\n")
    assert "--port 0" in said.stderr


def test_an_image_in_use_names_its_user(image, sockets):
    disk = image()
    with serve("-w", "-q", "-s", sockets / "one", disk.path) as server:
        server.line()
        said = finish("blkferry", "serve", "-w", "-s", sockets / "two", disk.path)
        assert said.returncode == 1
        assert f"(pid {server.pid})" in said.stderr
        assert str(disk.path) in said.stderr
        assert os.listdir(sockets) == ["one"]
        assert server.end()[0] == 0


def test_a_socket_in_use_is_left_alone(image, sockets):
    with serve("-q", "-s", sockets / "nbd", image().path) as server:
        server.line()
        said = finish("blkferry", "serve", "-s", sockets / "nbd", "memory:1M")
        assert said.returncode == 1
        assert "another process listens there" in said.stderr
        with Client.connect(str(sockets / "nbd"), "disk.raw"):
            pass
        assert server.end()[0] == 0


def test_a_reader_that_leaves_does_not_end_it(image, sockets):
    with serve("-s", sockets / "nbd", image().path) as server:
        server.process.stdout.close()
        wait_for((sockets / "nbd").exists)
        with Client.connect(str(sockets / "nbd"), "disk.raw") as client:
            assert client.size == MIB
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0


def test_on_a_terminal_it_has_colours_and_says_goodbye(image, sockets):
    disk = image()
    pid, terminal = pty.fork()
    if pid == 0:
        from cli_process import program

        os.environ["TERM"] = "xterm"
        os.environ.pop("NO_COLOR", None)
        os.execv(program("blkferry"), ["blkferry", "serve", "-s", str(sockets / "nbd"), str(disk.path)])
    said = b""
    with open(terminal, "r+b", buffering=0) as screen:
        while b"Ctrl-C ends it." not in said:
            said += screen.read(4096)
        screen.write(b"\x03")
        try:
            while chunk := screen.read(4096):
                said += chunk
        except OSError:
            pass  # the terminal of a process that has ended
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"\x1b[" in said
    assert f"nbd+unix:///disk.raw?socket={sockets}/nbd\x1b".encode() in said  # in one piece, to be pasted
    assert b"Stopped" in said
    assert os.listdir(sockets) == []


@requires("nbdinfo", "nbdcopy", "qemu-img")
def test_the_lines_to_paste_work(image, sockets, tmp_path):
    disk = image(4 * MIB, name="my disk,1.raw")
    with serve("-s", sockets / "nbd", "--description", "a test", disk.path) as server:
        server.line()
        uri = server.line().strip()
        information = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
        assert (information["export-name"], information["description"]) == ("my disk,1.raw", "a test")
        run("nbdcopy", uri, tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == disk.path.read_bytes()
        assert json.loads(run("qemu-img", "info", "--output=json", uri).stdout)["virtual-size"] == 4 * MIB
        assert server.end()[0] == 0


def test_tls_from_a_directory(image, sockets, tmp_path):
    """Certificates or keys, whichever are there; who is allowed; and what is said when something is missing."""
    disk = image(MIB)
    directory, ca = pki.complete(tmp_path / "pki")
    other = pki.issue("other", ca, pki.NO_CA, (pki.purposes("client"), True))
    pki.write(tmp_path / "other", ca, client=other)
    with serve("--json", "--port", "0", "--tls", directory, "--allow", "CN=client1", disk.path) as server:
        (uri,) = json.loads(server.line())["exports"][0]["uris"]
        assert uri.startswith("nbds://127.0.0.1:")
        uri = uri.replace("127.0.0.1", "localhost")
        run("nbdcopy", f"{uri}?tls-certificates={directory}", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == disk.expect(0, MIB)
        run("nbdinfo", f"{uri}?tls-certificates={tmp_path / 'other'}", expect=1)
        assert server.end()[0] == 0
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "keys.psk").write_text(f"me:{'7e' * 32}\n")
    with serve("-q", "--port", "0", "--tls", keys, disk.path) as server:
        uri = server.line().strip().replace("nbds://127.0.0.1", "nbds://me@localhost")
        run("nbdinfo", f"{uri}?tls-psk-file={keys / 'keys.psk'}")
    for argv, text in (
        (("--tls", sockets, disk.path), "has neither server-cert.pem nor keys.psk"),
        (("--allow", "CN=x", disk.path), "--allow needs --tls"),
        (("--tls", keys, "--allow", "CN=x", disk.path), "tls-authz needs clients with certificates"),
    ):
        done = finish("blkferry", "serve", "--port", "0", *argv)
        assert (done.returncode, done.stdout) == (1, "")
        assert text in done.stderr


@requires("nbdinfo", "qemu-img", "qemu-io")
def test_clients_see_bitmaps_and_backing_files(sockets, tmp_path):
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", base, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", base)
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", disk, "1M")
    run("qemu-img", "bitmap", "--add", disk, "since-monday")
    run("qemu-io", "-f", "qcow2", "-c", "write 128k 64k", disk)
    with serve("-q", "-s", sockets / "nbd", "--bitmap", "since-monday", "--allocation-depth", disk) as server:
        uri = server.line().strip()

        def seen(context):
            answer = json.loads(run("nbdinfo", f"--map={context}", "--json", uri).stdout)
            return [(each["offset"] >> 16, each["length"] >> 16, each["type"]) for each in answer]

        assert seen("qemu:dirty-bitmap:since-monday") == [(0, 2, 0), (2, 1, 1), (3, 13, 0)]
        assert seen("qemu:allocation-depth") == [(0, 1, 2), (1, 1, 0), (2, 1, 1), (3, 13, 0)]
        assert server.end()[0] == 0
    refused = finish("blkferry", "serve", "-s", sockets / "nbd", "--bitmap", "since-tuesday", disk)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Bitmap 'since-tuesday' is not found" in refused.stderr
