"""The header of a LUKS1 volume: bytes to values and back. (LUKS1 On-Disk Format Specification 1.2.3, section 2.)

It is 592 bytes, all numbers big-endian and offsets in 512-byte sectors; here offsets are bytes. The material of the
eight key slots follows, then the payload. `parse` believes nothing: what it returns can be worked with, its key
material lies between the header and the payload, and trying a password takes bounded time. Refusals name the field and
are worded as QEMU's where it refuses the same.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from blkferry.crypt.aes import Scheme, known_hash
from blkferry.errors import Error, ErrorKind
from blkferry.units import SECTOR, align_up

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
STRIPES = 4000
DIGEST = 20
SALT = 32
KEY_ALIGNMENT = 4096
"""Key material begins and ends at multiples of this, and not before the first."""

_HEAD = struct.Struct(f">6sH32s32s32sII{DIGEST}s{SALT}sI40s")
_SLOT = struct.Struct(f">II{SALT}sII")
SIZE = _HEAD.size + SLOTS * _SLOT.size

_ENABLED = 0x00AC71F3
_DISABLED = 0x0000DEAD

MAX_ROUNDS = 1 << 28
"""How often a password may have to be hashed before it can be called wrong: half a minute of one core at eight million
rounds a second, which is usual, and two minutes of a slow one. Eight slots made by QEMU or cryptsetup with their usual
two seconds each need about half of it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the master key lies encrypted with one password. The material is `length` bytes at `offset`."""

    index: int
    active: bool
    iterations: int
    salt: bytes
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has passed all checks. `hash` derives keys; `digest` tells the right master key."""

    scheme: Scheme
    hash: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    salt: bytes
    iterations: int
    uuid: str
    slots: tuple[Slot, ...]

    @property
    def active(self) -> list[Slot]:
        """The slots that a password may fit."""
        return [slot for slot in self.slots if slot.active]

    def build(self) -> bytes:
        """The header as it stands on the disk."""
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            b"aes",
            str(self.scheme).encode(),
            self.hash.encode(),
            self.payload_offset // SECTOR,
            self.key_bytes,
            self.digest,
            self.salt,
            self.iterations,
            self.uuid.encode("latin-1"),
        )
        return head + b"".join(
            _SLOT.pack(
                _ENABLED if slot.active else _DISABLED, slot.iterations, slot.salt, slot.offset // SECTOR, STRIPES
            )
            for slot in self.slots
        )


def material_length(key_bytes: int) -> int:
    """Bytes of one slot's key material, up to whole sectors: the last one of a 24-byte key is half used."""
    return align_up(key_bytes * STRIPES, SECTOR)


def parse(data: bytes | bytearray | memoryview, area: int, *, max_rounds: int = MAX_ROUNDS) -> Header:
    """The header in the first `SIZE` bytes of `data`. Raises Error.

    `area` is how much there is to read: the length of the volume, or of the header's part of a qcow2 image.
    """
    if len(data) < SIZE:
        raise _corrupt(f"LUKS header is cut off after {len(data)} bytes", "header")
    head = _HEAD.unpack_from(data)
    magic, version, cipher, mode, hash_spec, payload_sector, key_bytes, digest, salt, iterations, uuid = head
    if magic != MAGIC:
        raise _corrupt("Volume is not in LUKS format", "magic")
    if version != VERSION:
        hint = "Convert it to LUKS1: cryptsetup convert --type luks1." if version == 2 else ""
        raise Error(ErrorKind.UNSUPPORTED, f"LUKS version {version} is not supported", hint=hint, field="version")
    cipher = _text(cipher, "cipher name")
    mode = _text(mode, "cipher mode")
    hash_spec = _text(hash_spec, "hash spec")
    payload_offset = payload_sector * SECTOR
    if payload_offset < KEY_ALIGNMENT:
        raise _corrupt("LUKS payload is overlapping with the header", "payload offset")
    if payload_offset > area:
        text = f"LUKS payload begins at {payload_offset}, beyond the end at {area}"
        raise _corrupt(text, "payload offset")
    if not iterations:
        raise _corrupt("LUKS key iteration count is zero", "master key iterations")
    scheme = Scheme.parse(mode)
    if cipher != "aes":
        text = f"Algorithm {cipher} with key size {key_bytes} bytes not supported"
        raise Error(ErrorKind.UNSUPPORTED, text, hint="Only aes is.", field="cipher name")
    scheme.check_key(key_bytes)
    known_hash(hash_spec)
    slots = tuple(
        _slot(index, fields, key_bytes, payload_offset)
        for index, fields in enumerate(_SLOT.iter_unpack(bytes(data[_HEAD.size : SIZE])))
    )
    _check_overlaps(slots)
    header = Header(
        scheme,
        hash_spec,
        payload_offset,
        key_bytes,
        digest,
        salt,
        iterations,
        uuid.partition(b"\0")[0].decode("latin-1"),
        slots,
    )
    if (rounds := rounds_of(header)) > max_rounds:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"LUKS header asks for {rounds} rounds of hashing per password, more than {max_rounds}",
            hint="Add a password with a shorter iteration time and remove the others: cryptsetup luksChangeKey.",
            field="iterations",
        )
    return header


def rounds_of(header: Header) -> int:
    """How often a wrong password is hashed: PBKDF2 repeats its iterations for each digest's length of output."""
    digest_size = hashlib.new(header.hash).digest_size
    for_master_key = header.iterations * -(-DIGEST // digest_size)
    for_slot_key = -(-header.key_bytes // digest_size)
    return sum(slot.iterations * for_slot_key + for_master_key for slot in header.active)


def _slot(index: int, fields: tuple[int, int, bytes, int, int], key_bytes: int, payload_offset: int) -> Slot:
    state, iterations, salt, sector, stripes = fields
    if stripes != STRIPES:
        raise _corrupt(f"Keyslot {index} is corrupted (stripes {stripes} != {STRIPES})", f"key slot {index} stripes")
    if state not in (_ENABLED, _DISABLED):
        raise _corrupt(f"Keyslot {index} state (active/disable) is corrupted", f"key slot {index} state")
    if state == _ENABLED and not iterations:
        raise _corrupt(f"Keyslot {index} iteration count is zero", f"key slot {index} iterations")
    slot = Slot(index, state == _ENABLED, iterations, salt, sector * SECTOR, material_length(key_bytes))
    if slot.offset < KEY_ALIGNMENT:
        raise _corrupt(f"Keyslot {index} is overlapping with the LUKS header", f"key slot {index} offset")
    if slot.offset + slot.length > payload_offset:
        raise _corrupt(f"Keyslot {index} is overlapping with the encrypted payload", f"key slot {index} offset")
    return slot


def _check_overlaps(slots: tuple[Slot, ...]) -> None:
    for one in slots:
        for other in slots[one.index + 1 :]:
            if one.offset < other.offset + other.length and other.offset < one.offset + one.length:
                text = f"Keyslots {one.index} and {other.index} are overlapping in the header"
                raise _corrupt(text, f"key slot {other.index} offset")


def _text(field: bytes, name: str) -> str:
    """A name in a header, ready to be shown: what is not printable ASCII is escaped."""
    text, end, _ = field.partition(b"\0")
    if not end:
        raise _corrupt(f"LUKS header {name} is not NUL terminated", name)
    return text.decode("latin-1").encode("unicode_escape").decode("ascii")


def _corrupt(text: str, field: str) -> Error:
    return Error(ErrorKind.CORRUPT, text, field=field)
