"""The job of blockdev-create."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.graph import registry
from blkferry.jobs.job import Job
from blkferry.schema.job import JobType

if TYPE_CHECKING:
    from blkferry.graph.graph import Graph
    from blkferry.schema.create import BlockdevCreateOptions


class CreateJob(Job):
    """Makes one image; stays until job-dismiss, for its end is the only answer there is."""

    kind: ClassVar[JobType] = JobType.CREATE

    def __init__(self, job_id: str, graph: Graph, options: BlockdevCreateOptions) -> None:
        """Raise Error when the driver makes no images."""
        super().__init__(job_id, auto_dismiss=False)
        self._graph = graph
        self._options = options
        self._driver = registry.driver(options.driver)
        if self._driver.create_options is None:
            raise Error(
                ErrorKind.UNSUPPORTED,
                "Driver does not support blockdev-create",
                hint=f"'{options.driver}' makes no images.",
                driver=options.driver,
            )

    async def run(self) -> None:
        self.total = 1
        try:
            await self._driver.create(self._graph, self._options)
        finally:
            self.progress = 1
