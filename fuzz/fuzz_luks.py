"""Invariant: whatever a LUKS header says, it is refused with an Error or its password is tried, in bounded time.

    python fuzz/fuzz_luks.py [seconds] [seed]

Damages real headers (fuzz/corpus/luks): numbers, names, bits, length. The key material that a header passed as good
asks for must lie inside its area, and is read as noise; unlocking may then fail only for the password. The bound on
hashing is lowered, so that each try takes milliseconds. A failure prints the seed and the header that reproduce it.
"""

from __future__ import annotations

import pathlib
import random
import struct
import sys
import time

from blkferry.crypt import luks, luks_layout
from blkferry.errors import Error, ErrorKind

CORPUS = [file.read_bytes() for file in sorted((pathlib.Path(__file__).parent / "corpus" / "luks").glob("*.bin"))]
NAMES = (b"aes", b"serpent", b"xts-plain64", b"cbc-essiv:sha256", b"cbc-essiv:sha1", b"ecb-plain", b"xts-essiv:md5")
HASHES = (b"sha1", b"sha256", b"sha512", b"ripemd160", b"md5", b"-", b"", b"\xff:\0", b"a" * 32)
NUMBERS = (0, 1, 7, 8, 16, 24, 32, 48, 64, 512, 1000, 3999, 4000, 4040, 0xDEAD, 0xAC71F3, 1 << 31, (1 << 32) - 1)
FIELDS = (104, 108, 164, *(208 + 48 * slot + field for slot in range(8) for field in (0, 4, 40, 44)))
ROUNDS = 20_000
SECONDS = 1.0


def any_header(rng):
    header = bytearray(rng.choice(CORPUS))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        match rng.randrange(4):
            case 0:
                struct.pack_into(">I", header, rng.choice(FIELDS), rng.choice((*NUMBERS, rng.getrandbits(32))))
            case 1:
                struct.pack_into("32s", header, rng.choice((8, 40, 72)), rng.choice(NAMES + HASHES))
            case 2:
                at = rng.randrange(len(header))
                header[at] ^= 1 << rng.randrange(8)
            case 3:
                one, other = (208 + 48 * rng.randrange(8) for _ in range(2))
                header[one : one + 48] = header[other : other + 48]
    return bytes(header[: rng.choice((len(header),) * 9 + (rng.randrange(len(header)),))])


def refusal(work):
    """The Error that the work ends with, None when it does not."""
    try:
        work()
    except Error as error:
        return error
    return None


def attempt(rng, data):
    area = rng.choice((len(data), 4096, 200_000, 2_068_480, 1 << 40))
    if refused := refusal(lambda: luks_layout.parse(data, area, max_rounds=ROUNDS)):
        assert refused.message.isprintable()
        assert refused.facts["field"]
        return
    header = luks_layout.parse(data, area, max_rounds=ROUNDS)
    assert luks_layout.parse(header.build(), area, max_rounds=ROUNDS) == header
    material = {}
    for slot in header.active:
        assert slot.offset >= luks_layout.KEY_ALIGNMENT
        assert slot.offset + slot.length <= header.payload_offset <= area
        material[slot.index] = bytes(slot.length)
    failed = refusal(lambda: luks.unlock(header, material, b"password"))
    assert failed is not None
    assert failed.kind is ErrorKind.DENIED


def run(seconds, seed):
    rng = random.Random(seed)
    headers = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = any_header(rng)
        started = time.thread_time()
        try:
            attempt(rng, data)
            assert time.thread_time() - started < SECONDS
        except Exception:
            sys.stderr.write(f"seed {seed}, header {data.hex()}\n")
            raise
        headers += 1
    return headers


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    sys.stdout.write(f"{run(seconds, seed)} headers, seed {seed}\n")
