"""Sector ciphers against published vectors, and against the plain definition of each mode."""

import hashlib
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from blkferry.crypt import package
from blkferry.crypt.aes import IvGen, Mode, Scheme, cbc_decrypt, sector_cipher
from blkferry.crypt.aes_legacy import legacy_cipher
from blkferry.crypt.password import password
from blkferry.errors import Error, ErrorKind

XTS = Scheme(Mode.XTS, IvGen.PLAIN64)
CBC = Scheme(Mode.CBC, IvGen.PLAIN64)
SCHEMES = [
    (text, size)
    for text, sizes in {
        "xts-plain64": (32, 64),
        "xts-plain": (64,),
        "xts-essiv:sha256": (64,),
        "cbc-plain": (16, 24, 32),
        "cbc-plain64": (16, 24, 32),
        "cbc-essiv:sha256": (16, 32),
        "ecb-plain64": (16, 24, 32),
    }.items()
    for size in sizes
]


def test_ieee_1619_vector_10():
    """XTS-AES-256, data unit ff, 512 bytes 00 01 02 ...: the beginning and the end of the standard's ciphertext."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    plain = bytes(range(256)) * 2
    encrypted = sector_cipher(XTS, key).encrypt(0xFF, plain)
    assert encrypted.hex().startswith("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
    assert encrypted.hex().endswith("c4f36ffda9fcea70b9c6e693e148c151")
    assert sector_cipher(XTS, key).decrypt(0xFF, encrypted) == plain


def test_nist_sp_800_38a_cbc():
    """F.2.2, CBC-AES128.Decrypt."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    encrypted = bytes.fromhex("7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2")
    plain = cbc_decrypt(key, bytes(range(16)), encrypted)
    assert plain.hex() == "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"


def vector(scheme, key, sector):
    match scheme.ivgen:
        case IvGen.PLAIN:
            return (sector % 2**32).to_bytes(16, "little")
        case IvGen.PLAIN64:
            return sector.to_bytes(16, "little")
        case IvGen.ESSIV:
            salt = algorithms.AES(hashlib.sha256(key).digest())
            return Cipher(salt, modes.ECB()).encryptor().update(sector.to_bytes(16, "little"))


@pytest.mark.parametrize(("text", "size"), SCHEMES)
@pytest.mark.parametrize("first", [0, 7, 2**32 - 3, 2**40])
def test_many_sectors_are_each_as_defined(text, size, first):
    rng = random.Random(f"{text} {size} {first}")
    scheme, key, plain = Scheme.parse(text), rng.randbytes(size), rng.randbytes(9 * 512)
    mode = {Mode.XTS: modes.XTS, Mode.CBC: modes.CBC, Mode.ECB: lambda _: modes.ECB()}[scheme.mode]
    expected = b"".join(
        Cipher(algorithms.AES(key), mode(vector(scheme, key, first + index)))
        .encryptor()
        .update(plain[index * 512 : (index + 1) * 512])
        for index in range(9)
    )
    cipher = sector_cipher(scheme, key)
    assert cipher.encrypt(first, plain) == expected
    assert cipher.decrypt(first, memoryview(expected)) == plain
    assert cipher.decrypt(first + 4, bytearray(expected[2048:3072])) == plain[2048:3072]
    assert cipher.encrypt(first, b"") == cipher.decrypt(first, b"") == b""


def test_the_legacy_key_is_the_password_cut_or_filled_up():
    plain = bytes(1024)
    assert legacy_cipher(b"0123456789abcdefXYZ").encrypt(3, plain) == sector_cipher(CBC, b"0123456789abcdef").encrypt(
        3, plain
    )
    assert legacy_cipher(b"abc").encrypt(3, plain) == sector_cipher(CBC, b"abc".ljust(16, b"\0")).encrypt(3, plain)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("xts", ErrorKind.CORRUPT, "Unexpected cipher mode string format xts"),
        ("ctr-plain64", ErrorKind.UNSUPPORTED, "Cipher mode ctr not supported"),
        ("xts-random", ErrorKind.UNSUPPORTED, "IV generator random not supported"),
        ("cbc-essiv", ErrorKind.CORRUPT, "Missing IV generator hash specification"),
        ("cbc-essiv:crc32", ErrorKind.UNSUPPORTED, "Hash algorithm crc32 not supported"),
    ],
)
def test_unknown_schemes_are_refused_by_name(text, kind, message):
    with pytest.raises(Error) as caught:
        Scheme.parse(text)
    assert (caught.value.kind, str(caught.value)) == (kind, message)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("xts-plain64", 48, "Algorithm aes with key size 24 bytes not supported"),
        ("cbc-plain64", 64, "Algorithm aes with key size 64 bytes not supported"),
        ("cbc-essiv:sha1", 32, "No AES cipher with key size 20 available"),
        ("xts-plain64", 64, "The two halves of the XTS key are equal"),
    ],
)
def test_keys_that_do_not_fit_are_refused(text, size, message):
    with pytest.raises(Error) as caught:
        sector_cipher(Scheme.parse(text), bytes(size))
    assert str(caught.value) == message


def test_schemes_are_written_as_they_are_read():
    for text in ("xts-plain64", "cbc-essiv:sha256", "xts-plain64:sha512"):
        assert str(Scheme.parse(text)) == text


def test_without_the_package_there_is_a_hint(monkeypatch):
    monkeypatch.setattr(package.importlib, "import_module", lambda _name: (_ for _ in ()).throw(ImportError))
    package.require.cache_clear()
    try:
        with pytest.raises(Error) as caught:
            legacy_cipher(b"x")
    finally:
        package.require.cache_clear()
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert caught.value.hint == "pip install 'blkferry[crypt]'"


def test_passwords_are_text_up_to_the_first_nul():
    assert password("s", "zoë".encode()) == "zoë".encode()
    assert password("s", b"ab\0cd") == b"ab"
    with pytest.raises(Error, match="Data from secret s is not valid UTF-8"):
        password("s", b"\xff")
