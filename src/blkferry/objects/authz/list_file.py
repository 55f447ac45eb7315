"""`authz-listfile`: the rules of `authz-list` in a file, as JSON, read again when it has changed.

A file that cannot be understood denies everybody until it is mended; one that is gone changes nothing, as editors take
files away for a moment. The file is looked at when somebody asks, by its time and size: nothing watches it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Annotated, ClassVar, Literal

import msgspec

from blkferry.errors import Error, ErrorKind
from blkferry.graph.graph import Graph
from blkferry.objects.authz.base import Authz
from blkferry.objects.authz.rules import QAuthZListPolicy, QAuthZListRule, decide
from blkferry.schema.qapi import Doc, Struct, branch
from blkferry.schema.qom import ObjectOptions
from blkferry.schema.visit import visit

log = logging.getLogger(__name__)

MAX_FILE = 1 << 20
"""Bytes of a file: thousands of rules."""


class Rules(Struct):
    """What is in the file."""

    policy: Annotated[QAuthZListPolicy, Doc("what becomes of who fits no rule")] = QAuthZListPolicy.DENY
    rules: Annotated[list[QAuthZListRule] | None, Doc("the rules; the first that fits decides")] = None


@branch
class AuthZListFileProperties(ObjectOptions):
    """Allow or deny identities by rules in a file."""

    qom_type: Literal["authz-listfile"] = "authz-listfile"
    filename: Annotated[str, Doc("the file: JSON, with the members of authz-list", since="4.0")]
    refresh: Annotated[bool, Doc("whether it is read again when it changes", since="4.0")] = True


@branch
class AuthZListFileAliasProperties(AuthZListFileProperties):
    """The same, under the name by which QEMU's manual knows it."""

    qom_type: Literal["authz-list-file"] = "authz-list-file"  # type: ignore[assignment]  # one branch, two tags


class AuthzListFile(Authz):
    """Allows by rules in a file."""

    kind: ClassVar[str] = "authz-listfile"
    options_type: ClassVar[type[ObjectOptions]] = AuthZListFileProperties

    def __init__(self, options: ObjectOptions) -> None:
        assert isinstance(options, AuthZListFileProperties)
        super().__init__(options)
        self._path = options.filename
        self._refresh = options.refresh
        self._lock = threading.Lock()
        self._rules: Rules | None = None
        self._stamp: tuple[int, ...] = ()

    async def start(self, graph: Graph, engine: str) -> None:
        """Read the file; raises Error when that cannot be done."""
        del graph, engine
        await asyncio.to_thread(self._load)

    async def allows(self, identity: str) -> bool:
        if self._refresh:
            await asyncio.to_thread(self._renew)
        rules = self._rules
        return rules is not None and decide(identity, rules.rules or (), rules.policy)

    def _renew(self) -> None:
        with self._lock:
            try:
                if _stamp(self._path) != self._stamp:
                    self._load()
                    log.info("%s: read again from %s", self.id, self._path)
            except FileNotFoundError:
                return
            except (Error, OSError) as error:
                self._rules = None
                log.error("%s: nobody is allowed any more: %s", self.id, error)  # noqa: TRY400 - nobody's bug

    def _load(self) -> None:
        doing = f"Unable to read {self._path}"
        try:
            self._stamp = _stamp(self._path)
            with open(self._path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise Error.from_oserror(doing, error, path=self._path) from None
        except ValueError:  # a NUL in the path
            raise Error(ErrorKind.INVALID_ARGUMENT, f"{doing}: not a path") from None
        if len(data) > MAX_FILE:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"{doing}: it is larger than 1 MiB", path=self._path)
        self._rules = parse(data, self._path)


class AuthzListFileAlias(AuthzListFile):
    """The same under another name."""

    kind: ClassVar[str] = "authz-list-file"
    options_type: ClassVar[type[ObjectOptions]] = AuthZListFileAliasProperties


def parse(data: bytes, path: str) -> Rules:
    """The rules in a file. Raises Error."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"File '{path}' must contain JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise Error(ErrorKind.INVALID_ARGUMENT, f"File '{path}' must contain a JSON object", path=path)
    try:
        return visit(Rules, value)
    except Error as error:
        raise Error(ErrorKind.INVALID_ARGUMENT, f"File '{path}': {error}", hint=error.hint, path=path) from None


def _stamp(path: str) -> tuple[int, ...]:
    """What differs when a file has been changed or replaced."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
