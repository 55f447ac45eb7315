"""`blkferry serve --vduse`: images as block devices of this host."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blkferry.cli.ready import Offered
from blkferry.daemon.daemon import Daemon
from blkferry.daemon.devices import make_device
from blkferry.errors import Error, ErrorKind
from blkferry.exports.vduse_blk import BlockExportOptionsVduseBlk, bus
from blkferry.schema.help import help_text
from blkferry.schema.keyval import parse
from blkferry.schema.visit import visit


@dataclass(frozen=True, slots=True)
class Device:
    """An image that is a block device; `path` is None while no driver has taken it."""

    name: str
    image: str
    size: int
    writable: bool
    path: str | None = None
    attached: bool = False

    @property
    def places(self) -> list[str]:
        return [] if self.path is None else [self.path]

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "image": self.image,
            "size": self.size,
            "writable": self.writable,
            "device": self.path,
        }

    def clients(self) -> Iterator[tuple[str, str]]:
        if not self.attached:
            yield "attach", f"sudo {bus.attach_command(self.name)}"
        elif self.path is None:
            yield "driver", "sudo modprobe -a virtio_vdpa virtio_blk"
        elif self.path.startswith("/dev/vhost-vdpa"):
            disk = f"virtio-blk-vhost-vdpa,node-name=disk,path={self.path},cache.direct=on"
            yield "boot", f"qemu-system-x86_64 -m 1G -blockdev {disk} -device virtio-blk-pci,drive=disk"
        else:
            yield "look", f"lsblk {self.path}"
            yield "mount", f"sudo mount {'' if self.writable else '-o ro '}{self.path} /mnt"
        yield "remove", f"sudo {bus.detach_command(self.name)}"


async def offer(daemon: Daemon, images: Sequence[str], nodes: Sequence[str], wanted: Sequence[str]) -> list[Offered]:
    """Make a device of each node, as what --vduse says of it, and put it on the bus where we may. Raises Error."""
    return [
        await _offer_device(daemon, image, _options(daemon, node, text))
        for image, node, text in zip(images, nodes, wanted, strict=True)
    ]


def _options(daemon: Daemon, node: str, text: str) -> BlockExportOptionsVduseBlk:
    given = parse(text, "name")
    if given.help:
        raise Error(
            ErrorKind.INVALID_ARGUMENT,
            "--vduse needs a name, and takes the options of an export: NAME,num-queues=4",
            hint=help_text(BlockExportOptionsVduseBlk),
        )
    writable = not daemon.graph.find(node).read_only
    values = {"id": node, "node-name": node, "writable": "on" if writable else "off", **given.values}
    return visit(BlockExportOptionsVduseBlk, values, keyval=True)


async def _offer_device(daemon: Daemon, image: str, options: BlockExportOptionsVduseBlk) -> Device:
    device = await make_device(daemon, options)
    path = None
    try:
        path = await device.attach()
    except Error as error:
        sys.stderr.write(f"blkferry: {error.message}\n{error.hint}\n")
    size = daemon.graph.find(options.node_name).length
    attached = bus.is_attached(options.name)
    return Device(options.name, image, size, options.writable, path=path, attached=attached)
