"""`secret`: a password or key that drivers ask for by id (`Graph.secret`), as of QEMU's qapi/crypto.json.

Who uses a secret reads it once, while opening; so it may be removed while the node that needed it lives on. The value
is not in `repr`, in errors or in the log: only `value` has it, and the options are not kept. (On the command line it
is as visible as the command line is: give it by `file`, or encrypted with a master secret.)
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import re
from typing import Annotated, ClassVar, Literal

from blkferry.crypt import aes
from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.base import BlkObject
from blkferry.schema.qapi import Doc, branch
from blkferry.schema.qom import ObjectOptions

MAX_FILE = 1 << 20
"""Bytes of a secret's file. Passwords are shorter, and keys too; it is for whoever names /dev/zero."""

_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=\n]")


class QCryptoSecretFormat(enum.StrEnum):
    """How the data of a secret is written."""

    RAW = "raw"
    BASE64 = "base64"


@branch
class SecretProperties(ObjectOptions):
    """A password or key, for encrypted images."""

    qom_type: Literal["secret"] = "secret"
    data: Annotated[str | None, Doc("the secret itself; other users of the machine may see it", since="2.6")] = None
    file: Annotated[str | None, Doc("a file that holds the secret, to the last byte", since="2.6")] = None
    format: Annotated[QCryptoSecretFormat, Doc("how the data is written", since="2.6")] = QCryptoSecretFormat.RAW
    keyid: Annotated[str | None, Doc("the secret with the key that decrypts the data (AES-256-CBC)", since="2.6")] = (
        None
    )
    iv: Annotated[str | None, Doc("the initialization vector for that, 16 bytes in base64", since="2.6")] = None

    def __repr__(self) -> str:
        return f"SecretProperties(id={self.id!r})"


class Secret(BlkObject):
    """A secret; `value` is there once it has started."""

    kind: ClassVar[str] = "secret"
    options_type: ClassVar[type[ObjectOptions]] = SecretProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, SecretProperties)
        super().__init__(options)
        if options.file is not None and options.data is not None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "'file' and 'data' are mutually exclusive")
        if options.file is None and options.data is None:
            raise Error(ErrorKind.INVALID_ARGUMENT, "Either 'file' or 'data' must be provided")
        self.value: bytes
        self._options: SecretProperties | None = options

    async def start(self, graph: Graph, engine: str) -> None:
        """Read the file if there is one, and decode and decrypt."""
        del engine
        assert self._options is not None
        options, self._options = self._options, None
        data = await asyncio.to_thread(_read, options.file) if options.file is not None else _bytes(options.data or "")
        if options.keyid is None:
            self.value = _from_base64(data) if options.format is QCryptoSecretFormat.BASE64 else data
        else:
            self.value = _decrypt(graph.secret(options.keyid), options.iv, data, options.format)


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # arguments of a command line may be any bytes
    except UnicodeEncodeError:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Parameter 'data' is not valid Unicode") from None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise Error.from_oserror(f"Unable to read {path}", error, path=path) from None
    if len(data) > MAX_FILE:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"Unable to read {path}: it is larger than 1 MiB", path=path)
    return data


def _decrypt(key: bytes, iv_text: str | None, data: bytes, written: QCryptoSecretFormat) -> bytes:
    """Undo what `openssl enc -aes-256-cbc` with this key did, padding included."""
    if len(key) != 32:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Key should be 32 bytes in length")
    if iv_text is None:
        raise Error(ErrorKind.INVALID_ARGUMENT, "IV is required to decrypt secret", hint="Add iv=, in base64.")
    iv = _from_base64(_bytes(iv_text))
    if len(iv) != aes.BLOCK:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"IV should be 16 bytes in length not {len(iv)}")
    if written is QCryptoSecretFormat.BASE64:
        data = _from_base64(data)
    if len(data) % aes.BLOCK:
        text = f"Length {len(data)} must be a multiple of block size 16"
        hint = "" if written is QCryptoSecretFormat.BASE64 else "If the data is in base64, add format=base64."
        raise Error(ErrorKind.INVALID_ARGUMENT, text, hint=hint)
    if not data:
        return b""
    plain = aes.cbc_decrypt(key, iv, data)
    padding = plain[-1]
    if padding > aes.BLOCK:
        # Without the number that QEMU names: it is a byte of something that may be the secret after all.
        text = "Incorrect number of padding bytes found on decrypted data"
        raise Error(ErrorKind.INVALID_ARGUMENT, text, hint="The key, the iv or the data is not the right one.")
    return plain[: len(plain) - padding]


def _from_base64(text: bytes) -> bytes:
    """As lenient as GLib: newlines are ignored, and so is a rest of less than four characters."""
    if _NOT_BASE64.search(text):
        raise Error(ErrorKind.INVALID_ARGUMENT, "Base64 data contains invalid characters")
    text = text.replace(b"\n", b"")
    try:
        return base64.b64decode(text[: len(text) // 4 * 4])
    except binascii.Error:
        raise Error(ErrorKind.INVALID_ARGUMENT, "Base64 data is malformed") from None
