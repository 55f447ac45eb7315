"""blockdev-create: making images.

What a driver needs to know is a branch of `BlockdevCreateOptions` and lives with the driver. A driver that can make no
images has a branch without members all the same (`unable`), so that asking it gets the driver's own answer.
"""

import enum
from typing import Annotated

from blkferry.schema.qapi import Command, Doc, Struct, branch, union, variants


class PreallocMode(enum.StrEnum):
    """What is allocated when an image is made."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@union("driver")
class BlockdevCreateOptions(Struct):
    """An image to make."""

    driver: Annotated[str, Doc("the block driver that makes it", since="3.0")]


def unable(name: str) -> None:
    """Let the driver `name`, unless it has said how it makes images, be accepted where it may refuse for itself."""
    if name not in variants(BlockdevCreateOptions).known:

        class Unable(BlockdevCreateOptions):
            """Makes no images."""

            driver: str = name

        branch(Unable)


class BlockdevCreate(Struct):
    """Arguments of blockdev-create."""

    job_id: Annotated[str, Doc("name of the job", since="3.0")]
    options: Annotated[BlockdevCreateOptions, Doc("what to make", since="3.0")]


COMMANDS = (
    Command(
        "blockdev-create",
        "Begin to make an image, as a job that stays until job-dismiss.",
        BlockdevCreate,
        since="3.0",
    ),
)
