"""The one file of the mount, as stat(2) shows it: whose it is, what may be done with it, and when it was changed."""

from __future__ import annotations

import errno
import os
import stat
import time

from blkferry.exports.fuse.limits import BLOCK_SIZE
from blkferry.wire.fuse.constants import Fattr
from blkferry.wire.fuse.replies import Attributes
from blkferry.wire.fuse.requests import Setattr

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_SILENT = Fattr.FH | Fattr.LOCKOWNER | Fattr.KILL_SUIDGID
"""Says nothing about the file itself."""


class Inode:
    """Mode, owner and times. `modified` is in ns since 1970: when the file was last written through this mount."""

    def __init__(self, *, writable: bool, allow_other: bool) -> None:
        self._writable = writable
        self._allow_other = allow_other
        self.mode = stat.S_IFREG | stat.S_IRUSR | (stat.S_IWUSR if writable else 0)
        self._uid = os.getuid()
        self._gid = os.getgid()
        self._made = self._changed = self.modified = time.time_ns()

    def attributes(self, size: int, allocated: int | None) -> Attributes:
        """What stat(2) shows of a file of `size` bytes; `allocated` of them take space, if that is known."""
        return Attributes(
            size=size,
            blocks=((size if allocated is None else allocated) + 511) // 512,
            atime=self._made,
            mtime=self.modified,
            ctime=max(self._changed, self.modified),
            mode=self.mode,
            uid=self._uid,
            gid=self._gid,
            blksize=BLOCK_SIZE,
        )

    def check(self, wanted: Setattr) -> int:
        """Whether the file may be changed like that: 0 or an errno."""
        valid = wanted.valid & ~_SILENT
        allowed = Fattr.SIZE | Fattr.MODE | (Fattr.UID | Fattr.GID if self._allow_other else Fattr(0))
        if valid & ~allowed:
            return errno.EOPNOTSUPP
        if valid & Fattr.MODE:
            if not self._allow_other and wanted.mode & _OTHERS:
                return errno.EPERM  # those cannot get at the file anyway
            if not self._writable and wanted.mode & _WRITE:
                return errno.EROFS
        if valid & Fattr.SIZE and not self._writable:
            return errno.EACCES
        return 0

    def touch(self) -> None:
        """The file was written."""
        self.modified = time.time_ns()

    def change(self, wanted: Setattr) -> None:
        """Take over mode and owner, which have been checked."""
        if wanted.valid & Fattr.MODE:
            self.mode = stat.S_IFREG | stat.S_IMODE(wanted.mode)
        if wanted.valid & Fattr.UID:
            self._uid = wanted.uid
        if wanted.valid & Fattr.GID:
            self._gid = wanted.gid
        self._changed = time.time_ns()
