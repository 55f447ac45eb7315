"""Objects that others refer to by id (`--object`, object-add).

The options of an object type are a branch of `ObjectOptions`; those of types other than iothread live with
them.
"""

from typing import Annotated, Literal

from blkferry.schema.qapi import Command, Doc, Struct, bounded, branch, union

_NON_NEGATIVE = bounded(0, 2**63 - 1)


@union("qom-type")
class ObjectOptions(Struct):
    """An object."""

    qom_type: Annotated[str, Doc("the type of the object", since="2.0")]
    id: Annotated[str, Doc("name of the object", since="2.0")]


@branch
class IothreadProperties(ObjectOptions):
    """A thread with a loop of its own, for exports and their nodes."""

    qom_type: Literal["iothread"] = "iothread"
    poll_max_ns: Annotated[int, _NON_NEGATIVE, Doc("longest busy wait before sleeping; 0 never waits", since="2.9")] = (
        32768
    )
    poll_grow: Annotated[int, _NON_NEGATIVE, Doc("factor by which the wait grows; 0 chooses", since="2.9")] = 0
    poll_shrink: Annotated[int, _NON_NEGATIVE, Doc("divisor by which the wait shrinks; 0 resets it", since="2.9")] = 0
    aio_max_batch: Annotated[int, _NON_NEGATIVE, Doc("requests submitted at once; 0 chooses", since="6.1")] = 0
    thread_pool_min: Annotated[int, _NON_NEGATIVE, Doc("worker threads kept ready", since="7.1")] = 0
    thread_pool_max: Annotated[int, _NON_NEGATIVE, Doc("most worker threads", since="7.1")] = 64


class ObjectDel(Struct):
    """Arguments of object-del."""

    id: Annotated[str, Doc("the object to remove")]


COMMANDS = (
    Command("object-add", "Create an object.", ObjectOptions, since="2.0"),
    Command("object-del", "Remove an object that nothing uses.", ObjectDel, since="2.0"),
)
