"""`memory`: a disk in memory that is gone when it is closed. Ours: QEMU has nothing like it."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal

from blkferry.errors import Error, ErrorKind
from blkferry.graph.descriptor import DescriptorNode
from blkferry.graph.graph import Opening
from blkferry.graph.reopen import Reopening
from blkferry.plane.storage import Storage
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.qapi import EXTENSION, Doc, Size, branch


@branch
class BlockdevOptionsMemory(BlockdevOptions):
    """A disk in memory, empty at first; only what is written takes space."""

    driver: Literal["memory"] = "memory"
    size: Annotated[Size, Doc("size in bytes", features=(EXTENSION,))]


class Memory(DescriptorNode):
    """A node over an anonymous file in memory."""

    driver: ClassVar[str] = "memory"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsMemory
    options: BlockdevOptionsMemory

    async def open(self, opening: Opening) -> None:
        fd = os.memfd_create(f"blkferry:{self.name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.options.size)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise Error(
                ErrorKind.INVALID_ARGUMENT, f"Cannot make a memory disk of {self.options.size} bytes: {error}"
            ) from error
        self.adopt(Storage(fd, self.services, writable=not opening.read_only))

    async def reopen_commit(self, reopening: Reopening) -> None:
        self.storage.writable = not reopening.read_only

    def filename(self) -> str:
        return f"memory:{self.options.size}"
