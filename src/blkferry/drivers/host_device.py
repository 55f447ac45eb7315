"""`host_device`: a block device of the host, whole (a disk, a partition, a loop device, a logical volume)."""

from __future__ import annotations

import os
import stat
from typing import ClassVar, Literal

from blkferry.drivers.file import File, FileOptionsBase
from blkferry.errors import Error, ErrorKind
from blkferry.graph.node import Node
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.image import ImageInfo
from blkferry.schema.qapi import branch


@branch
class BlockdevOptionsHostDevice(FileOptionsBase):
    """A block device of the host."""

    driver: Literal["host_device"] = "host_device"


class HostDevice(File):
    """A node over a block device."""

    driver: ClassVar[str] = "host_device"
    options_type: ClassVar[type[BlockdevOptions]] = BlockdevOptionsHostDevice
    create_options: ClassVar[type[BlockdevCreateOptions] | None] = None

    def image_info(self) -> ImageInfo:
        return Node.image_info(self)

    def _check_kind(self, status: os.stat_result) -> None:
        if not stat.S_ISBLK(status.st_mode):
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                f"'host_device' driver requires '{self.options.filename}' to be a block device",
                hint="Use the file driver for a regular file.",
                path=self.options.filename,
            )
