"""LUKS1 headers: made, read back, unlocked, and refused field by field."""

import itertools
import random
import struct

import pytest

from blkferry.crypt import luks
from blkferry.crypt.aes import IvGen, Mode
from blkferry.crypt.luks import FormatOptions, format_volume, merge, open_volume, rounds_per_second, split
from blkferry.crypt.luks_layout import MAX_ROUNDS, SIZE, parse, rounds_of
from blkferry.errors import Error, ErrorKind

QUICK = FormatOptions(iterations=1000)
SLOT = 208  # where the slots begin, each 48 bytes
VARIANTS = [
    QUICK,
    FormatOptions(iterations=1000, key_bits=128, hash="sha1"),
    FormatOptions(iterations=1000, key_bits=128, hash="sha512", ivgen=IvGen.PLAIN),
    FormatOptions(iterations=1000, key_bits=192, mode=Mode.CBC, ivgen=IvGen.ESSIV),
    FormatOptions(iterations=1000, key_bits=256, mode=Mode.CBC, hash="sha384"),
    FormatOptions(iterations=1000, key_bits=256, mode=Mode.ECB),
]


@pytest.fixture(scope="module")
def area():
    return format_volume(b"pw", QUICK, random=random.Random(1).randbytes)


def reader(area):
    return lambda offset, length: area[offset : offset + length]


def refused(area, length=None, **more):
    with pytest.raises(Error) as caught:
        parse(area, len(area) if length is None else length, **more)
    return caught.value


def with_number(area, at, value, form=">I"):
    damaged = bytearray(area)
    struct.pack_into(form, damaged, at, value)
    return damaged


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: f"{options.scheme}-{options.key_bits}-{options.hash}")
def test_what_is_made_opens_with_its_password_only(options):
    area = format_volume(b"pw", options)
    volume = open_volume(reader(area), len(area), b"pw")
    assert volume.header.payload_offset == len(area)
    plain = random.Random(2).randbytes(4096)
    assert volume.cipher.decrypt(9, volume.cipher.encrypt(9, plain)) == plain
    again = open_volume(reader(area), len(area), b"pw")
    assert again.cipher.encrypt(9, plain) == volume.cipher.encrypt(9, plain)
    with pytest.raises(Error) as caught:
        open_volume(reader(area), len(area), b"pw ")
    assert caught.value.kind is ErrorKind.DENIED
    assert str(caught.value) == "Invalid password, cannot unlock any keyslot"


def test_defaults_are_those_of_qemu(area):
    header = parse(area, len(area))
    assert (str(header.scheme), header.hash, header.key_bytes) == ("xts-plain64", "sha256", 64)
    assert header.payload_offset == 2068480  # as `qemu-img info` says of its own
    assert [slot.offset for slot in header.slots] == [4096 + 258048 * index for index in range(8)]
    assert [slot.active for slot in header.slots] == [True] + [False] * 7
    assert header.build() == area[:SIZE]


def test_the_random_source_decides_everything():
    made = [format_volume(b"pw", QUICK, random=random.Random(3).randbytes) for _ in range(2)]
    assert made[0] == made[1]
    assert format_volume(b"pw", QUICK)[:SIZE] != format_volume(b"pw", QUICK)[:SIZE]


def test_a_second_slot_opens_too(area):
    """The master key of a volume, put into slot 1 with another password."""
    header = parse(area, len(area))
    slot = header.slots[0]
    key = luks.pbkdf2("sha256", b"pw", slot.salt, slot.iterations, 64)
    stripes = luks.sector_cipher(header.scheme, key).decrypt(0, area[slot.offset : slot.offset + slot.length])
    master_key = merge(stripes, 64, "sha256")
    other = luks.pbkdf2("sha256", b"other", bytes(32), 1234, 64)
    two = with_number(area, SLOT + 48, 0x00AC71F3)
    struct.pack_into(">I", two, SLOT + 48 + 4, 1234)
    offset = header.slots[1].offset
    two[offset : offset + slot.length] = luks.sector_cipher(header.scheme, other).encrypt(
        0, split(master_key, "sha256", random.Random(4).randbytes)
    )
    assert len(parse(two, len(two)).active) == 2
    wanted = open_volume(reader(area), len(area), b"pw").cipher.encrypt(0, bytes(512))
    assert open_volume(reader(two), len(two), b"other").cipher.encrypt(0, bytes(512)) == wanted


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_splitting_is_undone_by_merging(hash_name, size):
    rng = random.Random(f"{hash_name}{size}")
    key = rng.randbytes(size)
    stripes = bytearray(split(key, hash_name, rng.randbytes))
    assert len(stripes) == 4000 * size
    assert merge(bytes(stripes), size, hash_name) == key
    stripes[size * 1234] ^= 1
    assert merge(bytes(stripes), size, hash_name) != key


def test_no_password_opens_a_volume_without_slots(area):
    empty = with_number(area, SLOT, 0x0000DEAD)
    with pytest.raises(Error, match="cannot unlock any keyslot"):
        open_volume(reader(empty), len(empty), b"pw")


@pytest.mark.parametrize(
    ("at", "value", "form", "message", "field"),
    [
        (0, b"LUKSxx", "6s", "Volume is not in LUKS format", "magic"),
        (6, 2, ">H", "LUKS version 2 is not supported", "version"),
        (8, b"a" * 32, "32s", "LUKS header cipher name is not NUL terminated", "cipher name"),
        (8, b"serpent\0", "8s", "Algorithm serpent with key size 64 bytes not supported", "cipher name"),
        (8, b"\x1b[2J\0", "5s", r"Algorithm \x1b[2J with key size 64 bytes not supported", "cipher name"),
        (40, b"a" * 32, "32s", "LUKS header cipher mode is not NUL terminated", "cipher mode"),
        (40, b"lrw-benbi\0", "10s", "Cipher mode lrw not supported", "cipher mode"),
        (72, b"a" * 32, "32s", "LUKS header hash spec is not NUL terminated", "hash spec"),
        (72, b"whirlpool\0", "10s", "Hash algorithm whirlpool not supported", "hash"),
        (104, 7, ">I", "LUKS payload is overlapping with the header", "payload offset"),
        (104, 4041, ">I", "LUKS payload begins at 2068992, beyond the end at 2068480", "payload offset"),
        (108, 0xFFFFFFFF, ">I", "Algorithm aes with key size 2147483647 bytes not supported", "cipher mode"),
        (164, 0, ">I", "LUKS key iteration count is zero", "master key iterations"),
        (SLOT + 48 * 2, 1, ">I", "Keyslot 2 state (active/disable) is corrupted", "key slot 2 state"),
        (SLOT + 4, 0, ">I", "Keyslot 0 iteration count is zero", "key slot 0 iterations"),
        (SLOT + 40, 1, ">I", "Keyslot 0 is overlapping with the LUKS header", "key slot 0 offset"),
        (SLOT + 40, 0xFFFFFFFF, ">I", "Keyslot 0 is overlapping with the encrypted payload", "key slot 0 offset"),
        (SLOT + 48 * 7 + 40, 4000, ">I", "Keyslot 7 is overlapping with the encrypted payload", "key slot 7 offset"),
        (SLOT + 48 * 5 + 40, 2024, ">I", "Keyslots 4 and 5 are overlapping in the header", "key slot 5 offset"),
        (SLOT + 48 * 3 + 44, 5, ">I", "Keyslot 3 is corrupted (stripes 5 != 4000)", "key slot 3 stripes"),
    ],
)
def test_damage_is_named(area, at, value, form, message, field):
    error = refused(with_number(area, at, value, form))
    assert (str(error), error.facts["field"]) == (message, field)


def test_a_short_header_is_refused(area):
    assert str(refused(area[:591])) == "LUKS header is cut off after 591 bytes"


def test_hashing_without_end_is_refused(area):
    assert (
        rounds_of(parse(area, len(area))) == 2 * 1000 + 1000
    )  # two digests make the 64 bytes of a key, a part of one makes the master key's digest
    greedy = with_number(area, SLOT + 4, 0xFFFFFFFF)
    error = refused(greedy)
    assert error.kind is ErrorKind.UNSUPPORTED
    assert f"more than {MAX_ROUNDS}" in str(error)
    assert "iterations" in str(refused(with_number(area, 164, 0xFFFFFFFF)).facts["field"])
    assert "more than 2999" in str(refused(area, max_rounds=2999))


def test_iterations_follow_the_clock():
    ticks = itertools.count()
    assert rounds_per_second("sha256", lambda: next(ticks)) == 1 << 14
    area = format_volume(b"pw", FormatOptions(iter_time_ms=1000), clock=lambda: float(next(ticks)))
    header = parse(area, len(area))
    assert header.slots[0].iterations == (1 << 14) // 2
    assert header.iterations == (1 << 14) // 8


@pytest.mark.parametrize("iterations", [999, 1 << 30])
def test_iterations_that_could_not_be_opened_again_are_refused(iterations):
    with pytest.raises(Error, match="Iterations must be from 1000"):
        format_volume(b"pw", FormatOptions(iterations=iterations))
