"""The daemon: one object that owns the graph, exports, objects, the NBD server and monitors, and ends them in order.

It is the Python API too: `async with Daemon() as daemon`. All methods are to be called on the loop it was started on.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from importlib.metadata import version as distribution_version
from typing import Any, Self

from blkferry.daemon import commands, images
from blkferry.daemon.branches import load_branches
from blkferry.daemon.chardev import Chardev
from blkferry.daemon.devices import BlockDevice, make_device
from blkferry.daemon.disk import Disk
from blkferry.daemon.exports import Exports
from blkferry.daemon.imaging.names import add_credentials
from blkferry.daemon.monitor import Monitor
from blkferry.daemon.mountpoints import Mountpoints
from blkferry.daemon.mounts import FuseMount, mount
from blkferry.daemon.nbd_servers import NbdServers
from blkferry.daemon.objects import Objects
from blkferry.daemon.offers import GuestOffer, NbdOffer
from blkferry.errors import Error, ErrorKind
from blkferry.exports.nbd import NbdServer
from blkferry.exports.vduse_blk import BlockExportOptionsVduseBlk
from blkferry.graph.graph import Graph
from blkferry.jobs.jobs import Jobs
from blkferry.plane.services import Services
from blkferry.schema.control import MonitorMode, MonitorOptions
from blkferry.schema.export import (
    BlockExportOptionsFuse,
    BlockExportOptionsNbd,
    FuseExportAllowOther,
    NbdServerOptionsBase,
)
from blkferry.schema.qapi import Struct
from blkferry.schema.registry import COMMANDS, EVENTS
from blkferry.schema.sockets import SocketAddress, SocketAddressUnix
from blkferry.schema.visit import dump, visit

log = logging.getLogger(__name__)

QEMU_VERSION = (10, 0, 2)
"""The version of QEMU whose protocol we speak; clients decide by it what they may ask."""

DRAIN_SECONDS = 5.0
"""How long clients may take to receive the answers to what they had asked when the daemon ends."""

EventCallback = Callable[[str, dict[str, object]], None]


class Daemon:
    """A block-export daemon.

    `engine` chooses how requests that may block are done: "auto" (io_uring where the kernel has it, else threads),
    "io_uring" or "threads".
    """

    def __init__(self, *, engine: str = "auto") -> None:
        self.engine = engine
        self._subscribers: dict[object, EventCallback] = {}
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.objects = Objects(self)
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[Monitor] = []
        self.nbd_servers = NbdServers(self)
        self.exports = Exports(self)
        self.mountpoints = Mountpoints()
        self.jobs = Jobs(self.emit)
        self._private_directory: tempfile.TemporaryDirectory[str] | None = None
        self.finished = asyncio.Event()
        """Set by `quit`: whoever runs the daemon should call `stop`."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Make the daemon usable, on the running loop."""
        load_branches()
        self.services = Services(asyncio.get_running_loop(), engine=self.engine)
        self.graph = Graph(self.services, self._emit_from_anywhere)
        self.graph.secret = self.objects.secret
        self.graph.client_tls = self.objects.client_tls

    async def stop(self, *, patience: float = DRAIN_SECONDS) -> None:
        """End in order: no new clients, answer the old ones for at most `patience` seconds, flush and close everything.

        Calling it again while it runs gives up the patience that is left.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(patience))
        else:
            self._hurry.set()
        await asyncio.shield(self._stopping)

    async def _stop(self, patience: float) -> None:
        self.exports.end()
        self.nbd_servers.stop_listening()
        if patience:
            await self.exports.drain_all(patience, self._hurry)
        await self.graph.cancel_in_flight()
        await self.exports.remove_all()
        await self.nbd_servers.stop_all()
        await self.jobs.close()
        for user in list(self.graph.users):
            if isinstance(user, Disk):
                await user.close()
        for monitor in self.monitors:
            await monitor.stop()
        for chardev in self.chardevs.values():
            chardev.stop()
        await self.graph.close()
        for thing in self.objects.values():
            await thing.stop()
        self.services.close()
        await self.mountpoints.release_all()
        if self._private_directory is not None:
            self._private_directory.cleanup()

    @property
    def ending(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping is not None

    # Commands and events ---------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int, int]:
        return QEMU_VERSION

    @property
    def package(self) -> str:
        return f"blkferry {distribution_version('blkferry')}"

    async def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command by name with JSON-like arguments; return what its reply would carry. Raises Error."""
        command = COMMANDS.get(name)
        if command is None or name not in commands.HANDLERS:
            raise Error(
                ErrorKind.UNKNOWN_COMMAND,
                f"The command {name} has not been found",
                hint="query-commands lists those there are.",
                command=name,
            )
        if self.ending:
            raise Error(ErrorKind.GONE, "The daemon is shutting down")
        value: Struct | None = None
        if command.arguments is not None:
            value = visit(command.arguments, dict(arguments or {}))
        elif arguments:
            raise Error(ErrorKind.INVALID_ARGUMENT, f"Parameter '{next(iter(arguments))}' is unexpected")
        result = await commands.HANDLERS[name](self, value)
        return {} if result is None else dump(result)

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Have `callback` called with the name and data of every event. Returns the function that ends this."""
        key = object()
        self._subscribers[key] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def emit(self, name: str, data: dict[str, object]) -> None:
        """Tell every subscriber of an event."""
        assert name in EVENTS
        for callback in list(self._subscribers.values()):
            callback(name, data)

    def _emit_from_anywhere(self, name: str, data: dict[str, object]) -> None:
        """`emit`, for nodes, which may live on other loops."""
        self.services.loop.call_soon_threadsafe(self.emit, name, data)

    # For Python programs ---------------------------------------------------------------------------------------

    async def open(
        self,
        image: str | os.PathLike[str],
        *,
        writable: bool = False,
        image_format: str | None = None,
        direct: bool = False,
        node_name: str | None = None,
    ) -> Disk:
        """Open an image (a path, a block device, an NBD URI, or "memory:1G") as a node, and hold it.

        `direct` bypasses the page cache. The format is what the image looks like unless `image_format` says it. An
        encrypted image takes the daemon's secret, if there is one only. Raises Error.
        """
        name = node_name or self._free_name("disk", self.graph.nodes)
        await add_credentials(self, os.fspath(image))
        options = await self.services.in_thread(
            functools.partial(
                images.options_for,
                os.fspath(image),
                name,
                writable=writable,
                image_format=image_format,
                direct=direct,
                secrets_of=self,
            )
        )
        node = await self.graph.add(options)
        try:
            return await Disk.attach(self.graph, node, writable=writable, owns_node=True)
        except BaseException:
            await self.graph.remove(name)
            raise

    async def attach(self, node_name: str, *, writable: bool = False) -> Disk:
        """Hold a node that is there already. Raises Error."""
        return await Disk.attach(self.graph, self.graph.find(node_name), writable=writable)

    async def export(
        self,
        disk: Disk,
        *,
        name: str | None = None,
        export_id: str | None = None,
        bitmaps: Sequence[str] = (),
        allocation_depth: bool = False,
        server: str | None = None,
    ) -> NbdOffer:
        """Offer a disk over NBD, writable if it is; `name` defaults to the node's.

        `bitmaps` are dirty bitmaps, of the disk or what is below it; with `allocation_depth` clients see which layer of
        a backing chain bytes come from. `server` names the NBD server. The one without a name is started when it does
        not run yet, on a unix socket in a private directory. Raises Error.
        """
        if server is None and "" not in self.nbd_servers:
            await self.start_nbd_server(SocketAddressUnix(path=f"{self._private()}/nbd.sock"))
        offered = disk.name if name is None else name
        options = BlockExportOptionsNbd(
            id=export_id or self._free_name("export", self.exports.ids),
            node_name=disk.name,
            name=offered,
            writable=disk.writable,
            bitmaps=list(bitmaps),
            allocation_depth=allocation_depth,
            server=server,
        )
        await self.exports.add(options)
        return NbdOffer(self, options.id, self.nbd_uris(offered, server))

    async def export_to_guest(
        self,
        disk: Disk,
        path: str | os.PathLike[str] | None = None,
        *,
        queues: int = 1,
        serial: str | None = None,
        export_id: str | None = None,
    ) -> GuestOffer:
        """Offer a disk to a virtual machine (vhost-user-blk), writable if it is, over a unix socket at `path`.

        Without one it is in a private directory. `queues` is how many the guest may have, `serial` what it takes for
        the disk's identity. Raises Error.
        """
        from blkferry.exports.vhost_user_blk.options import BlockExportOptionsVhostUserBlk

        identity = export_id or self._free_name("export", self.exports.ids)
        where = os.path.join(self._private(), f"{identity}.sock") if path is None else os.path.abspath(path)
        options = BlockExportOptionsVhostUserBlk(
            id=identity,
            node_name=disk.name,
            writable=disk.writable,
            addr=SocketAddressUnix(path=os.fspath(where)),
            num_queues=queues,
            serial=serial,
        )
        await self.exports.add(options)
        return GuestOffer(self, identity, os.fspath(where))

    def _private(self) -> str:
        """The private directory."""
        if self._private_directory is None:
            self._private_directory = tempfile.TemporaryDirectory(prefix="blkferry-")
        return self._private_directory.name

    async def mount(
        self,
        disk: Disk,
        file: str | os.PathLike[str],
        *,
        growable: bool = False,
        allow_other: str = "auto",
        over: bool = False,
        export_id: str | None = None,
    ) -> FuseMount:
        """Show a disk as a file to every program on this machine, writable if it is.

        `file` is made if it is not there, and then goes with the mount; else it must be empty unless `over` says that
        what it holds may be hidden for the time. With `growable` writes behind the end make the disk larger;
        `allow_other` ("on", "off", "auto") says whether other users are let in. Raises Error.
        """
        options = BlockExportOptionsFuse(
            id=export_id or self._free_name("mount", self.exports.ids),
            node_name=disk.name,
            mountpoint=os.fspath(file),
            writable=disk.writable,
            growable=growable,
            allow_other=FuseExportAllowOther(allow_other),
        )
        return await mount(self, options, over=over)

    async def block_device(
        self,
        disk: Disk,
        name: str,
        *,
        num_queues: int = 1,
        queue_size: int = 256,
        logical_block_size: int = 512,
        serial: str = "",
        export_id: str | None = None,
    ) -> BlockDevice:
        """Make a disk a block device of this host, /dev/vdX, by the kernel's VDUSE and vDPA bus; writable if it is.

        `name` is what both call it, unique on this host. It ends with the daemon. Raises Error.
        """
        options = BlockExportOptionsVduseBlk(
            id=export_id or self._free_name("device", self.exports.ids),
            node_name=disk.name,
            writable=disk.writable,
            name=name,
            num_queues=num_queues,
            queue_size=queue_size,
            logical_block_size=logical_block_size,
            serial=serial,
        )
        device = await make_device(self, options)
        try:
            await device.attach()
        except BaseException:
            await device.remove(force=True)
            raise
        return device

    def nbd_uris(self, name: str, server: str | None = None) -> list[str]:
        """Where clients find the export called `name`: one URI for each address the NBD server listens on."""
        return self.nbd_servers.uris(name, server)

    @staticmethod
    def _free_name(stem: str, taken: Container[str]) -> str:
        return next(name for number in itertools.count() if (name := f"{stem}{number}") not in taken)

    # NBD servers, and services for exports ---------------------------------------------------------------------

    def service(self, kind: str, name: str | None = None) -> Any:
        assert kind == "nbd-server"
        return self.nbd_servers.get(name)

    def export_ended(self, export_id: str) -> None:
        self.services.loop.call_soon_threadsafe(self.exports.ended, export_id)

    @property
    def nbd_server(self) -> NbdServer | None:
        """The NBD server without a name, None when it does not run."""
        return self.nbd_servers.get() if "" in self.nbd_servers else None

    def hold_clients(self) -> None:
        """Let clients of servers started from now on wait, so that they find everything that is still being made."""
        self.nbd_servers.hold_clients()

    def admit_clients(self) -> None:
        """Let them in."""
        self.nbd_servers.admit_clients()

    async def start_nbd_server(
        self,
        *addresses: SocketAddress,
        name: str | None = None,
        max_connections: int = 0,
        handshake_seconds: int = 10,
        tls_creds: str | None = None,
        tls_authz: str | None = None,
    ) -> list[SocketAddress]:
        """Listen for NBD clients, `max_connections` of them and `handshake_seconds` for each to choose an export.

        0 is unlimited. With `name` it is another server than the one exports use that name none. `tls_creds` and
        `tls_authz` are ids of objects: with the former TLS is required, the latter says whose certificates are welcome.
        Returns where it listens, with the ports that the kernel chose. Raises Error(EXISTS) when it runs already, or
        what is wrong with addresses or objects.
        """
        options = NbdServerOptionsBase(
            id=name,
            max_connections=max_connections,
            handshake_max_seconds=handshake_seconds,
            tls_creds=tls_creds,
            tls_authz=tls_authz,
        )
        return await self.nbd_servers.start(addresses, options)

    # Monitors --------------------------------------------------------------------------------------------------

    async def add_monitor(self, options: MonitorOptions) -> None:
        """Talk QMP over a character device. Raises Error(NOT_FOUND) or Error(BUSY)."""
        if options.mode is not MonitorMode.CONTROL:
            raise Error(ErrorKind.UNSUPPORTED, "Only QMP is supported", hint="Leave mode out, or say mode=control.")
        chardev = self.chardevs.get(options.chardev)
        if chardev is None:
            raise Error(
                ErrorKind.NOT_FOUND,
                f'chardev "{options.chardev}" not found',
                hint=f"Known chardevs: {', '.join(self.chardevs)}." if self.chardevs else "There are no chardevs yet.",
            )
        monitor = Monitor(chardev, self, pretty=options.pretty)
        await monitor.start()
        self.monitors.append(monitor)
