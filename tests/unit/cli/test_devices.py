"""`blkferry serve --vduse`: what it takes, what is refused, and what is said."""

from __future__ import annotations

import shlex

import pytest
from click.testing import CliRunner

from blkferry.cli import devices
from blkferry.cli import serve as serving
from blkferry.cli.app import app
from blkferry.cli.devices import Device
from blkferry.errors import Error
from blkferry.testing.daemon import DaemonThread


def offer(**facts):
    return Device("disk0", "vm.qcow2", 1 << 20, True, **facts)


def commands(shown):
    return {label: shlex.split(line) for label, line in shown.clients()}


def test_lines_to_paste_of_a_block_device():
    shown = offer(path="/dev/vda", attached=True)
    assert shown.places == ["/dev/vda"]
    assert commands(shown) == {
        "look": ["lsblk", "/dev/vda"],
        "mount": ["sudo", "mount", "/dev/vda", "/mnt"],
        "remove": ["sudo", "vdpa", "dev", "del", "disk0"],
    }
    assert shown.as_json() == {
        "name": "disk0",
        "image": "vm.qcow2",
        "size": 1 << 20,
        "writable": True,
        "device": "/dev/vda",
    }


def test_lines_to_paste_of_a_disk_for_a_guest():
    boot = commands(offer(path="/dev/vhost-vdpa-0", attached=True))["boot"]
    assert boot[boot.index("-blockdev") + 1].split(",")[2] == "path=/dev/vhost-vdpa-0"


def test_what_is_left_to_do_is_said():
    assert commands(offer())["attach"] == shlex.split("sudo vdpa dev add name disk0 mgmtdev vduse")
    assert commands(offer(attached=True))["driver"] == shlex.split("sudo modprobe -a virtio_vdpa virtio_blk")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--vduse", "a", "x", "y"], "--vduse is given 1 times for 2 images"),
        (["--vduse", "a", "--port", "0", "x"], "--port cannot go with --vduse"),
        (["--vduse", "a", "--allocation-depth", "x"], "--allocation-depth cannot go with --vduse"),
        (["--vduse", "a", "-n", "n", "x"], "--name cannot go with --vduse"),
        (["--vduse", "a", "--vhost-user", "s", "x"], "--vhost-user cannot go with --vduse"),
    ],
)
def test_wrong_use(monkeypatch, argv, text):
    monkeypatch.setattr(serving, "serve_images", lambda *asked: pytest.fail("it serves"))
    said = CliRunner().invoke(app, ["serve", *argv])
    assert said.exit_code == 2
    assert text in said.output


def test_options_arrive(monkeypatch):
    asked = []
    monkeypatch.setattr(serving, "serve_images", lambda *request: asked.append(request))
    assert CliRunner().invoke(app, ["serve", "-w", "--vduse", "disk0,serial=x", "a.img"]).exit_code == 0
    assert asked[0][0].vduse == ("disk0,serial=x",)


def test_what_is_said_of_a_device_are_options_of_its_export():
    with DaemonThread() as daemon:
        daemon.execute("blockdev-add", driver="memory", node_name="m", size=1 << 20)
        options = devices._options(daemon.daemon, "m", "disk0,num-queues=4,logical-block-size=4k")
        assert (options.id, options.node_name, options.name, options.writable) == ("m", "m", "disk0", True)
        assert (options.num_queues, options.logical_block_size) == (4, 4096)
        with pytest.raises(Error, match="Parameter 'queues' is unexpected"):
            devices._options(daemon.daemon, "m", "disk0,queues=4")
        with pytest.raises(Error, match="--vduse needs a name") as caught:
            devices._options(daemon.daemon, "m", "help")
        assert "num-queues=<int>" in caught.value.hint
