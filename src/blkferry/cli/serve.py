"""`blkferry serve`: from images and an address to a daemon that serves them, and what is said about it.

Standard output carries what was asked for (where the exports are), standard error everything else.
"""

from __future__ import annotations

import enum
import functools
import os
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blkferry.cli.exporting import export
from blkferry.cli.ready import Offer, Offered, announce, write_json, write_uris
from blkferry.daemon import images
from blkferry.daemon.commands.char import chardev_add
from blkferry.daemon.daemon import Daemon
from blkferry.daemon.imaging.names import ImageName, about, add_credentials
from blkferry.daemon.run import run
from blkferry.errors import Error, ErrorKind
from blkferry.graph.node import Node
from blkferry.graph.remote import location_of
from blkferry.schema.char import ChardevAdd, ChardevSocket
from blkferry.schema.control import MonitorOptions
from blkferry.schema.export import BlockExportOptionsNbd
from blkferry.schema.keyval import Help, parse_option
from blkferry.schema.qom import ObjectOptions
from blkferry.schema.sockets import SocketAddress, SocketAddressFd, SocketAddressInet, SocketAddressUnix
from blkferry.schema.visit import visit
from blkferry.sockets import descriptors
from blkferry.wire.nbd.uri import DEFAULT_PORT, is_uri

QMP = "qmp"
TLS = "tls"
ALLOWED = "allowed"
DEFAULT_HOST = "127.0.0.1"
_EVERYWHERE = frozenset({"", "::", "0.0.0.0"})
_HERE = ("127.", "::1")


class Speech(enum.Enum):
    """How to say where the exports are."""

    PROSE = enum.auto()
    URIS = enum.auto()
    JSON = enum.auto()


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. Where to listen is in `sockets`, `fds`, `hosts` and `ports`; without any of them it is up to
    whoever starts us (see `addresses`). `names` is empty or has one per image.
    """

    images: tuple[str, ...]
    names: tuple[str, ...]
    writable: bool
    image_format: str | None
    direct: bool
    discard: bool
    description: str | None
    sockets: tuple[str, ...]
    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    max_connections: int
    qmp: str | None
    objects: tuple[str, ...] = ()
    fds: tuple[str, ...] = ()
    tls: str | None = None
    allowed: tuple[str, ...] = ()
    bitmaps: tuple[str, ...] = ()
    allocation_depth: bool = False
    vduse: tuple[str, ...] = ()
    """Devices of this machine, once per image; instead of all that is NBD's. The same goes for `vhost_user`."""
    vhost_user: tuple[str, ...] = ()
    """Where front ends of virtual machines connect."""

    def addresses(self, passed: Sequence[str] = ()) -> list[SocketAddress]:
        """Where to listen; `passed` are the names of sockets that we were started with. Raises Error."""
        found: list[SocketAddress] = [SocketAddressUnix(path=path) for path in self.sockets]
        found += [SocketAddressFd(fd=fd) for fd in self.fds]
        if self.hosts or self.ports or not (found or passed):
            hosts, ports = self.hosts or (DEFAULT_HOST,), self.ports or (DEFAULT_PORT,)
            found += [SocketAddressInet(host=host, port=str(port)) for host in hosts for port in ports]
        if not found:
            if len(passed) > 1:
                raise Error(
                    ErrorKind.INVALID_ARGUMENT,
                    f"There are sockets of {len(passed)} names to listen on",
                    hint=f"Choose with --fd: {', '.join(passed)}.",
                )
            return [SocketAddressFd(fd=passed[0])]
        return found


def serve_images(request: Request, speech: Speech) -> None:
    """Serve until a signal comes. Raises Error, with nothing left behind."""
    names = request.names
    if not (names or request.vduse or request.vhost_user):
        names = default_names(request.images)
    offers: list[Offered] = []

    async def fill(daemon: Daemon) -> None:
        offers.extend(await _offer(daemon, request, names))

    def ready(daemon: Daemon) -> None:
        del daemon
        match speech:
            case Speech.JSON:
                write_json(offers, request.qmp)
            case Speech.URIS:
                write_uris(offers)
            case Speech.PROSE:
                announce(offers)
                _caution([offer for offer in offers if isinstance(offer, Offer)])

    talkative = speech is Speech.PROSE and sys.stderr.isatty()

    def ending(daemon: Daemon) -> None:
        server = daemon.nbd_server
        if talkative and server is not None and any(export.clients for export in server.exports):
            sys.stderr.write("\nAnswering what clients still wait for; Ctrl-C again cuts them off.\n")

    run(fill, on_ready=ready, on_end=ending)
    if talkative:
        sys.stderr.write("\rStopped; what clients have written is in the image.\n")


def default_names(given: tuple[str, ...]) -> tuple[str, ...]:
    """The name of each image's export. Raises Error(EXISTS) when two have the same."""
    names = tuple(map(default_name, given))
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise Error(
            ErrorKind.EXISTS,
            f"{count} images would be exported as '{name}'",
            hint=f"Name them: --name for each of the {len(given)} images, in their order.",
        )
    return names


def default_name(image: str) -> str:
    """What an image is called, wherever it is."""
    if image.startswith(images.MEMORY):
        return "memory"
    if is_uri(image):
        return location_of(image).export or "nbd"
    return os.path.basename(image.rstrip("/"))


async def _offer(daemon: Daemon, request: Request, names: tuple[str, ...]) -> list[Offered]:
    await add_objects(daemon, request.objects)
    await _add_security(daemon, request)
    nodes = [await _open(daemon, request, number, image) for number, image in enumerate(request.images)]
    offers: list[Offered]
    if request.vduse:
        from blkferry.cli import devices  # each takes half as long to load as all the rest of this page

        offers = await devices.offer(daemon, request.images, nodes, request.vduse)
    elif request.vhost_user:
        from blkferry.cli import guests

        offers = await guests.offer(daemon, request.images, nodes, request.vhost_user)
    else:
        offers = await _offer_over_nbd(daemon, request, nodes, names)
    if request.qmp is not None:
        await add_qmp(daemon, request.qmp)
    return offers


async def _offer_over_nbd(
    daemon: Daemon, request: Request, nodes: Sequence[str], names: Sequence[str]
) -> list[Offered]:
    addresses = tuple(dict.fromkeys(map(_as_clients_see, await _listen(daemon, request))))
    offers: list[Offered] = []
    for image, node, name in zip(request.images, nodes, names, strict=True):
        writable = not daemon.graph.find(node).read_only
        size = daemon.graph.find(node).length
        await export(daemon, image, _nbd_options(request, node, name, writable=writable))
        offers.append(Offer(name, image, size, writable, addresses, tls=request.tls is not None))
    return offers


async def add_objects(daemon: Daemon, objects: Sequence[str]) -> None:
    """Make the objects of --object. Raises Error."""
    for text in objects:
        options = parse_option(ObjectOptions, text, implied="qom-type")
        if isinstance(options, Help):
            raise Error(ErrorKind.INVALID_ARGUMENT, "--object needs an object", hint=options.text)
        await daemon.objects.add(options)


async def add_qmp(daemon: Daemon, path: str) -> None:
    """Take QMP commands on a unix socket. Raises Error."""
    backend = ChardevSocket(addr=SocketAddressUnix(path=path))
    await chardev_add(daemon, ChardevAdd(id=QMP, backend=backend))
    await daemon.add_monitor(MonitorOptions(chardev=QMP))


async def _add_security(daemon: Daemon, request: Request) -> None:
    """The objects behind --tls and --allow."""
    if request.tls is None:
        if request.allowed:
            raise Error(
                ErrorKind.INVALID_ARGUMENT, "--allow needs --tls", hint="Without TLS nobody can tell who a client is."
            )
        return
    kinds = {"server-cert.pem": "tls-creds-x509", "keys.psk": "tls-creds-psk"}
    found = [kind for name, kind in kinds.items() if os.path.exists(os.path.join(request.tls, name))]
    if not found:
        hint = "docs/tls.md shows how to make certificates (ca-cert.pem, server-cert.pem, server-key.pem) or keys."
        raise Error(ErrorKind.NOT_FOUND, f"'{request.tls}' has neither server-cert.pem nor keys.psk", hint=hint)
    credentials = {"qom-type": found[0], "id": TLS, "endpoint": "server", "dir": request.tls}
    await daemon.objects.add(visit(ObjectOptions, credentials))
    if request.allowed:
        rules = [{"match": name, "policy": "allow", "format": "exact"} for name in request.allowed]
        await daemon.objects.add(visit(ObjectOptions, {"qom-type": "authz-list", "id": ALLOWED, "rules": rules}))


async def open_image(
    daemon: Daemon, image: str, name: str, *, writable: bool, image_format: str | None, direct: bool, discard: bool
) -> Node:
    """Open an image as a node. Raises Error."""
    await add_credentials(daemon, image)
    options = await daemon.services.in_thread(
        functools.partial(
            images.options_for,
            image,
            name,
            writable=writable or image.startswith(images.MEMORY),
            image_format=image_format,
            direct=direct,
            discard=discard,
            secrets_of=daemon,
        )
    )
    try:
        return await daemon.graph.add(options)
    except Error as error:
        error = about(ImageName(name=image, force_share=True), error)
        if error.kind is not ErrorKind.DENIED or not writable:
            raise error from None
        hint = "Leave out --writable if it is only to be read, or get the right to write to it."
        raise Error(error.kind, error.message, hint=hint) from error


async def _open(daemon: Daemon, request: Request, number: int, image: str) -> str:
    """Open an image that there is something in, and return its node's name."""
    node = await open_image(
        daemon,
        image,
        f"disk{number}",
        writable=request.writable,
        image_format=request.image_format,
        direct=request.direct,
        discard=request.discard,
    )
    if not node.length:
        in_memory = image.startswith(images.MEMORY)
        hint = "Like memory:1G." if in_memory else f"Give it a size first: truncate -s 1G {shlex.quote(image)}"
        raise Error(ErrorKind.INVALID_ARGUMENT, f"'{image}' is empty: there is nothing to serve", hint=hint)
    return node.name


async def _listen(daemon: Daemon, request: Request) -> list[SocketAddress]:
    passed = descriptors.current()
    try:
        return await daemon.start_nbd_server(
            *request.addresses(passed.names if passed is not None else ()),
            max_connections=request.max_connections,
            tls_creds=TLS if request.tls is not None else None,
            tls_authz=ALLOWED if request.allowed else None,
        )
    except Error as error:
        address = error.facts.get("address")
        if error.kind is ErrorKind.BUSY and isinstance(address, SocketAddressInet):
            raise Error(
                ErrorKind.BUSY,
                f"Port {address.port} of {address.host or 'this machine'} is taken",
                hint="Say --port 0 for any free port, or --socket PATH for a unix socket.",
            ) from error
        raise


def _nbd_options(request: Request, node: str, name: str, *, writable: bool) -> BlockExportOptionsNbd:
    return BlockExportOptionsNbd(
        id=node,
        node_name=node,
        name=name,
        writable=writable,
        description=request.description,
        bitmaps=list(request.bitmaps),
        allocation_depth=request.allocation_depth,
    )


def _as_clients_see(address: SocketAddress) -> SocketAddress:
    """All addresses of this machine at once are called by its name."""
    if isinstance(address, SocketAddressInet) and address.host in _EVERYWHERE:
        return SocketAddressInet(host=socket.gethostname(), port=address.port)
    return address


def _caution(offers: Sequence[Offer]) -> None:
    if not offers:
        return
    exposed = {address.host for address in offers[0].addresses if isinstance(address, SocketAddressInet)}
    if not offers[0].tls and not all(host.startswith(_HERE) for host in exposed):
        may = "read and write" if any(offer.writable for offer in offers) else "read"
        _warn(f"anybody who reaches this port may {may} these images: nothing is encrypted or asks for a password")


def _warn(text: str) -> None:
    sys.stderr.write(f"blkferry: {text}\n")
