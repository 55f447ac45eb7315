"""Checking an image and repairing it, without opening it as what it is: a damaged one may not let itself be opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkferry.daemon.imaging.copying import Progress, ignore_progress
from blkferry.daemon.imaging.names import QCOW2, ImageName, file_of, opened, options_of, probed
from blkferry.drivers.qcow2.checking import Repair
from blkferry.drivers.qcow2.checking import check as check_qcow2
from blkferry.drivers.qcow2.findings import CheckResult
from blkferry.drivers.qcow2.hostfile import HostFile
from blkferry.drivers.qcow2.opening import read_header
from blkferry.errors import Error, ErrorKind

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.graph.loan import Loan

__all__ = ["CheckResult", "Checked", "Repair", "check"]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in which image."""

    filename: str
    image_format: str
    result: CheckResult


async def check(
    daemon: Daemon, image: ImageName, *, repair: Repair = Repair.NONE, progress: Progress = ignore_progress
) -> Checked:
    """Check an image. Raises Error(UNSUPPORTED) for a format that has nothing to check."""
    image = await daemon.services.in_thread(probed, image)
    options = await daemon.services.in_thread(options_of, image)
    if options["driver"] != QCOW2 or not isinstance(options["file"], dict):
        raise Error(
            ErrorKind.UNSUPPORTED,
            "This image format does not support checks",
            hint=f"'{image}' is {options['driver']}.",
        )
    file = file_of(image, options)
    async with opened(daemon, file, "check", writable=repair is not Repair.NONE) as loan:
        result = await loan.run(_run(loan, image, repair, progress))
    path = options["file"].get("filename", image.name)
    return Checked(path, QCOW2, result)


async def _run(loan: Loan, image: ImageName, repair: Repair, progress: Progress) -> CheckResult:
    try:
        header = await read_header(HostFile(loan.node))
    except (Error, OSError) as error:
        if isinstance(error, OSError):
            raise Error.from_oserror(f"Could not open '{image}'", error) from error
        raise Error(error.kind, f"Could not open '{image}': {error.message}", hint=error.hint) from error
    return await check_qcow2(loan.node, header, repair=repair, progress=progress)
