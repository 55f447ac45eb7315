"""One client's QMP conversation: bytes in, commands out; replies and events in, bytes out.

`receive` bytes, then take `next_event` until it is None. Nothing is parsed ahead of that, so a transport that
runs a command to its end before it asks for the next event, and hands over more bytes only when there is
none, runs commands in order and needs no queue.

Knows the envelope and the negotiation, but neither the commands nor their arguments: whoever runs a command
says `reply` or `error` for it. No command may run out of band, so `exec-oob` is answered here, as is
`qmp_capabilities`.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Final

from blkferry.errors import Error, ErrorKind
from blkferry.wire.qmp.stream import NEED_DATA, Fault, Parser
from blkferry.wire.qmp.text import shown

CAPABILITIES = ("oob",)
MAX_ID_DEPTH = 64  # an id becomes text again in the reply, by an encoder that recurses


class QmpClass(enum.Enum):
    """`QapiErrorClass`, as far as it is in use."""

    GENERIC_ERROR = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"


CLASS_OF_KIND = dict.fromkeys(ErrorKind, QmpClass.GENERIC_ERROR) | {
    ErrorKind.UNKNOWN_COMMAND: QmpClass.COMMAND_NOT_FOUND,
}


class _NoId(enum.Enum):
    NO_ID = enum.auto()


NO_ID: Final = _NoId.NO_ID
"""The command came without an id (null is an id)."""


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """The client wants `name` run. Answer it with `Session.reply` or `Session.error` and this `id`."""

    name: str
    arguments: dict[str, object]
    id: object = NO_ID


@dataclass(frozen=True, slots=True)
class Answered:
    """The session dealt with a message by itself; `data` goes to the client."""

    data: bytes


class Mode(enum.Enum):
    NEGOTIATING = "negotiating"
    READY = "ready"


class Session:
    """The server side of one connection. It starts over with each client."""

    def __init__(self, *, pretty: bool = False) -> None:
        self.mode = Mode.NEGOTIATING
        self._indent = 4 if pretty else None
        self._enabled: frozenset[str] = frozenset()
        self._parser = Parser()

    def greeting(self, version: tuple[int, int, int], package: str) -> bytes:
        major, minor, micro = version
        numbers = {"micro": micro, "minor": minor, "major": major}
        return self._line({"QMP": {"version": {"qemu": numbers, "package": package}, "capabilities": [*CAPABILITIES]}})

    def receive(self, data: bytes) -> None:
        self._parser.feed(data)

    def next_event(self) -> CommandReceived | Answered | None:
        message = self._parser.next_value()
        if message is NEED_DATA:
            return None
        if isinstance(message, Fault):
            return Answered(self.error(NO_ID, _wrong(message.text)))
        try:
            message_id = _id_of(message)
        except Error as error:
            return Answered(self.error(NO_ID, error))
        try:
            command = self._command(message, message_id)
            if self.mode is Mode.READY and command.name != "qmp_capabilities":
                return command
            return Answered(self._negotiate(command))
        except Error as error:
            return Answered(self.error(message_id, error))

    def reply(self, command_id: object, result: object) -> bytes:
        return self._response({"return": result}, command_id)

    def error(self, command_id: object, error: Error) -> bytes:
        fact = {"class": CLASS_OF_KIND[error.kind].value, "desc": error.message}
        return self._response({"error": fact}, command_id)

    def event(self, name: str, data: dict[str, object], now_ns: int) -> bytes:
        seconds, rest_ns = divmod(now_ns, 1_000_000_000)
        event: dict[str, object] = {
            "timestamp": {"seconds": seconds, "microseconds": rest_ns // 1000},
            "event": name,
        }
        if data:
            event["data"] = data
        return self._line(event)

    def _command(self, message: object, message_id: object) -> CommandReceived:
        """Check the envelope."""
        if not isinstance(message, dict):
            raise _wrong("QMP input must be a JSON object")
        verbs = ("execute", "exec-oob") if "oob" in self._enabled else ("execute",)
        name, arguments, verb = None, {}, "execute"
        for member, value in message.items():
            if member in verbs:
                if not isinstance(value, str):
                    raise _wrong(f"QMP input member '{member}' must be a string")
                if name is not None:
                    raise _wrong("QMP input member 'execute' clashes with 'exec-oob'")
                name, verb = value, member
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise _wrong("QMP input member 'arguments' must be an object")
                arguments = value
            elif member != "id":
                raise _wrong(f"QMP input member '{shown(member)}' is unexpected")
        if name is None:
            raise _wrong("QMP input lacks member 'execute'")
        if verb == "exec-oob":
            raise _wrong(f"The command {shown(name)} does not support OOB")
        return CommandReceived(name, arguments, message_id)

    def _negotiate(self, command: CommandReceived) -> bytes:
        if command.name != "qmp_capabilities":
            raise Error(ErrorKind.UNKNOWN_COMMAND, "Expecting capabilities negotiation with 'qmp_capabilities'")
        enabled = _capabilities(command.arguments)
        if self.mode is Mode.READY:
            raise Error(ErrorKind.UNKNOWN_COMMAND, "Capabilities negotiation is already complete, command ignored")
        self.mode = Mode.READY
        self._enabled = enabled
        return self.reply(command.id, {})

    def _response(self, response: dict[str, object], command_id: object) -> bytes:
        if command_id is not NO_ID:
            response["id"] = command_id
        return self._line(response)

    def _line(self, message: dict[str, object]) -> bytes:
        # File names that are not Unicode arrive with surrogates: they lose characters, not the connection.
        text = json.dumps(message, indent=self._indent, ensure_ascii=False, allow_nan=False)
        return text.encode(errors="replace") + b"\r\n"


def _wrong(sentence: str) -> Error:
    return Error(ErrorKind.INVALID_ARGUMENT, sentence)


def _id_of(message: object) -> object:
    """Return the message's id, if it has one that can be sent back."""
    if not isinstance(message, dict) or "id" not in message:
        return NO_ID
    message_id: object = message["id"]
    level = [message_id]
    for _ in range(MAX_ID_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return message_id
    raise _wrong(f"QMP input member 'id' nests deeper than {MAX_ID_DEPTH} levels")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _capabilities(arguments: dict[str, object]) -> frozenset[str]:
    """Validate what `qmp_capabilities` was given: `enable`, a list of capabilities of ours."""
    for name in arguments:
        if name != "enable":
            raise _wrong(f"Parameter '{shown(name)}' is unexpected")
    enable = arguments.get("enable", [])
    if not isinstance(enable, list):
        raise _wrong("Invalid parameter type for 'enable', expected: array")
    for index, capability in enumerate(enable):
        if not isinstance(capability, str):
            raise _wrong(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if capability not in CAPABILITIES:
            raise _wrong(f"Parameter 'enable[{index}]' does not accept value '{shown(capability)}'")
    return frozenset(enable)
