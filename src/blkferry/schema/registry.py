"""All commands and events by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blkferry.schema import bitmap, block, char, control, create, export, job, qom, snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blkferry.schema.qapi import Command, Event

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for module in (control, block, bitmap, create, snapshot, job, export, qom, char)
    for command in module.COMMANDS
}

EVENTS: Mapping[str, Event] = {event.name: event for module in (export, job, block) for event in module.EVENTS}
