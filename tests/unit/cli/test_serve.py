"""The command line of `blkferry`: what is refused before anything happens, and what is said once all is up."""

import json
import shlex
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from blkferry.cli import serve as serving
from blkferry.cli.app import app
from blkferry.cli.guests import GuestDisk
from blkferry.cli.ready import Offer
from blkferry.cli.serve import default_names
from blkferry.errors import Error, ErrorKind
from blkferry.schema.sockets import SocketAddressFd, SocketAddressInet, SocketAddressUnix


def invoke(*argv):
    return CliRunner().invoke(app, argv, prog_name="blkferry")


@pytest.fixture
def asked(monkeypatch):
    """What `serve` would serve, and how it would say so."""
    requests = []
    monkeypatch.setattr(serving, "serve_images", lambda *asked: requests.append(asked))
    return requests


def test_help_has_examples():
    said = invoke("--help")
    assert said.exit_code == 0
    assert "blkferry serve disk.img" in said.output
    said = invoke("serve", "-h")
    assert said.exit_code == 0
    assert "blkferry serve -w --socket /tmp/nbd.sock disk.img" in said.output
    assert "\b" not in said.output


def test_version():
    said = invoke("--version")
    assert said.exit_code == 0
    assert said.output.startswith("blkferry 0.")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["srve", "a"], "Did you mean 'serve'?"),
        (["frobnicate"], "There is: doctor, image, mount, serve, umount."),
        (["serve"], "Missing argument 'IMAGE...'"),
        (["serve", "--scoket", "s", "a"], "--socket"),
        (["serve", "a", "-n", "x", "-n", "y"], "--name is given 2 times for 1 images"),
        (["serve", "a", "-p", "65536"], "65536 is not in the range"),
        (["serve", "a", "--max-connections", "-1"], "-1 is not in the range"),
        (["serve", "a", "--vhost-user", "s", "--vhost-user", "t"], "--vhost-user is given 2 times for 1 images"),
        (["serve", "a", "--vhost-user", "s", "--port", "1", "--tls", "."], "--port, --tls cannot go with --vhost-user"),
        (["serve", "a", "--vhost-user", "s", "-n", "x"], "--name cannot go with --vhost-user, which is instead of NBD"),
    ],
)
def test_wrong_use(argv, text, asked):
    said = invoke(*argv)
    assert said.exit_code == 2
    assert text in said.output
    assert not asked


def test_defaults(asked):
    assert invoke("serve", "a.img").exit_code == 0
    request, speech = asked[0]
    assert speech is serving.Speech.PROSE
    assert request.addresses() == [SocketAddressInet(host="127.0.0.1", port="10809")]
    assert (request.writable, request.discard, request.direct, request.image_format) == (False, True, False, None)


@pytest.mark.parametrize(
    ("argv", "passed", "address"),
    [
        ("", ["a"], SocketAddressFd(fd="a")),
        ("--fd 3", [], SocketAddressFd(fd="3")),
        ("--fd b", ["a", "b"], SocketAddressFd(fd="b")),
        ("--port 1", ["a"], SocketAddressInet(host="127.0.0.1", port="1")),
        ("--host ::1", ["a", "b"], SocketAddressInet(host="::1", port="10809")),
        ("--socket s", ["a"], SocketAddressUnix(path="s")),
    ],
)
def test_sockets_that_were_passed_are_the_default(asked, argv, passed, address):
    assert invoke("serve", *argv.split(), "a.img").exit_code == 0
    assert asked[0][0].addresses(passed) == [address]


def test_several_addresses(asked):
    argv = "--port 0 --socket s --host ::1 --host 127.0.0.1 --fd 5 --port 9 --socket t"
    assert invoke("serve", *argv.split(), "a.img").exit_code == 0
    paths = [SocketAddressUnix(path=path) for path in "st"]
    ports = [SocketAddressInet(host=host, port=port) for host in ("::1", "127.0.0.1") for port in "09"]
    assert asked[0][0].addresses(["passed"]) == [*paths, SocketAddressFd(fd="5"), *ports]


def test_sockets_of_several_names_are_not_guessed_at(asked):
    assert invoke("serve", "a.img").exit_code == 0
    with pytest.raises(Error, match="There are sockets of 2 names to listen on") as caught:
        asked[0][0].addresses(["a", "b"])
    assert caught.value.hint == "Choose with --fd: a, b."


def test_options_arrive(asked):
    argv = (
        "serve -w --json --direct --no-discard -f raw -n x -n y -s sock --description d --max-connections 3 --qmp q "
        "--bitmap b0 --bitmap b1 --allocation-depth a b"
    )
    assert invoke(*argv.split()).exit_code == 0
    request, speech = asked[0]
    assert speech is serving.Speech.JSON
    assert request.addresses() == [SocketAddressUnix(path="sock")]
    assert (request.images, request.names) == (("a", "b"), ("x", "y"))
    assert (request.writable, request.discard, request.direct, request.image_format) == (True, False, True, "raw")
    assert (request.description, request.max_connections, request.qmp) == ("d", 3, "q")
    assert (request.bitmaps, request.allocation_depth) == (("b0", "b1"), True)


def test_errors_are_sentences(monkeypatch):
    def refuse(*asked):
        raise Error(ErrorKind.NOT_FOUND, "It is not there", hint="Look elsewhere.")

    monkeypatch.setattr(serving, "serve_images", refuse)
    said = invoke("serve", "a")
    assert (said.exit_code, said.stderr) == (1, "blkferry: It is not there\nLook elsewhere.\n")


def test_names_are_those_of_the_files():
    assert default_names(("/x/a.img", "b", "memory:1G", "/dev/sdb")) == ("a.img", "b", "memory", "sdb")


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd+unix:///?socket=/tmp/s", "nbd"),
        ("nbd+unix:///a%20b?socket=/tmp/s", "a b"),
        ("nbd://host", "nbd"),
        ("nbd://host:1/dir/disk", "dir/disk"),
    ],
)
def test_the_export_of_a_uri_keeps_its_name(uri, name):
    assert default_names((uri,)) == (name,)


def test_a_uri_that_is_none_is_a_sentence():
    with pytest.raises(Error, match="'nbd://host:x/': "):
        default_names(("nbd://host:x/",))


@pytest.mark.parametrize(("writable", "may"), [(False, "may read these"), (True, "may read and write these")])
def test_the_warning_goes_by_what_the_exports_are(capsys, writable, may):
    address = SocketAddressInet(host="192.0.2.1", port="10809")
    serving._caution([Offer("a", "a", 512, False, (address,)), Offer("m", "memory:1M", 1 << 20, writable, (address,))])
    assert may in capsys.readouterr().err


def test_names_that_clash_are_refused():
    with pytest.raises(Error, match="2 images would be exported as 'a'") as caught:
        default_names(("x/a", "b", "y/a"))
    assert caught.value.hint == "Name them: --name for each of the 3 images, in their order."


def commands(offer):
    return {label: shlex.split(line) for label, line in offer.clients()}


def test_lines_to_paste_over_tcp():
    offer = Offer("a.img", "/x/a.img", 1 << 20, False, (SocketAddressInet(host="127.0.0.1", port="10809"),))
    assert offer.uris == ["nbd://127.0.0.1/a.img"]
    pasted = commands(offer)
    assert pasted["copy"] == ["nbdcopy", "nbd://127.0.0.1/a.img", "copy.img"]
    assert pasted["boot"][-1] == "file=nbd://127.0.0.1/a.img,format=raw,if=virtio,readonly=on"
    assert pasted["attach"] == ["sudo", "nbd-client", "127.0.0.1", "10809", "/dev/nbd0", "-N", "a.img"]


def test_lines_to_paste_survive_the_shell_and_qemu():
    offer = Offer("a b,c", "a b,c", 1 << 20, True, (SocketAddressUnix(path="/tmp/my sock"),))
    uri = "nbd+unix:///a%20b%2Cc?socket=/tmp/my%20sock"
    pasted = commands(offer)
    assert pasted["inspect"] == ["qemu-img", "info", uri]
    assert pasted["boot"][-1] == f"file={uri},format=raw,if=virtio"
    assert pasted["attach"] == ["sudo", "nbd-client", "-unix", "/tmp/my sock", "/dev/nbd0", "-N", "a b,c"]


def test_lines_to_paste_for_virtual_machines():
    disk = GuestDisk("a.img", 1 << 20, True, "/run/a,b & 'c'.sock")
    lines = list(disk.clients())
    assert [label for label, _ in lines] == ["qemu", "libvirt", "", "cloud", "fire"]
    qemu, memory, xml, cloud, fire = (line for _, line in lines)
    assert "socket,id=disk,path=/run/a,,b & 'c'.sock,reconnect-ms=1000" in shlex.split(qemu)
    assert ET.fromstring(memory).find("access").get("mode") == "shared"
    assert ET.fromstring(xml).find("source").get("path") == disk.path
    assert shlex.split(cloud)[-1] == f"vhost_user=on,socket={disk.path}"
    assert json.loads(shlex.split(fire)[-1])["socket"] == disk.path
