"""What `blkferry doctor` finds on machines of several kinds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from blkferry.cli import doctor
from blkferry.cli.app import app
from blkferry.daemon.doctor import SUBJECTS, Machine, State, examine

KERNEL = "6.12.0"
ROOT_CAPABILITIES = "CapEff:\t000001ffffffffff"


class Bench:
    """A machine that consists of files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.capabilities(ROOT_CAPABILITIES)

    def file(self, path: str, text: str = "", mode: int = 0o644) -> None:
        made = self.root / path.lstrip("/")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text)
        made.chmod(mode)

    def modules(self, *names: str, loaded: bool = True) -> None:
        for name in names if loaded else ():
            (self.root / "sys/module" / name).mkdir(parents=True)
        listed = "".join(f"kernel/drivers/{name.replace('_', '-')}.ko.xz:\n" for name in names)
        self.file(f"/lib/modules/{KERNEL}/modules.dep", listed)

    def capabilities(self, line: str) -> None:
        self.file("/proc/self/status", f"Name:\tpython\n{line}\n")

    def program(self, name: str) -> None:
        self.file(f"/usr/sbin/{name}", "#!/bin/sh\n", mode=0o755)

    def machine(self, uid: int = 0) -> Machine:
        return Machine(root=str(self.root), uid=uid, kernel=KERNEL)

    def examine(self, subject: str, uid: int = 0):
        return examine(subject, self.machine(uid))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def remedies(report, state=State.MISSING):
    return [finding.remedy for finding in report.findings if finding.state is state]


def test_a_machine_that_has_everything_for_vduse(bench):
    bench.modules("vduse", "virtio_vdpa", "virtio_blk", "vhost_vdpa")
    bench.file("/dev/vduse/control")
    bench.program("vdpa")
    report = bench.examine("vduse")
    assert report.ready
    assert {finding.state for finding in report.findings} == {State.OK}


def test_a_module_that_is_not_loaded(bench):
    bench.modules("vduse", "virtio_vdpa", "virtio_blk", "vhost_vdpa", loaded=False)
    bench.program("vdpa")
    report = bench.examine("vduse")
    assert not report.ready
    assert remedies(report) == ["modprobe vduse", "modprobe -a virtio_vdpa virtio_blk"]
    assert remedies(report, State.NOTE) == ["modprobe vhost_vdpa"]


def test_a_module_that_is_built_in(bench):
    bench.file(f"/lib/modules/{KERNEL}/modules.builtin", "kernel/drivers/block/virtio_blk.ko\n")
    assert bench.machine().has_module("virtio_blk")
    assert not bench.machine().has_module("virtio")


def test_a_kernel_without_vduse_and_a_machine_without_vdpa(bench):
    report = bench.examine("vduse")
    assert not report.ready
    assert [finding.text for finding in report.findings if finding.state is State.MISSING] == [
        f"kernel {KERNEL} has no VDUSE",
        "there is no program 'vdpa', which puts devices on the bus",
    ]


def test_a_container_without_the_control_device(bench):
    bench.modules("vduse", "virtio_vdpa", "virtio_blk")
    bench.program("vdpa")
    bench.capabilities("CapEff:\t0000000000000000")
    report = bench.examine("vduse", uid=0)
    assert remedies(report) == ["Use the host's /dev: in a container, give it /dev/vduse as a volume."]
    assert "vdpa dev add name NAME mgmtdev vduse" in remedies(report, State.NOTE)[0]


def test_fuse_as_root_and_as_somebody(bench, monkeypatch):
    bench.file("/dev/fuse")
    assert bench.examine("fuse").ready
    bench.capabilities("CapEff:\t0000000000000000")
    report = bench.examine("fuse", uid=1000)
    assert remedies(report) == ["Install fuse3, or run as root."]
    assert remedies(report, State.NOTE) == ["Put user_allow_other into /etc/fuse.conf."]
    bench.program("fusermount3")
    bench.file("/etc/fuse.conf", "# comment\n user_allow_other\n")
    report = bench.examine("fuse", uid=1000)
    assert report.ready
    assert not remedies(report, State.NOTE)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert remedies(bench.examine("fuse"))[:1] == ["chmod 666 /dev/fuse, or run as root."]


def test_no_fuse_at_all(bench):
    assert remedies(bench.examine("fuse"))[0].startswith("Give this container /dev/fuse")
    bench.modules("fuse", loaded=False)
    assert remedies(bench.examine("fuse"))[0] == "modprobe fuse"


def test_what_needs_nothing_is_ready(bench):
    assert bench.examine("nbd").ready
    assert bench.examine("engine").ready


@pytest.fixture
def said(bench, monkeypatch):
    def say(*argv):
        monkeypatch.setattr(doctor, "Machine", bench.machine)
        return CliRunner().invoke(app, ["doctor", *argv])

    return say


def test_the_command_says_each_finding_with_its_remedy(bench, said):
    bench.modules("fuse", loaded=False)
    done = said("fuse", "nbd")
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "fuse: images as files (blkferry mount)",
        "  missing  there is no /dev/fuse",
        "             modprobe fuse",
        "  ok       we may mount",
        "nbd: images for NBD clients (blkferry serve)",
        "  ok       NBD needs nothing that a machine could lack",
    ]
    assert said("nbd").exit_code == 0


def test_the_command_says_it_to_programs(said):
    done = said("--json", "nbd", "fuse")
    found = json.loads(done.output)
    assert (done.exit_code, found["ready"]) == (1, False)
    assert [(each["subject"], each["ready"]) for each in found["subjects"]] == [("nbd", True), ("fuse", False)]
    assert found["subjects"][1]["findings"][0]["state"] == "missing"


def test_without_a_subject_it_is_about_all(said):
    assert [each["subject"] for each in json.loads(said("--json").output)["subjects"]] == list(SUBJECTS)


def test_a_subject_that_there_is_not(said):
    done = said("vdsue")
    assert done.exit_code == 2
    assert "There is nothing to say about 'vdsue'. There is: nbd, fuse, vduse, engine." in done.output
