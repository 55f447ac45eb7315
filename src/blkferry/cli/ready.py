"""What `blkferry serve` says once it serves: the URI of each export, and lines to paste that make use of it.

One layout for everybody; on a terminal rich colours it. A reader who has gone away is no reason to stop serving.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blkferry.daemon.nbd_servers import uri_of
from blkferry.schema.sockets import SocketAddress, SocketAddressInet, SocketAddressUnix
from blkferry.units import format_size

LABEL_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Offer:
    """One export that is there."""

    name: str
    image: str
    size: int
    writable: bool
    addresses: tuple[SocketAddress, ...]
    tls: bool = False

    @property
    def uris(self) -> list[str]:
        found = (uri_of(address, self.name, tls=self.tls) for address in self.addresses)
        return [uri for uri in found if uri is not None]

    @property
    def places(self) -> list[str]:
        return self.uris

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "image": self.image,
            "size": self.size,
            "writable": self.writable,
            "uris": self.uris,
        }

    def clients(self) -> Iterator[tuple[str, str]]:
        """What one might do with it: a word for it, and the command line."""
        if not self.uris:
            return
        uri = shlex.quote(self.uris[0])
        drive = f"file={self.uris[0]},format=raw,if=virtio" + ("" if self.writable else ",readonly=on")
        yield "copy", f"nbdcopy {uri} copy.img"
        if self.tls:  # the others need to be told where the client's credentials are
            return
        yield "inspect", f"qemu-img info {uri}"
        yield "boot", f"qemu-system-x86_64 -m 1G -drive {shlex.quote(drive)}"
        match self.addresses[0]:
            case SocketAddressUnix(path=path):
                where = f"-unix {shlex.quote(path)}"
            case SocketAddressInet(host=host, port=port):
                where = f"{shlex.quote(host)} {port}"
            case _:
                return
        yield "attach", f"sudo nbd-client {where} /dev/nbd0 -N {shlex.quote(self.name)}"


class Offered(Protocol):
    """What there is to say of one export of any kind."""

    @property
    def image(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def places(self) -> list[str]:
        """Where it is, for programs."""

    def clients(self) -> Iterator[tuple[str, str]]:
        """Words, and what one might paste."""

    def as_json(self) -> dict[str, object]: ...


Line = list[tuple[str, str]]
"""Texts, each with its style."""


def announce(offers: Sequence[Offered]) -> None:
    """Say it to a person."""
    lines = [line for offer in offers for line in _describe(offer)]
    if sys.stdout.isatty():
        lines.append([("Ctrl-C ends it.", "dim")])
    write_lines(lines)


def write_lines(lines: Sequence[Line]) -> None:
    """Say lines, in colours on a terminal."""
    if sys.stdout.isatty():
        _write_colours(lines)
    else:
        write("".join("".join(text for text, _ in line) + "\n" for line in lines))


def _describe(offer: Offered) -> Iterator[Line]:
    how = "writable" if offer.writable else "read-only"
    yield [(offer.image, "bold"), (f": {format_size(offer.size)}, {how}, at", "")]
    for place in offer.places:
        yield [("  ", ""), (place, "bold green")]
    for label, command in offer.clients():
        yield [(f"  {label and label + ':':<{LABEL_WIDTH}} ", "dim"), (command, "")]


def _write_colours(lines: Sequence[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with contextlib.suppress(OSError):
        for line in lines:
            # Never wrapped: what is pasted must be one line.
            console.print(Text.assemble(*line), soft_wrap=True)


def write_uris(offers: Sequence[Offered]) -> None:
    """Say it to a shell."""
    write("".join(f"{place}\n" for offer in offers for place in offer.places))


def write_json(offers: Sequence[Offered], qmp: str | None) -> None:
    """Say it to a program."""
    exports = [offer.as_json() for offer in offers]
    write(json.dumps({"pid": os.getpid(), "qmp": qmp and os.path.abspath(qmp), "exports": exports}) + "\n")


def write(text: str) -> None:
    """Say it, if anybody still listens."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()
