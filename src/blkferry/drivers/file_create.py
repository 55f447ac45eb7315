"""Making a file for an image: `blockdev-create` with the driver `file`."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import threading
from typing import Annotated, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.graph.permissions import Permission
from blkferry.plane import locks
from blkferry.schema.create import BlockdevCreateOptions, PreallocMode
from blkferry.schema.qapi import Doc, Size, branch

_CHUNK = 1 << 20
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_NOCOW = 0x00800000
_FLAGS = struct.Struct("l")


@branch
class BlockdevCreateOptionsFile(BlockdevCreateOptions):
    """A regular file of the host."""

    driver: Literal["file"] = "file"
    filename: Annotated[str, Doc("path of the file; if it is there, it is emptied", since="2.12")]
    size: Annotated[Size, Doc("its size in bytes", since="2.12")]
    preallocation: Annotated[
        PreallocMode, Doc("off makes a hole, falloc reserves space, full writes zeroes", since="2.12")
    ] = PreallocMode.OFF
    nocow: Annotated[bool, Doc("turn copy-on-write off where the file system has it (btrfs)", since="2.12")] = False


async def create_file(options: BlockdevCreateOptionsFile) -> None:
    """Make the file, in a thread; when cancelled, the thread has ended on return. Raises Error."""
    stop = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_create, options, stop))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        raise


def _create(options: BlockdevCreateOptionsFile, stop: threading.Event) -> None:
    path = options.filename
    if options.preallocation is PreallocMode.METADATA:
        raise Error(
            ErrorKind.UNSUPPORTED,
            f"Unsupported preallocation mode: {options.preallocation}",
            hint="Files have off, falloc and full.",
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise Error.from_oserror(f"Could not create '{path}'", error, path=path) from error
    try:
        lock = locks.ImageLock(fd, path) if locks.supported(fd) else None
        try:
            if lock is not None:
                # Nobody may be reading what is about to be emptied, let alone writing it.
                lock.apply(Permission.WRITE | Permission.RESIZE, Permission.WRITE | Permission.RESIZE)
            _fill(fd, options, stop)
        finally:
            if lock is not None:
                lock.close()
    finally:
        os.close(fd)


def _fill(fd: int, options: BlockdevCreateOptionsFile, stop: threading.Event) -> None:
    """Give an empty file its size and its space."""
    _resize(fd, 0, options.filename)
    if options.nocow:
        _turn_cow_off(fd)
    _resize(fd, options.size, options.filename)
    try:
        if options.preallocation is PreallocMode.FALLOC and options.size:
            os.posix_fallocate(fd, 0, options.size)
        elif options.preallocation is PreallocMode.FULL:
            zeroes = bytes(_CHUNK)
            for offset in range(0, options.size, _CHUNK):
                if stop.is_set():
                    return
                os.pwrite(fd, zeroes[: options.size - offset], offset)
            os.fsync(fd)
    except OSError as error:
        doing = "Could not preallocate data for the new file"
        raise Error.from_oserror(doing, error, path=options.filename) from error


def _resize(fd: int, size: int, path: str) -> None:
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        cause = error if isinstance(error, OSError) else OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raise Error.from_oserror("Could not resize file", cause, path=path) from error


def _turn_cow_off(fd: int) -> None:
    """A wish, not a demand: file systems without copy-on-write have nothing to turn off."""
    try:
        flags = _FLAGS.unpack(fcntl.ioctl(fd, _GETFLAGS, bytes(_FLAGS.size)))[0]
        fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags | _NOCOW))
    except OSError:
        pass
