"""Everything that is asked of the file but reading and writing its bytes.

A handler returns its reply, or None if it comes later or never. What the kernel should not ask of a lone regular file
is refused; so is what it cannot have meant.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from blkferry.errors import Error
from blkferry.exports.fuse import transfers
from blkferry.exports.fuse.limits import ATTRIBUTES_SECONDS, BLOCK_SIZE, MAX_SIZE, PUNCH_BY_WRITING
from blkferry.graph.node import depends_on
from blkferry.plane.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from blkferry.wire.fuse import init
from blkferry.wire.fuse.constants import ROOT_ID, UNANSWERED, Fattr, Opcode, OpenReply
from blkferry.wire.fuse.replies import (
    Attributes,
    attr_reply,
    failure,
    lseek_reply,
    open_reply,
    statfs_reply,
    statx_reply,
    success,
)
from blkferry.wire.fuse.requests import (
    Fallocate,
    Init,
    Interrupt,
    Lseek,
    Open,
    ProtocolError,
    Release,
    Request,
    Setattr,
    Transfer,
    parse,
)

if TYPE_CHECKING:
    from blkferry.exports.fuse.session import Session

log = logging.getLogger(__name__)

_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

_REFUSALS: Final[dict[int, int]] = {
    Opcode.LOOKUP: errno.ENOENT,
    Opcode.READLINK: errno.EINVAL,
    Opcode.IOCTL: errno.ENOTTY,
    Opcode.OPENDIR: errno.ENOTDIR,
    Opcode.READDIR: errno.ENOTDIR,
    Opcode.READDIRPLUS: errno.ENOTDIR,
    Opcode.MKNOD: errno.ENOTDIR,
    Opcode.MKDIR: errno.ENOTDIR,
    Opcode.CREATE: errno.ENOTDIR,
    Opcode.SYMLINK: errno.ENOTDIR,
    Opcode.LINK: errno.ENOTDIR,
    Opcode.UNLINK: errno.ENOTDIR,
    Opcode.RMDIR: errno.ENOTDIR,
    Opcode.RENAME: errno.ENOTDIR,
    Opcode.RENAME2: errno.ENOTDIR,
}
"""What does not exist gets ENOSYS, and for most of that the kernel never asks again: extended attributes, poll, and
copy_file_range, which it then does by reading and writing."""


def execute(session: Session, message: memoryview) -> None:
    """Execute any request."""
    try:
        request = parse(message)
    except ProtocolError as error:
        session.complain(error.message)
        if error.unique:
            session.reply(failure(error.unique, errno.EINVAL))
        return
    if request.header.opcode in UNANSWERED:
        if isinstance(request.body, Interrupt):
            session.interrupt(request.body.unique)
        return
    try:
        answer = _execute(session, request)
    except OSError as error:
        session.fail(request.header.unique, error, "a request")
        return
    except Exception:  # our own bug must fail this request, not leave whoever waits for it waiting
        log.exception("%s: request failed: %r", session.root.describe(), request.header)
        answer = failure(request.header.unique, errno.EIO)
    if answer is not None:
        session.reply(answer)


def _execute(session: Session, request: Request) -> bytes | None:
    header = request.header
    if header.opcode == Opcode.INIT:
        return _init(session, request)
    if header.opcode == Opcode.DESTROY:
        return success(header.unique)
    if session.agreed is None:
        return failure(header.unique, errno.EIO)
    if header.nodeid != ROOT_ID:
        return failure(header.unique, errno.ESTALE)
    handler = _HANDLERS.get(header.opcode)
    if handler is None:
        return failure(header.unique, _REFUSALS.get(header.opcode, errno.ENOSYS))
    return handler(session, request)


def _init(session: Session, request: Request) -> bytes | None:
    unique, wanted = request.header.unique, request.body
    assert isinstance(wanted, Init)
    if session.agreed is not None:
        return failure(unique, errno.EIO)
    if init.too_old(wanted):
        session.complain(f"the kernel speaks FUSE {wanted.major}.{wanted.minor}, which is too old")
        session.reply(failure(unique, errno.EPROTO))
        session.close()
        return None
    answer, agreed = init.answer(unique, wanted, page_size=_PAGE_SIZE, passthrough=session.passthrough is not None)
    if agreed is not None:
        session.agree(agreed)
    return answer


# Attributes ----------------------------------------------------------------------------------------------------------


def _attributes(session: Session) -> Attributes:
    passthrough = session.passthrough
    if passthrough is not None and passthrough.opened:
        passthrough.catch_up()
        session.inode.modified = max(session.inode.modified, passthrough.modified())
    return session.inode.attributes(session.places.size, _allocated(session))


def _allocated(session: Session) -> int | None:
    """Host bytes in use, where the file systems of the images can tell at once."""
    node = session.root.node
    storages = [each.storage for each in depends_on(node) if each.storage is not None]
    if not storages or not all(storage.seek_inline for storage in storages):
        return None
    return node.allocated_size()


def _getattr(session: Session, request: Request) -> bytes:
    return attr_reply(request.header.unique, _attributes(session), ATTRIBUTES_SECONDS)


def _statx(session: Session, request: Request) -> bytes:
    return statx_reply(request.header.unique, _attributes(session), ATTRIBUTES_SECONDS)


def _setattr(session: Session, request: Request) -> bytes | None:
    unique, wanted = request.header.unique, request.body
    assert isinstance(wanted, Setattr)
    refusal = session.inode.check(wanted)
    if not refusal and wanted.valid & Fattr.SIZE and wanted.size > MAX_SIZE:
        refusal = errno.EFBIG
    if refusal:
        return failure(unique, refusal)
    if wanted.valid & Fattr.SIZE:
        session.spawn(unique, _truncate(session, request, wanted))
        return None
    session.inode.change(wanted)
    return _getattr(session, request)


async def _truncate(session: Session, request: Request, wanted: Setattr) -> bytes:
    await _set_size(session, wanted.size)
    session.inode.change(wanted)
    return _getattr(session, request)


async def _set_size(session: Session, size: int) -> None:
    async with session.resizing:
        if size != session.root.node.length:
            await transfers.resize(session, size)
    session.inode.touch()


def _statfs(session: Session, request: Request) -> bytes:
    """As if the image were a file system: full where the image has space behind it."""
    size = session.places.size
    allocated = _allocated(session)
    free = size - min(size, allocated) if allocated is not None else 0
    return statfs_reply(request.header.unique, BLOCK_SIZE, -(-size // BLOCK_SIZE), free // BLOCK_SIZE)


# Opening and closing -------------------------------------------------------------------------------------------------


def _open(session: Session, request: Request) -> bytes | None:
    header, wanted = request.header, request.body
    assert isinstance(wanted, Open)
    writes = wanted.flags & os.O_ACCMODE != os.O_RDONLY
    truncates = bool(wanted.flags & os.O_TRUNC)
    if (writes or truncates) and not session.writable:
        return failure(header.unique, errno.EACCES)
    if truncates and session.growable:
        session.spawn(header.unique, _open_truncated(session, request, writes=writes))
        return None
    # A file that does not grow keeps its length, as a block device does: nothing could be written to it otherwise.
    return _opened(session, request, writes=writes)


async def _open_truncated(session: Session, request: Request, *, writes: bool) -> bytes:
    await _set_size(session, 0)
    return _opened(session, request, writes=writes)


def _opened(session: Session, request: Request, *, writes: bool) -> bytes:
    """The page cache of this file would not hear of what others write to the node: reads and writes pass by it, and
    only mappings use it, where the kernel can do both. All that are open at a time go the same way.
    """
    how = OpenReply(0) if writes else OpenReply.NOFLUSH
    backing_id, passthrough = 0, session.passthrough
    if passthrough is not None and (passthrough.opened or not session.handles):
        try:
            backing_id = passthrough.open()
        except Error as error:
            session.complain(error.message)
    how |= OpenReply.PASSTHROUGH if backing_id else OpenReply.DIRECT_IO | OpenReply.PARALLEL_DIRECT_WRITES
    header = request.header
    number = session.opened(header.pid, passes_through=bool(backing_id))
    return open_reply(header.unique, number, how, backing_id)


def _release(session: Session, request: Request) -> bytes:
    assert isinstance(request.body, Release)
    session.released(request.body.fh)
    return success(request.header.unique)


def _flush(session: Session, request: Request) -> bytes | None:
    """FLUSH comes with every close, FSYNC when it is asked for: both make what was written durable."""
    unique = request.header.unique
    if session.passthrough is not None:
        session.passthrough.catch_up()
    target = session.root.node.flush_target()
    if target is None:
        session.spawn(unique, _flush_node(session, unique))
        return None
    session.begin(0)

    def flushed(result: int) -> None:
        if result < 0:
            session.fail(unique, OSError(-result, os.strerror(-result)), "flushing")
        else:
            session.reply(success(unique))
        session.finished(0)

    target.flush(flushed)
    return None


async def _flush_node(session: Session, unique: int) -> bytes:
    await session.root.flush()
    return success(unique)


# Ranges --------------------------------------------------------------------------------------------------------------


def _transfer(session: Session, request: Request) -> bytes | None:
    """A READ or WRITE that was not as the turn expects them, and yet is well formed."""
    wanted = request.body
    assert isinstance(wanted, Transfer)
    transfer = transfers.read if request.header.opcode == Opcode.READ else transfers.write
    transfer(session, request.header.unique, wanted.offset, wanted.size)
    return None


def _fallocate(session: Session, request: Request) -> bytes | None:
    unique, wanted = request.header.unique, request.body
    assert isinstance(wanted, Fallocate)
    refusal = 0
    if not session.writable:
        refusal = errno.EACCES
    elif not wanted.length:
        refusal = errno.EINVAL
    elif wanted.offset + wanted.length > MAX_SIZE:
        refusal = errno.EFBIG
    elif (act := _FALLOCATE.get(wanted.mode)) is None or (not wanted.mode and wanted.offset < session.places.size):
        refusal = errno.EOPNOTSUPP  # space for what is there already: nodes have no way to ask for that
    if refusal:
        return failure(unique, refusal)
    assert act is not None
    session.spawn(unique, _changed(session, unique, act(session, wanted.offset, wanted.length)))
    return None


async def _changed(session: Session, unique: int, work: Coroutine[Any, Any, None]) -> bytes:
    await work
    session.inode.touch()
    return success(unique)


async def _punch(session: Session, offset: int, length: int) -> None:
    """A hole, behind the end of the file too, where there is nothing to do."""
    root = session.root
    length = min(length, root.node.length - offset)
    if length <= 0:
        return
    try:
        await root.write_zeroes(offset, length, unmap=True, fast=True)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or length > PUNCH_BY_WRITING:
            raise
        await root.write_zeroes(offset, length, unmap=True)


async def _zero(session: Session, offset: int, length: int) -> None:
    async with session.resizing:
        if offset + length > session.root.node.length:
            await transfers.resize(session, offset + length)
    await session.root.write_zeroes(offset, length, unmap=False)


async def _zero_inside(session: Session, offset: int, length: int) -> None:
    length = min(length, session.root.node.length - offset)
    if length > 0:
        await session.root.write_zeroes(offset, length, unmap=False)


_FALLOCATE: Final[dict[int, Callable[[Session, int, int], Coroutine[Any, Any, None]]]] = {
    0: _zero,  # only behind the end: what is new is zero already, and gets space
    FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: _punch,
    FALLOC_FL_ZERO_RANGE: _zero,
    FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE: _zero_inside,
}


def _lseek(session: Session, request: Request) -> bytes | None:
    unique, wanted = request.header.unique, request.body
    assert isinstance(wanted, Lseek)
    if wanted.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        return failure(unique, errno.EINVAL)
    session.spawn(unique, _seek(session, unique, wanted.offset, holes=wanted.whence == os.SEEK_HOLE))
    return None


async def _seek(session: Session, unique: int, offset: int, *, holes: bool) -> bytes:
    size = session.root.node.length
    if offset > size:
        return failure(unique, errno.ENXIO)
    while offset < size:
        for stretch in await session.root.status(offset, size - offset):
            if stretch.zero is holes:
                return lseek_reply(unique, offset)
            offset += stretch.length
    if holes:  # there is one behind the end
        return lseek_reply(unique, size)
    return failure(unique, errno.ENXIO)


_HANDLERS: Final[dict[int, Callable[[Session, Request], bytes | None]]] = {
    Opcode.GETATTR: _getattr,
    Opcode.SETATTR: _setattr,
    Opcode.STATX: _statx,
    Opcode.STATFS: _statfs,
    Opcode.OPEN: _open,
    Opcode.RELEASE: _release,
    Opcode.FLUSH: _flush,
    Opcode.FSYNC: _flush,
    Opcode.READ: _transfer,
    Opcode.WRITE: _transfer,
    Opcode.FALLOCATE: _fallocate,
    Opcode.LSEEK: _lseek,
}
