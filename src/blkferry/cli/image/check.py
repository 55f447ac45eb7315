"""`blkferry image check`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from blkferry.cli.image.common import PROGRAM, Common, format_option, run, shared
from blkferry.cli.image.progress import showing

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.imaging.checking import Checked, CheckResult

FAILED, CORRUPT, LEAKED, IMPOSSIBLE = 1, 2, 3, 63


@click.command(
    "check",
    short_help="Look for damage in an image, and repair it.",
    epilog="Exit codes: 0 all is well, 1 the check could not be done, 2 the image is damaged, 3 space is wasted and "
    "nothing else, 63 the format has nothing to check.",
)
@click.argument("image")
@format_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="Give wasted space back, or repair everything that can be.",
)
@shared(progress=True, caches=("-T",))
def command(common: Common, image: str, *, image_format: str | None, repair: str | None) -> None:
    """Look for damage in an image, and repair it.

    Nobody may use it meanwhile. What a repair cannot bring back reads as zeroes afterwards: have a copy first.
    """
    if repair is not None and common.force_share:
        raise click.UsageError("--repair writes to the image, so that it cannot go with --force-share.")
    with showing(common, "Checking") as progress:

        async def work(daemon: Daemon) -> Checked | None:
            from blkferry.daemon.imaging import checking
            from blkferry.errors import Error, ErrorKind

            wanted = checking.Repair(repair or "none")
            name = common.name(image, image_format)
            try:
                return await checking.check(daemon, name, repair=wanted, progress=progress)
            except Error as error:
                if error.kind is not ErrorKind.UNSUPPORTED or "checks" not in error.message:
                    raise
                common.failure = IMPOSSIBLE
                raise

        checked = run(common, work)
    assert checked is not None
    if common.as_json:
        common.answer(_members(checked))
    else:
        _tell(common, checked.result, repair=repair is not None)
    sys.exit(_exit_code(checked.result))


def _exit_code(result: CheckResult) -> int:
    if result.check_errors:
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKED if result.leaks else 0


def _members(checked: Checked) -> dict[str, Any]:
    result = checked.result
    optional = {
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "image-end-offset": result.image_end_offset,
        "messages": result.messages,
    }
    return {
        "filename": checked.filename,
        "format": checked.image_format,
        "check-errors": result.check_errors,
        **{name: value for name, value in optional.items() if value},
    }


def _tell(common: Common, result: CheckResult, *, repair: bool) -> None:
    if common.quiet:
        return
    for message in result.messages:
        sys.stderr.write(f"{message}\n")
    if repair and (result.leaks_fixed or result.corruptions_fixed):
        click.echo(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n"
            f"    {result.corruptions_fixed} corruptions\n"
        )
    click.echo("".join(_summary(result)), nl=False)
    if (result.corruptions or result.leaks) and not repair:
        sys.stderr.write(f"To repair it: {PROGRAM} image check --repair {'all' if result.corruptions else 'leaks'}\n")


def _summary(result: CheckResult) -> list[str]:
    lines = []
    if result.clean:
        lines.append("No errors were found on the image.\n")
    if result.corruptions:
        lines.append(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if result.leaks:
        lines.append(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data.\n"
        )
    if result.check_errors:
        lines.append(f"\n{result.check_errors} internal errors have occurred during the check.\n")
    if result.total_clusters and result.allocated_clusters:
        allocated = result.allocated_clusters
        lines.append(
            f"{allocated}/{result.total_clusters} = {100 * allocated / result.total_clusters:.2f}% allocated, "
            f"{100 * result.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * result.compressed_clusters / allocated:.2f}% compressed clusters\n"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}\n")
    return lines
