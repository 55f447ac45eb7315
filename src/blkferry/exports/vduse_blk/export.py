"""The `vduse-blk` export type: one node as a virtio-blk device, which the kernel's vDPA bus gives to its users.

    none --start--> made --`vdpa dev add`--> attached --`vdpa dev del`--> made --stop--> none

Putting the device on the bus, and taking it off, is the administrator's part, or that of `attach`. As long as it is
attached somebody may use it: a safe removal is refused. A hard one takes it off the bus; where that cannot be done it
answers everything with errors until somebody else does it. A daemon that ends, or dies, leaves an attached device to
the next one, if the administrator has put it there: what it had begun stands in the reconnect log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ClassVar, Final

from blkferry.errors import Error, ErrorKind
from blkferry.exports.base import Export, Host
from blkferry.exports.vduse_blk import bus, control
from blkferry.exports.vduse_blk.device import Serving, VduseDevice
from blkferry.exports.vduse_blk.kernel import KernelDevice
from blkferry.exports.vduse_blk.options import BlockExportOptionsVduseBlk
from blkferry.exports.vduse_blk.reconnect import QueueLog, ReconnectLog
from blkferry.exports.vduse_blk.refusal import RefusingQueue
from blkferry.exports.virtio_blk.device import Device
from blkferry.exports.virtio_blk.queue import Queue
from blkferry.graph.root import Root
from blkferry.plane.drain import uninterrupted
from blkferry.schema.export import BlockExportClient, BlockExportOptions
from blkferry.wire.vduse.ioctls import DeviceConfig
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory
from blkferry.wire.virtio.split import SplitRing
from blkferry.wire.virtio_blk import DEVICE_ID
from blkferry.wire.virtio_blk import Feature as Blk

log = logging.getLogger(__name__)

SIZES: Final = (4, 1024)
"""Smallest and largest size of a virtqueue."""

LOOK_AGAIN: Final = 0.2
"""Seconds between two looks whether a device that is being removed has left the bus."""


class VduseBlkExport(Export):
    """A VDUSE device; it and its virtqueues live on the node's loop, everything else on the main loop."""

    kind: ClassVar[str] = "vduse-blk"
    options_type: ClassVar[type[BlockExportOptions]] = BlockExportOptionsVduseBlk
    options: BlockExportOptionsVduseBlk

    def __init__(self, host: Host, options: BlockExportOptions, root: Root) -> None:
        super().__init__(host, options, root)
        assert isinstance(options, BlockExportOptionsVduseBlk)
        self.name = options.name
        self.taken_over = False
        """Whether another daemon had made the device, and had left it on the bus."""
        self._queues: dict[int, Queue] = {}
        self._detach_at_end = False
        self._lingers = False
        self._disk: Device | None = None
        self._device: VduseDevice | None = None
        self._log: ReconnectLog | None = None

    # Life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        options = self.options
        control.check_name(options.name)
        check_queue_size(options.queue_size)
        disk = self._disk = Device(
            self.root,
            name=f"VDUSE device '{options.name}'",
            writable=options.writable,
            serial=options.serial,
            logical_block_size=options.logical_block_size,
            queues=options.num_queues,
            seg_max=options.queue_size - 2,
            also=Feature.ACCESS_PLATFORM | (Blk.MQ if options.num_queues > 1 else 0),
        )
        disk.offered &= ~Feature.RING_PACKED  # the reconnect log is one of split rings
        config = DeviceConfig(
            name=options.name,
            vendor_id=0,
            device_id=DEVICE_ID,
            features=disk.offered,
            queues=options.num_queues,
            config=disk.config(),
        )
        services = self.root.services
        fd, self.taken_over = await services.in_thread(control.create, config)
        device = VduseDevice(KernelDevice(fd), disk, options.queue_size, self._make_queue)
        try:
            if self.taken_over:
                device.check_found()
            else:
                device.set_up()
            reconnect = self._log = ReconnectLog(
                options.name,
                options.num_queues,
                options.queue_size,
                keep=self.taken_over,
                volatile=self._volatile,
            )
            disk.lost_writes = reconnect.lost_writes
            if disk.lost_writes:
                log.warning(
                    "'%s': writes since the last flush are lost with the daemon that had answered them; the next flush "
                    "fails, to tell of it",
                    options.name,
                )
            self._device = device
            await services.run(self._begin(device, reconnect))
        except BaseException:
            self._device = None
            await services.run(device.stop())
            device.close()
            if not self.taken_over:
                await services.in_thread(control.destroy, options.name)
                if self._log is not None:
                    self._log.remove()
            raise

    def _volatile(self) -> bool:
        """Whether writes that were answered die with this process, or died with an earlier one and nobody knows yet."""
        assert self._disk is not None
        return self._disk.lost_writes or (self._disk.writeback and self.root.node.volatile)

    async def _begin(self, device: VduseDevice, reconnect: ReconnectLog) -> None:
        device.start(reconnect, found=self.taken_over)

    def _make_queue(
        self,
        index: int,
        ring: SplitRing,
        memory: GuestMemory,
        kick_fd: int,
        notify: Callable[[], None],
        failed: Callable[[str], None],
        reconnect: QueueLog,
    ) -> Serving:
        assert self._disk is not None
        queue = self._queues[index] = Queue(self._disk, index, ring, memory, kick_fd, notify, failed, reconnect)
        return queue

    async def attach(self) -> str | None:
        """Put the device on the bus, from which the end of this export takes it; returns `endpoint`. Raises Error.

        One that was taken over is there already. Called on the main loop.
        """
        self._detach_at_end = True
        if not bus.is_attached(self.name):
            await uninterrupted(asyncio.ensure_future(asyncio.to_thread(bus.attach, self.name)))
        return self.endpoint

    async def drain(self) -> None:
        if self._detach_at_end:
            await self._detach()
        if self._device is not None and not self._lingers:
            await self._device.pause()

    async def _detach(self) -> None:
        """Take the device off the bus while it is served: what is dirty is written, what is in flight answered."""
        if bus.is_attached(self.name):
            try:
                await asyncio.to_thread(bus.detach, self.name)
            except Error as error:
                if bus.is_attached(self.name):  # nobody else has done it meanwhile
                    log.warning("export '%s': %s. %s", self.options.id, error.message, error.hint)

    async def part(self) -> None:
        if self._detach_at_end or not self.host.ending:
            await self._detach()

    async def stop(self) -> None:
        device = self._device
        assert device is not None
        assert self._log is not None
        await device.stop()
        if self.host.ending:
            try:
                await self.root.flush()  # so that nothing is in our memory only when another daemon takes over
            except OSError as error:
                log.warning("export '%s': the last flush failed: %s", self.options.id, error.strerror)
            self._log.note()
        if self.host.ending or not bus.is_attached(self.name):
            await self._close(device)

    async def linger(self) -> None:
        device = self._device
        if device is None:
            return
        log.warning(
            "export '%s': all requests to '%s' fail until somebody takes it off the vDPA bus: %s",
            *(self.options.id, self.name, bus.detach_command(self.name)),
        )
        self._lingers = True
        device.serve_by(RefusingQueue)
        try:
            while bus.is_attached(self.name):  # noqa: ASYNC110 - sysfs tells nobody
                await asyncio.sleep(LOOK_AGAIN)
        finally:
            await uninterrupted(asyncio.ensure_future(self._end_lingering(device)))

    async def _end_lingering(self, device: VduseDevice) -> None:
        await device.stop()
        await self._close(device)

    async def _close(self, device: VduseDevice) -> None:
        """Remove the device, which is stopped, from the kernel, or leave it to another daemon."""
        assert self._log is not None
        self._device = None
        device.close()
        if await asyncio.get_running_loop().run_in_executor(None, control.destroy, self.name):
            self._log.remove()
        else:
            log.warning(
                "'%s' stays on the vDPA bus: what is asked of it waits until a daemon serves it again", self.name
            )

    def retired(self, start: int, end: int | None) -> None:
        if self._disk is None:
            return
        self._disk.retired(start, end)
        if end is None and self._device is not None and self._disk.resized():
            self._device.announce_config()

    async def pause(self) -> None:
        if self._device is not None and self._disk is not None:
            await self.root.services.run(self._device.pause())
            self._disk.drop()

    async def resume(self) -> None:
        if self._device is not None:
            self.root.services.loop.call_soon_threadsafe(self._device.resume)

    # Who uses it -----------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str | None:
        """What the device has become, /dev/vdX or /dev/vhost-vdpa-N; None while that is nothing."""
        return bus.endpoint(self.name)

    @property
    def in_use(self) -> Error | None:
        if not bus.is_attached(self.name):
            return None
        where = self.endpoint
        return Error(
            ErrorKind.BUSY,
            f"export '{self.options.id}' still in use",
            hint=f"'{self.name}' is on the vDPA bus{f' as {where}' if where else ''}. Take it off first: "
            f"{bus.detach_command(self.name)}; or use mode='hard', which does that.",
        )

    def connected(self) -> list[BlockExportClient]:
        if not bus.is_attached(self.name):
            return []
        served = list(self._queues.values())
        return [
            BlockExportClient(
                peer=self.endpoint or "vDPA bus",
                requests=sum(queue.requests for queue in served),
                received=sum(queue.bytes_written for queue in served),
                sent=sum(queue.bytes_read for queue in served),
            )
        ]


def check_queue_size(size: int) -> None:
    """Raise Error unless a virtqueue can have so many entries."""
    smallest, largest = SIZES
    if not smallest <= size <= largest or size & (size - 1):
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "queue-size is invalid",
            hint=f"It is a power of two from {smallest} to {largest}, and was {size}; the default is 256.",
        )
