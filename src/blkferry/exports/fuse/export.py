"""The `fuse` export type: one node as the regular file that is mounted over `mountpoint`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any, ClassVar

from blkferry.errors import Error, ErrorKind
from blkferry.exports.base import Export, Host
from blkferry.exports.fuse.inode import Inode
from blkferry.exports.fuse.limits import READY_SECONDS, RELEASE_SECONDS
from blkferry.exports.fuse.mounting import Mount, mount
from blkferry.exports.fuse.session import Session
from blkferry.exports.places import Places
from blkferry.graph.permissions import Permission
from blkferry.graph.root import Root
from blkferry.schema.export import BlockExportClient, BlockExportOptions, BlockExportOptionsFuse
from blkferry.wire.fuse.constants import InitFlag

log = logging.getLogger(__name__)


class FuseExport(Export):
    """An export by FUSE; its session lives on the node's loop, everything else on the main loop."""

    kind: ClassVar[str] = "fuse"
    options_type: ClassVar[type[BlockExportOptions]] = BlockExportOptionsFuse
    options: BlockExportOptionsFuse

    def __init__(self, host: Host, options: BlockExportOptions, root: Root) -> None:
        super().__init__(host, options, root)
        assert isinstance(options, BlockExportOptionsFuse)
        self.places = Places(root, writable=options.writable)
        self._mount: Mount | None = None
        self._session: Session | None = None

    @classmethod
    def permissions(cls, options: BlockExportOptions) -> tuple[Permission, Permission]:
        used, shared = super().permissions(options)
        if options.writable:  # truncate(2) changes the size, even where writes do not
            used |= Permission.RESIZE
        return used, shared

    async def start(self) -> None:
        if self.options.passthrough and self.options.writable and not self.options.growable:
            raise Error(
                ErrorKind.INVALID_ARGUMENT,
                "Parameter 'passthrough' needs 'growable' where 'writable' is given",
                hint="The kernel writes behind the end of the image, too.",
            )
        image = self.root.node.filename() or self.root.node.name
        await self.serve(await mount(self.options.mountpoint, source=image, allow_other=self.options.allow_other))

    async def serve(self, mounted: Mount) -> None:
        """Serve what is mounted, which the export takes over; raise Error if the kernel is not one of ours."""
        options = self.options
        self._mount = mounted
        self.host.graph.shown[mounted.device] = self.root.node.name
        self.places.size = self.root.node.length
        self._session = Session(
            mounted.fd,
            self.root,
            self.places,
            Inode(writable=options.writable, allow_other=mounted.allow_other),
            writable=options.writable,
            growable=options.growable,
            passthrough=options.passthrough,
            on_ended=self._ended,
        )
        self._session_call(self._session.resume)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                await self.root.services.run(self._session.ready())
        if self._session.agreed is None:
            await self.root.services.run(self.stop())
            raise Error(
                ErrorKind.UNSUPPORTED,
                f"The kernel's FUSE and ours did not agree on '{options.mountpoint}'",
                hint="It takes Linux 5.4 or newer.",
            )
        if options.passthrough:
            try:
                await self.root.services.run(self._try_passthrough(self._session))
            except Error:
                await self.root.services.run(self.stop())
                raise

    async def _try_passthrough(self, session: Session) -> None:
        passthrough = session.passthrough
        assert passthrough is not None
        assert session.agreed is not None
        if InitFlag.PASSTHROUGH not in session.agreed.flags:
            raise Error(
                ErrorKind.UNSUPPORTED,
                "The kernel has no FUSE passthrough",
                hint="It takes Linux 6.9 or newer, built with CONFIG_FUSE_PASSTHROUGH.",
            )
        passthrough.open()
        passthrough.release()

    def _ended(self) -> None:
        """The file was unmounted by somebody else. Called on the node's loop."""
        self.host.export_ended(self.options.id)

    async def leave(self) -> None:
        if self._mount is not None:
            await self._mount.leave(self.options.id)

    async def stop(self) -> None:
        session, mounted = self._session, self._mount
        if mounted is None:
            return
        await mounted.detach()
        if session is not None and session.passthrough is not None and session.passthrough.opened:
            await self._wait_for_passthrough(session)
        if session is None:
            os.close(mounted.fd)
        else:
            session.close()
            await session.in_flight.idle()
        self.host.graph.shown.pop(mounted.device, None)

    async def _wait_for_passthrough(self, session: Session) -> None:
        """Who was let through to the image cannot be cut off: wait for them for a while."""
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await session.all_released()
        except TimeoutError:
            pids = ", ".join(map(str, session.pids))
            log.warning("%s: processes %s can still use the image by passthrough", self.root.describe(), pids)

    async def drain(self) -> None:
        """Have the file no longer found, answer what was asked, and then nothing more, however fast they ask."""
        session = self._session
        if self._mount is None or session is None:
            return
        await self._mount.detach()
        if session.passthrough is None or not session.passthrough.opened:  # those still have to tell of their close
            await session.pause()

    def retired(self, start: int, end: int | None) -> None:
        length = self.root.node.length
        if self.places.size != length:
            self.places.size = length
            if self._session is not None:
                self._session.attributes_changed()
        self.places.retired(start, end)

    def connected(self) -> list[BlockExportClient]:
        session = self._session
        if session is None or not session.handles:
            return []
        return [
            BlockExportClient(
                peer=f"processes {', '.join(map(str, session.pids))}",
                requests=session.requests,
                received=session.received,
                sent=session.sent,
            )
        ]

    def details(self) -> dict[str, Any]:
        if self._mount is None:
            return {}
        return {"mountpoint": self._mount.path, "allow_other": self._mount.allow_other}

    async def pause(self) -> None:
        session = self._session
        if session is not None and session.passthrough is not None and session.passthrough.opened:
            raise Error(
                ErrorKind.BUSY,
                f"Export '{self.options.id}' is open by passthrough",
                hint="The kernel reads and writes the image by itself until these processes close "
                f"'{self.options.mountpoint}': {', '.join(map(str, session.pids))}.",
            )
        if self._session is not None:
            await self.root.services.run(self._session.pause())
        self.places.drop()

    async def resume(self) -> None:
        if self._session is not None:
            self._session_call(self._session.resume)

    def _session_call(self, call: object) -> None:
        self.root.services.loop.call_soon_threadsafe(call)  # type: ignore[arg-type]
