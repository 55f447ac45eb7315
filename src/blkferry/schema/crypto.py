"""Encryption of images: what users choose, and what queries tell of it. The names are QEMU's (qapi/crypto.json)."""

import enum
from typing import Annotated, Literal

from blkferry.schema.qapi import Doc, Struct, branch, union


class QCryptoCipherAlgo(enum.StrEnum):
    """What blocks are encrypted with."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"
    DES = "des"
    TRIPLE_DES = "3des"
    CAST5_128 = "cast5-128"
    SERPENT_128 = "serpent-128"
    SERPENT_192 = "serpent-192"
    SERPENT_256 = "serpent-256"
    TWOFISH_128 = "twofish-128"
    TWOFISH_192 = "twofish-192"
    TWOFISH_256 = "twofish-256"
    SM4 = "sm4"


class QCryptoCipherMode(enum.StrEnum):
    """How one block follows the other."""

    ECB = "ecb"
    CBC = "cbc"
    XTS = "xts"
    CTR = "ctr"


class QCryptoIVGenAlgo(enum.StrEnum):
    """What initialization vectors are made of."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgo(enum.StrEnum):
    """What is hashed with."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"
    SM3 = "sm3"


_KEY_SECRET = "id of the secret object that holds the key"  # noqa: S105 - it describes one


@union("format")
class BlockdevQcow2Encryption(Struct):
    """How the clusters of an image that is opened are encrypted."""

    format: Annotated[str, Doc("the encryption", since="2.10")]


@branch
class BlockdevQcow2EncryptionAes(BlockdevQcow2Encryption):
    """The old encryption of qcow and qcow2."""

    format: Literal["aes"] = "aes"
    key_secret: Annotated[str | None, Doc(_KEY_SECRET, since="2.10")] = None


@branch
class BlockdevQcow2EncryptionLuks(BlockdevQcow2Encryption):
    """LUKS."""

    format: Literal["luks"] = "luks"
    key_secret: Annotated[str | None, Doc(_KEY_SECRET, since="2.10")] = None


@union("format")
class QCryptoBlockCreateOptions(Struct):
    """How the clusters of an image that is made are encrypted."""

    format: Annotated[str, Doc("the encryption", since="2.6")]


@branch
class QCryptoBlockCreateOptionsQcow(QCryptoBlockCreateOptions):
    """The old encryption of qcow and qcow2."""

    format: Literal["qcow"] = "qcow"
    key_secret: Annotated[str | None, Doc(_KEY_SECRET, since="2.6")] = None


@branch
class QCryptoBlockCreateOptionsLuks(QCryptoBlockCreateOptions):
    """LUKS."""

    format: Literal["luks"] = "luks"
    key_secret: Annotated[str | None, Doc(_KEY_SECRET, since="2.6")] = None
    cipher_alg: Annotated[QCryptoCipherAlgo | None, Doc("the cipher (default: aes-256)", since="2.6")] = None
    cipher_mode: Annotated[QCryptoCipherMode | None, Doc("its mode (default: xts)", since="2.6")] = None
    ivgen_alg: Annotated[QCryptoIVGenAlgo | None, Doc("initialization vectors (default: plain64)", since="2.6")] = None
    ivgen_hash_alg: Annotated[QCryptoHashAlgo | None, Doc("the hash in those, where they need one", since="2.6")] = None
    hash_alg: Annotated[QCryptoHashAlgo | None, Doc("the hash of the master key (default: sha256)", since="2.6")] = None
    iter_time: Annotated[
        int | None, Doc("milliseconds that trying a password shall take (default: 2000)", since="2.8")
    ] = None


class QCryptoBlockInfoLUKSSlot(Struct):
    """A place for a password."""

    active: Annotated[bool, Doc("whether there is one", since="2.7")]
    iters: Annotated[int | None, Doc("iterations of its derivation", since="2.7")] = None
    stripes: Annotated[int | None, Doc("stripes of the key material", since="2.7")] = None
    key_offset: Annotated[int, Doc("where the key material is, in bytes", since="2.7")]


@union("format")
class ImageInfoSpecificQCow2Encryption(Struct):
    """How the clusters of an image are encrypted."""

    format: Annotated[str, Doc("the encryption", since="2.10")]


@branch
class ImageInfoSpecificQCow2EncryptionAes(ImageInfoSpecificQCow2Encryption):
    """The old encryption of qcow and qcow2."""

    format: Literal["aes"] = "aes"


@branch
class ImageInfoSpecificQCow2EncryptionLuks(ImageInfoSpecificQCow2Encryption):
    """LUKS."""

    format: Literal["luks"] = "luks"
    cipher_alg: Annotated[QCryptoCipherAlgo, Doc("the cipher", since="2.7")]
    cipher_mode: Annotated[QCryptoCipherMode, Doc("its mode", since="2.7")]
    ivgen_alg: Annotated[QCryptoIVGenAlgo, Doc("initialization vectors", since="2.7")]
    ivgen_hash_alg: Annotated[QCryptoHashAlgo | None, Doc("the hash in those, where they need one", since="2.7")] = None
    hash_alg: Annotated[QCryptoHashAlgo, Doc("the hash of the master key", since="2.7")]
    detached_header: Annotated[bool, Doc("the header is kept elsewhere", since="9.0")]
    payload_offset: Annotated[int, Doc("where the payload begins, in bytes", since="2.7")]
    master_key_iters: Annotated[int, Doc("iterations for the digest of the master key", since="2.7")]
    uuid: Annotated[str, Doc("name of the volume", since="2.7")]
    slots: Annotated[list[QCryptoBlockInfoLUKSSlot], Doc("the places for passwords", since="2.7")]
