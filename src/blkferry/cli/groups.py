"""Groups of commands that know what was meant, and import a command when it is wanted."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click


class Commands(click.Group):
    """A group that knows what was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            close = difflib.get_close_matches(args[0][:32], names, 1)
            wanted = f"Did you mean '{close[0]}'?" if close else f"There is: {', '.join(names)}."
            ctx.fail(f"No such command '{args[0]}'. {wanted}")
        return super().resolve_command(ctx, args)


class LazyCommands(Commands):
    """A group whose commands are each in a module of their own, as `command`, imported when it is asked for.

    `modules` says where, by the commands' names; `exit_codes` what a wrong command line ends with, where that is not 1.
    """

    def __init__(
        self, *args: Any, modules: Mapping[str, str], exit_codes: Mapping[str, int], **attributes: Any
    ) -> None:
        super().__init__(*args, **attributes)
        self._modules = modules
        self._exit_codes = exit_codes

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        module = self._modules.get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        name = (ctx._protected_args or ctx.args or [""])[0]  # noqa: SLF001 - where click keeps it
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            ctx.exit(self._exit_codes.get(name, 1))
