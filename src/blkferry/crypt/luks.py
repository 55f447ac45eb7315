"""LUKS1: from a password to the cipher of a volume's payload, and headers for new volumes. (Specification, section 4.)

The payload is encrypted with a random master key. A key slot has that key split into 4000 stripes, so that it is lost
if any part of them is (`split`, `merge`: the anti-forensic splitter), and these encrypted with a key made from a
password. Nothing tells the right password but that the master key it leads to has the digest in the header.

Everything here is plain and takes its time, up to `luks_layout.MAX_ROUNDS` rounds of hashing: call it in a worker
thread, where it lets go of the interpreter while it hashes. Keys stay in memory until Python forgets them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blkferry.crypt import luks_layout
from blkferry.crypt.aes import Data, IvGen, Mode, Scheme, SectorCipher, known_hash, sector_cipher
from blkferry.crypt.luks_layout import DIGEST, KEY_ALIGNMENT, SALT, SLOTS, STRIPES, Header, Slot
from blkferry.crypt.package import require
from blkferry.errors import Error, ErrorKind
from blkferry.units import align_up

MIN_ITERATIONS = 1000
"""What the specification asks for at least."""

MAX_SLOT_ROUNDS = luks_layout.MAX_ROUNDS // SLOTS * 3 // 4
"""Rounds for one slot of a new volume; a quarter is left for the digests, so eight such slots can be opened again."""


# -- opening -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Volume:
    """An unlocked volume: the content of its sector n is at `header.payload_offset` + 512 n."""

    header: Header
    cipher: SectorCipher


def open_volume(read: Callable[[int, int], Data], area: int, passphrase: bytes) -> Volume:
    """Read (offset, length) what is needed of the first `area` bytes of a volume, and unlock it. Raises Error."""
    header = luks_layout.parse(read(0, luks_layout.SIZE), area)
    material = {slot.index: read(slot.offset, slot.length) for slot in header.active}
    return Volume(header, unlock(header, material, passphrase))


def unlock(header: Header, material: Mapping[int, Data], passphrase: bytes) -> SectorCipher:
    """The payload's cipher, given the key material of every active slot by its index.

    Raises Error(DENIED) when no slot fits the password, Error(UNSUPPORTED) without the `cryptography` package.
    """
    require()
    for slot in header.active:
        slot_key = pbkdf2(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
        stripes = sector_cipher(header.scheme, slot_key).decrypt(0, material[slot.index])
        master_key = merge(stripes[: header.key_bytes * STRIPES], header.key_bytes, header.hash)
        digest = pbkdf2(header.hash, master_key, header.salt, header.iterations, DIGEST)
        if hmac.compare_digest(digest, header.digest):
            return sector_cipher(header.scheme, master_key)
    raise Error(
        ErrorKind.DENIED,
        "Invalid password, cannot unlock any keyslot",
        hint="A newline at the end of the secret's file would be part of the password.",
    )


# -- making --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """How a new volume is encrypted; what QEMU chooses where it is not told.

    `iter_time_ms` is how long a password takes to try on this machine; `iterations` says it outright.
    """

    key_bits: int = 256
    mode: Mode = Mode.XTS
    ivgen: IvGen = IvGen.PLAIN64
    ivgen_hash: str = ""
    hash: str = "sha256"
    iter_time_ms: int = 2000
    iterations: int | None = None

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.mode, self.ivgen, self.ivgen_hash or ("sha256" if self.ivgen is IvGen.ESSIV else ""))

    @property
    def key_bytes(self) -> int:
        return self.key_bits // 8 * (2 if self.mode is Mode.XTS else 1)


def format_volume(
    passphrase: bytes,
    options: FormatOptions = FormatOptions(),
    *,
    random: Callable[[int], bytes] = os.urandom,
    clock: Callable[[], float] = time.thread_time,
) -> bytes:
    """Everything before the payload of a new volume with one password: as many bytes as its payload offset says.

    Raises Error(UNSUPPORTED) or Error(INVALID_ARGUMENT).
    """
    require()
    options.scheme.check_key(options.key_bytes)
    known_hash(options.hash)
    length = luks_layout.material_length(options.key_bytes)
    step = align_up(length, KEY_ALIGNMENT)
    slot_iterations, master_iterations = _iterations(options, clock)
    master_key = random(options.key_bytes)
    salt, slot_salt = random(SALT), random(SALT)
    slots = tuple(
        Slot(
            index,
            active=index == 0,
            iterations=0 if index else slot_iterations,
            salt=bytes(SALT) if index else slot_salt,
            offset=KEY_ALIGNMENT + index * step,
            length=length,
        )
        for index in range(SLOTS)
    )
    header = Header(
        scheme=options.scheme,
        hash=options.hash,
        payload_offset=KEY_ALIGNMENT + SLOTS * step,
        key_bytes=options.key_bytes,
        digest=pbkdf2(options.hash, master_key, salt, master_iterations, DIGEST),
        salt=salt,
        iterations=master_iterations,
        uuid=str(uuid.UUID(bytes=random(16), version=4)),
        slots=slots,
    )
    slot_key = pbkdf2(options.hash, passphrase, slot_salt, slot_iterations, options.key_bytes)
    stripes = split(master_key, options.hash, random)
    material = sector_cipher(options.scheme, slot_key).encrypt(0, stripes.ljust(length, b"\0"))
    return (header.build().ljust(KEY_ALIGNMENT, b"\0") + material).ljust(header.payload_offset, b"\0")


def _iterations(options: FormatOptions, clock: Callable[[], float]) -> tuple[int, int]:
    """For the slot's key and for the master key's digest, which takes an eighth of the time, as everywhere."""
    blocks = -(-options.key_bytes // hashlib.new(options.hash).digest_size)
    most = MAX_SLOT_ROUNDS // blocks
    if options.iterations is None:
        rounds = rounds_per_second(options.hash, clock) * options.iter_time_ms // 1000
        chosen = max(MIN_ITERATIONS, min(rounds // blocks, most))
    else:
        chosen = options.iterations
        if not MIN_ITERATIONS <= chosen <= most:
            text = f"Iterations must be from {MIN_ITERATIONS} to {most}, not {chosen}"
            raise Error(ErrorKind.INVALID_ARGUMENT, text)
    return chosen, max(MIN_ITERATIONS, chosen * blocks // 8)


def rounds_per_second(hash_name: str, clock: Callable[[], float] = time.thread_time) -> int:
    """How fast this machine hashes passwords, measured for about a tenth of a second."""
    count = 1 << 14
    while True:
        start = clock()
        pbkdf2(hash_name, b"password", bytes(SALT), count, 1)
        elapsed = clock() - start
        if elapsed > 0.05 or count >= MAX_SLOT_ROUNDS:
            return int(count / max(elapsed, 1e-6))
        count *= 2


# -- parts ---------------------------------------------------------------------------------------------------


def pbkdf2(hash_name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """A key from a password (RFC 8018). The package's OpenSSL is newer than Python's and up to twice as fast."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    algorithm: hashes.HashAlgorithm
    match hash_name:
        case "sha1":
            algorithm = hashes.SHA1()  # noqa: S303 - what the image says
        case "sha256":
            algorithm = hashes.SHA256()
        case "sha512":
            algorithm = hashes.SHA512()
        case _:
            return hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, length)
    return PBKDF2HMAC(algorithm, length, salt, iterations).derive(secret)


def split(key: bytes, hash_name: str, random: Callable[[int], bytes]) -> bytes:
    """All stripes of a key: random ones, and one that makes `merge` of them give the key."""
    noise = random(len(key) * (STRIPES - 1))
    return noise + _xor(key, _mix(noise, len(key), hash_name))


def merge(stripes: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key that was split."""
    noise, last = stripes[:-key_bytes], stripes[-key_bytes:]
    return _xor(last, _mix(noise, key_bytes, hash_name))


def _mix(noise: bytes, key_bytes: int, hash_name: str) -> bytes:
    """All stripes but the last mixed into one: each added to what came out before, and hashed piece by piece."""
    size = hashlib.new(hash_name).digest_size
    pieces = [(at // size).to_bytes(4, "big") for at in range(0, key_bytes, size)]
    mixed = bytes(key_bytes)
    for at in range(0, len(noise), key_bytes):
        mixed = _xor(mixed, noise[at : at + key_bytes])
        mixed = b"".join(
            hashlib.new(hash_name, number + mixed[index * size : (index + 1) * size]).digest()
            for index, number in enumerate(pieces)
        )[:key_bytes]
    return mixed


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")
