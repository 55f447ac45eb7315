"""`blockdev-create` for qcow2: from the options of the schema to what `creation` makes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Literal

from blkferry.drivers.qcow2 import compression, creation
from blkferry.drivers.qcow2.creation import CreateSpec, Preallocation
from blkferry.drivers.qcow2.header import CompressionType, CryptMethod
from blkferry.drivers.qcow2.options import BlockdevCreateOptionsQcow2, BlockdevQcow2Version
from blkferry.errors import Error, ErrorKind
from blkferry.graph.loan import lend
from blkferry.graph.permissions import Permission
from blkferry.schema.crypto import (
    QCryptoBlockCreateOptionsLuks,
    QCryptoBlockCreateOptionsQcow,
    QCryptoIVGenAlgo,
)
from blkferry.schema.image import Qcow2CompressionType

if TYPE_CHECKING:
    from blkferry.crypt import luks
    from blkferry.graph.graph import Graph

_USED = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
_SHARED = Permission.CONSISTENT_READ

_SUPPORTED_CIPHERS = {"aes-128": 128, "aes-192": 192, "aes-256": 256}


async def create(graph: Graph, options: BlockdevCreateOptionsQcow2) -> None:
    """Make an image in the node that `options` name. Raises Error."""
    spec = await spec_of(graph, options)
    spec.check(has_data_file=options.data_file is not None)
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(lend(graph, options.file, "blockdev-create", _USED, _SHARED))
        data_file = None
        if options.data_file is not None:
            lent = await stack.enter_async_context(
                lend(graph, options.data_file, "blockdev-create", _USED, _SHARED, beside=file)
            )
            data_file = lent.node
        await file.run(creation.create(file.node, data_file, spec))


async def spec_of(graph: Graph, options: BlockdevCreateOptionsQcow2) -> CreateSpec:
    """What the options ask for, defaults included. Raises Error."""
    zstd = options.compression_type is Qcow2CompressionType.ZSTD
    kind = CompressionType.ZSTD if zstd else CompressionType.ZLIB
    compression.require(kind)
    return CreateSpec(
        size=options.size,
        version=2 if options.version is BlockdevQcow2Version.V2 else 3,
        cluster_size=65536 if options.cluster_size is None else options.cluster_size,
        refcount_bits=16 if options.refcount_bits is None else options.refcount_bits,
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
        data_file_raw=bool(options.data_file_raw),
        extended_l2=bool(options.extended_l2),
        lazy_refcounts=bool(options.lazy_refcounts),
        compression_type=kind,
        preallocation=Preallocation(str(options.preallocation or "off")),
        encryption=await _encryption(graph, options),
    )


async def _encryption(
    graph: Graph, options: BlockdevCreateOptionsQcow2
) -> Callable[[int], bytes] | Literal[CryptMethod.AES] | None:
    wanted = options.encrypt
    if wanted is None:
        return None
    key = getattr(wanted, "key_secret", None)
    if key is None:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "Parameter 'encrypt.key-secret' is required for cipher",
            hint="Name the secret object that holds the password.",
        )
    from blkferry.crypt import luks
    from blkferry.crypt.password import password

    secret = password(key, graph.secret(key))
    if isinstance(wanted, QCryptoBlockCreateOptionsQcow):
        return CryptMethod.AES
    assert isinstance(wanted, QCryptoBlockCreateOptionsLuks)
    header = await asyncio.to_thread(luks.format_volume, secret, _luks_options(wanted), random=secrets.token_bytes)
    return lambda _cluster_size: header


def _luks_options(wanted: QCryptoBlockCreateOptionsLuks) -> luks.FormatOptions:
    from blkferry.crypt import luks
    from blkferry.crypt.aes import IvGen, Mode

    cipher = str(wanted.cipher_alg or "aes-256")
    if cipher not in _SUPPORTED_CIPHERS:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Algorithm '{cipher}' not supported",
            hint=f"Supported: {', '.join(_SUPPORTED_CIPHERS)}.",
        )
    try:
        mode = Mode(str(wanted.cipher_mode or "xts"))
    except ValueError as error:
        raise Error(ErrorKind.UNSUPPORTED, f"Cipher mode '{wanted.cipher_mode}' not supported") from error
    essiv = wanted.ivgen_alg is QCryptoIVGenAlgo.ESSIV
    return luks.FormatOptions(
        key_bits=_SUPPORTED_CIPHERS[cipher],
        mode=mode,
        ivgen=IvGen(str(wanted.ivgen_alg or "plain64")),
        ivgen_hash=str(wanted.ivgen_hash_alg or "sha256") if essiv else "",
        hash=str(wanted.hash_alg or "sha256"),
        iter_time_ms=2000 if wanted.iter_time is None else wanted.iter_time,
    )
