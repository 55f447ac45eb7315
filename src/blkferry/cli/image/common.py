"""What all image commands share: options, running the work with a daemon of its own, and how it ends.

Standard output carries what was asked for, standard error progress and complaints.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from blkferry.cli.console import complain, log_to_stderr

if TYPE_CHECKING:
    from blkferry.daemon.daemon import Daemon
    from blkferry.daemon.imaging.names import ImageName
    from blkferry.errors import Error

PROGRAM = "blkferry"
CACHES = ("writeback", "none", "unsafe", "writethrough", "directsync")

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Common:
    """What the shared options said."""

    objects: list[str] = field(default_factory=list)
    as_options: bool = False
    force_share: bool = False
    as_json: bool = False
    quiet: bool = False
    progress: bool = False
    cache: str = "writeback"
    failure: int = 1
    """The exit code when anything goes wrong."""

    def name(self, image: str, image_format: str | None = None, **more: Any) -> ImageName:
        """An image as the command line calls it."""
        from blkferry.daemon.imaging.names import ImageName

        more.setdefault("force_share", self.force_share)
        more.setdefault("cache", self.cache)
        return ImageName(name=image, image_format=image_format, as_options=self.as_options, **more)

    def say(self, text: str) -> None:
        """Tell a person what was done."""
        if not (self.quiet or self.as_json):
            click.echo(text)

    def answer(self, value: object) -> None:
        """Tell a program."""
        click.echo(json.dumps(value, indent=4))


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.ensure_object(Common), name, list(value) if isinstance(value, tuple) else value)

    return callback


def _set_output(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Common).as_json = value == "json"


def shared(
    *, share: bool = True, progress: bool = False, opts: bool = True, caches: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Add the options that commands share; the command is then given `Common` as its first argument.

    `caches` are the letters of qemu-img's options for cache modes.
    """
    options = [
        click.option("--json", is_flag=True, callback=_set("as_json"), expose_value=False, help="Answer in JSON."),
        click.option(
            "--output",
            type=click.Choice(["human", "json"]),
            callback=_set_output,
            expose_value=False,
            hidden=True,
        ),
        click.option("-q", "--quiet", is_flag=True, callback=_set("quiet"), expose_value=False, help="Say nothing."),
        click.option(
            "--object",
            multiple=True,
            metavar="OBJECT",
            callback=_set("objects"),
            expose_value=False,
            help="Make an object, above all a password: secret,id=key,file=PATH.",
        ),
    ]
    if progress:
        options.insert(
            0,
            click.option(
                "-p",
                "--progress",
                is_flag=True,
                callback=_set("progress"),
                expose_value=False,
                help="Show progress even where there is no terminal.",
            ),
        )
    options += [
        click.option(
            each,
            type=click.Choice(CACHES),
            callback=_set("cache"),
            expose_value=False,
            help="How the host's cache is used.  [default: writeback]",
        )
        for each in caches[:1]
    ]
    options += [
        click.option(each, type=click.Choice(CACHES), callback=_set("cache"), expose_value=False, hidden=True)
        for each in caches[1:]
    ]
    if share:
        options.append(
            click.option(
                "-U",
                "--force-share",
                is_flag=True,
                callback=_set("force_share"),
                expose_value=False,
                help="Read an image that is in use; what is read may be from different times.",
            )
        )
    if opts:
        options.append(
            click.option(
                "--image-opts",
                is_flag=True,
                callback=_set("as_options"),
                expose_value=False,
                help="Take images as driver=...,key=value,... instead of paths.",
            )
        )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return click.pass_context(_with_common(command))  # type: ignore[return-value]

    return decorate


def _with_common(command: Command) -> Callable[..., Any]:
    def invoke(ctx: click.Context, /, *args: Any, **parameters: Any) -> Any:
        return ctx.invoke(command, ctx.ensure_object(Common), *args, **parameters)

    invoke.__doc__ = command.__doc__
    invoke.__name__ = command.__name__
    invoke.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    return invoke


format_option = click.option(
    "-f", "--format", "image_format", metavar="FORMAT", help="Format of the image.  [default: what it looks like]"
)


def run(common: Common, work: Callable[[Daemon], Coroutine[Any, Any, Result]]) -> Result:
    """Do the work with a daemon of its own; what goes wrong is said, and ends the program."""
    from blkferry.errors import Error
    from blkferry.plane.loops import new_event_loop

    log_to_stderr(PROGRAM)
    ended: list[int] = []
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_live(common, work, ended))
    except Error as error:
        fail(common, error)
    except OSError as error:
        fail(common, Error.from_oserror("The storage failed", error))
    except asyncio.CancelledError:
        sys.exit(128 + ended[0] if ended else common.failure)


async def _live(common: Common, work: Callable[[Daemon], Coroutine[Any, Any, Result]], ended: list[int]) -> Result:
    from blkferry.daemon.daemon import Daemon
    from blkferry.schema.keyval import Help, parse_option
    from blkferry.schema.qom import ObjectOptions

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def interrupt(number: int) -> None:
        ended.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    async with Daemon() as daemon:
        for text in common.objects:
            options = parse_option(ObjectOptions, text, implied="qom-type")
            if isinstance(options, Help):
                click.echo(options.text)
                raise click.exceptions.Exit(0)
            await daemon.objects.add(options)
        return await work(daemon)


def fail(common: Common, error: Error) -> NoReturn:
    """Say what is wrong and end."""
    complain(PROGRAM, error)
    sys.exit(common.failure)
