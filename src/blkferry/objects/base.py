"""What every object is: something with an id that nodes, exports or other objects refer to.

An object type is one subclass and one entry point (`blkferry.objects`). All methods are called on the daemon's main
loop. The daemon starts an object before anybody can find it, and stops it only when `users` names nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from blkferry.graph.graph import Graph
from blkferry.schema.qom import ObjectOptions


class BlkObject:
    """Base of object types: `kind` is the name of the type, `options_type` the branch of the schema it comes from."""

    kind: ClassVar[str]
    options_type: ClassVar[type[ObjectOptions]]

    def __init__(self, options: ObjectOptions) -> None:
        self.id = options.id

    async def start(self, graph: Graph, engine: str) -> None:
        """Become usable, or raise Error and leave nothing behind. `engine` is the daemon's choice of that name."""

    async def stop(self) -> None:
        """Give back what `start` took; nobody uses the object any more."""

    def users(self, graph: Graph) -> Iterable[str]:
        """Who would break if it went away now, each described for an error message."""
        del graph
        return ()
