"""nbd-client with certificates, right and wrong, in a guest: there a process of its own encrypts for the kernel."""

from __future__ import annotations

import pytest
from guest_server import Server
from linux_guest import HOST

import pki
from peers import KERNEL, requires, run

SIZE = 8 << 20

pytestmark = [
    requires(KERNEL, "qemu-system-x86_64", "nbd-client", "mkfs.ext4", "fsck.ext4", "debugfs"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(tmp_path, disk):
    """One that lets in whoever has a certificate of its authority."""
    pki.complete(tmp_path / "ours")
    pki.complete(tmp_path / "others")
    blockdev = f"file,node-name=disk,filename={disk}"
    options = ["--blockdev", blockdev, "--export", "nbd,id=disk,node-name=disk,writable=on"]
    with Server(tmp_path, *options, tls=tmp_path / "ours") as server:
        yield server


def shown(directory, *, authority=None):
    """nbd-client's options for the client's certificate and key in a directory, and whom it trusts."""
    return (
        f"-certfile {directory}/client-cert.pem -keyfile {directory}/client-key.pem "
        f"-cacertfile {authority or directory}/ca-cert.pem -tlshostname localhost"
    )


def test_a_file_system_over_tls(guest, server, disk, tmp_path):
    guest.run(
        f"""
        modprobe -a nbd ext4
        nbd-client {HOST} {server.port} /dev/nbd0 -N disk {shown(tmp_path / "ours")} >/dev/null 2>&1
        mkfs.ext4 -q /dev/nbd0
        mkdir -p /run/disk
        mount /dev/nbd0 /run/disk
        seq 1 200000 >/run/disk/numbers
        umount /run/disk
        dd if=/dev/nbd0 of=/run/copy bs=1M iflag=direct
        nbd-client -d /dev/nbd0
        nbd-client {HOST} {server.port} /dev/nbd0 -N disk {shown(tmp_path / "ours")} >/dev/null 2>&1
        cmp /run/copy /dev/nbd0
        rm /run/copy
        nbd-client -d /dev/nbd0
        """
    )
    server.end()
    assert server.log.count("export 'disk': connected as 'CN=client1'") == 2
    run("fsck.ext4", "-f", "-n", disk)
    numbers = run("debugfs", "-R", "cat /numbers", disk).stdout
    assert numbers == "".join(f"{number}\n" for number in range(1, 200_001))


@pytest.mark.parametrize(
    ("client", "authority", "heard"),
    [
        ("others", "ours", "the client's certificate was refused"),
        ("others", "others", "it may not trust this server"),
        (None, None, "peer did not return a certificate"),
    ],
)
def test_who_does_not_belong_here_is_refused(guest, server, tmp_path, client, authority, heard):
    options = shown(tmp_path / client, authority=tmp_path / authority) if client else "-enable-tls"
    said = guest.run(
        f"""
        modprobe nbd
        if nbd-client {HOST} {server.port} /dev/nbd0 -N disk {options} 2>&1; then exit 1; fi
        """
    )
    assert "Error: " in said
    server.end()
    assert heard in server.log
    assert "connected" not in server.log
