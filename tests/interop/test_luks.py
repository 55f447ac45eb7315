"""Encrypted images made by QEMU open here, and headers made here open in QEMU."""

from __future__ import annotations

import struct

import pytest

import peers
from blkferry.crypt.aes import IvGen, Mode
from blkferry.crypt.aes_legacy import legacy_cipher
from blkferry.crypt.luks import FormatOptions, format_volume, open_volume
from blkferry.errors import Error

pytestmark = peers.requires("qemu-img", "qemu-io")

MIB = 1 << 20
SECRET = "secret,id=s,data=correct horse"
PASSWORD = b"correct horse"
CRYPTO_HEADER = 0x0537BE77
"""The qcow2 header extension that says where the LUKS header is."""

# AES-192 is missing: QEMU 10.0 aborts on it, since its key material is no whole number of sectors.
CIPHERS = [
    "cipher-alg=aes-256",
    "cipher-alg=aes-128,hash-alg=sha1",
    "cipher-alg=aes-256,hash-alg=sha512,ivgen-alg=plain",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=aes-256,cipher-mode=ecb,hash-alg=ripemd160",
]


def create(path, image_format, options, size="1M"):
    peers.run("qemu-img", "create", "-q", "-f", image_format, "--object", SECRET, "-o", options, path, size)


def write(path, image_format, prefix, *commands):
    """Write with qemu-io, which gives each command's pattern to its range."""
    image = f"driver={image_format},{prefix}key-secret=s,file.filename={path}"
    args = [arg for command in commands for arg in ("-c", command)]
    return peers.run("qemu-io", "--object", SECRET, "--image-opts", *args, image)


class Image:
    """A file that is read here and there, as a driver does."""

    def __init__(self, path):
        self.data = path.read_bytes()

    def read(self, offset, length):
        return self.data[offset : offset + length]

    def number(self, offset, form=">Q"):
        return struct.unpack_from(form, self.data, offset)[0]


@pytest.mark.parametrize("options", CIPHERS)
def test_luks_images_of_qemu_open(tmp_path, options):
    path = tmp_path / "disk.luks"
    create(path, "luks", f"key-secret=s,iter-time=10,{options}")
    write(path, "luks", "", "write -P 0x5a 0 64k", "write -P 0xa5 1000k 512")
    image = Image(path)
    volume = open_volume(image.read, len(image.data), PASSWORD)
    start = volume.header.payload_offset
    assert volume.cipher.decrypt(0, image.read(start, 65536)) == b"\x5a" * 65536
    assert volume.cipher.decrypt(2000, image.read(start + 1000 * 1024, 512)) == b"\xa5" * 512
    with pytest.raises(Error, match="Invalid password, cannot unlock any keyslot"):
        open_volume(image.read, len(image.data), b"wrong")


def test_a_luks_image_of_qemu_is_written_to(tmp_path):
    path = tmp_path / "disk.luks"
    create(path, "luks", "key-secret=s,iter-time=10")
    image = Image(path)
    volume = open_volume(image.read, len(image.data), PASSWORD)
    with path.open("r+b") as file:
        file.seek(volume.header.payload_offset + 4096)
        file.write(volume.cipher.encrypt(8, b"\x77" * 8192))
    write(path, "luks", "", "read -P 0x77 4096 8192")


def luks_within(image):
    """What a qcow2 image keeps its LUKS header in: a reader of it, and its length."""
    at = image.number(100, ">I")
    while True:
        kind, length = struct.unpack_from(">II", image.data, at)
        assert kind, "there is no such extension"
        if kind == CRYPTO_HEADER:
            start, area = struct.unpack_from(">QQ", image.data, at + 8)
            return (lambda offset, length, start=start: image.read(start + offset, length)), area
        at += 8 + (length + 7) // 8 * 8


def host_offset(image, guest_offset):
    """Where the cluster (64 KiB) of a guest offset is, by the two tables."""
    l2_table = image.number(image.number(40)) & 0x00FFFFFFFFFFFE00
    return image.number(l2_table + guest_offset // 65536 * 8) & 0x00FFFFFFFFFFFE00


def test_luks_within_qcow2_counts_sectors_of_the_host(tmp_path):
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
    write(path, "qcow2", "encrypt.", "write -P 0x5a 128k 64k")
    image = Image(path)
    assert image.number(32, ">I") == 2
    volume = open_volume(*luks_within(image), PASSWORD)
    host = host_offset(image, 128 << 10)
    assert host != 128 << 10
    assert volume.cipher.decrypt(host // 512, image.read(host, 65536)) == b"\x5a" * 65536
    assert volume.cipher.decrypt((128 << 10) // 512, image.read(host, 65536)) != b"\x5a" * 65536


def test_legacy_encryption_counts_sectors_of_the_guest(tmp_path):
    """qemu-img still makes them; qemu-io opens no such image for a guest, but converts data into one."""
    path = tmp_path / "disk.qcow2"
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(128 << 10) + b"\x5a" * 65536 + bytes(MIB - (192 << 10)))
    options = "encrypt.format=aes,encrypt.key-secret=s"
    peers.run("qemu-img", "convert", "--object", SECRET, "-f", "raw", "-O", "qcow2", "-o", options, plain, path)
    image = Image(path)
    assert image.number(32, ">I") == 1
    host = host_offset(image, 128 << 10)
    assert host != 128 << 10
    assert legacy_cipher(PASSWORD).decrypt((128 << 10) // 512, image.read(host, 65536)) == b"\x5a" * 65536


@pytest.mark.parametrize(
    "options",
    [
        FormatOptions(iter_time_ms=10),
        FormatOptions(iterations=1000, key_bits=128, hash="sha1"),
        FormatOptions(iterations=1000, mode=Mode.CBC, ivgen=IvGen.PLAIN, hash="sha512"),
        FormatOptions(iterations=1000, mode=Mode.CBC, ivgen=IvGen.ESSIV),
    ],
    ids=lambda options: f"{options.scheme}-{options.key_bits}",
)
def test_volumes_made_here_open_in_qemu(tmp_path, options):
    path = tmp_path / "disk.luks"
    area = format_volume(PASSWORD, options)
    volume = open_volume(lambda offset, length: area[offset : offset + length], len(area), PASSWORD)
    path.write_bytes(area + volume.cipher.encrypt(0, b"\x33" * MIB))
    write(path, "luks", "", "read -P 0x33 0 1M", "write -P 0x44 512 1024")
    image = Image(path)
    assert volume.cipher.decrypt(1, image.read(len(area) + 512, 1024)) == b"\x44" * 1024
    said = peers.run("qemu-img", "info", "--image-opts", f"driver=luks,file.filename={path}").stdout
    assert f"uuid: {volume.header.uuid}" in said
    assert f"payload offset: {len(area)}" in said
