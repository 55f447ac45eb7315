"""What `blkferry serve --vhost-user` says: where the front end of each disk connects, and lines that make one do so."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import quoteattr

from blkferry.cli.exporting import export
from blkferry.cli.ready import Offered
from blkferry.daemon.daemon import Daemon
from blkferry.exports.vhost_user_blk.options import BlockExportOptionsVhostUserBlk
from blkferry.schema.sockets import SocketAddressUnix

MEMORY: Final = "1G"
FIRECRACKER: Final = "/run/firecracker.socket"

QUEUES: Final = 64
"""How many a guest may have. Unused ones cost nothing, and QEMU wants one for each processor of the guest."""


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """One image that waits for a virtual machine, at the absolute path of a socket."""

    image: str
    size: int
    writable: bool
    path: str

    @property
    def places(self) -> list[str]:
        return [self.path]

    def clients(self) -> Iterator[tuple[str, str]]:
        """A word for each program that can make a guest's disk of it, and what to paste into a shell or a domain."""
        chardev = f"socket,id=disk,path={self.path.replace(',', ',,')},reconnect-ms=1000"
        qemu = [
            *("qemu-system-x86_64", "-m", MEMORY, "-M", "q35,memory-backend=mem"),
            *("-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on"),
            *("-chardev", chardev, "-device", "vhost-user-blk-pci,chardev=disk"),
        ]
        yield "qemu", shlex.join(qemu)
        source = f"<source type='unix' path={quoteattr(self.path)}><reconnect enabled='yes' timeout='1'/></source>"
        target = "<target dev='vda' bus='virtio'/>"
        driver = "<driver name='qemu' type='raw'/>"
        yield "libvirt", "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        yield "", f"<disk type='vhostuser' device='disk'>{driver}{source}{target}</disk>"
        disk = f"vhost_user=on,socket={self.path}"
        memory = f"size={MEMORY},shared=on"
        yield "cloud", shlex.join(["cloud-hypervisor", "--kernel", "hypervisor-fw", "--memory", memory, "--disk", disk])
        drive = json.dumps({"drive_id": "disk", "is_root_device": True, "socket": self.path})
        url = "http://localhost/drives/disk"
        yield "fire", shlex.join(["curl", "--unix-socket", FIRECRACKER, "-X", "PUT", url, "-d", drive])

    def as_json(self) -> dict[str, object]:
        return {"image": self.image, "size": self.size, "writable": self.writable, "vhost-user": self.path}


async def offer(daemon: Daemon, images: Sequence[str], nodes: Sequence[str], paths: Sequence[str]) -> list[Offered]:
    """Have each node wait for a virtual machine at its path. Raises Error."""
    offers: list[Offered] = []
    for image, node, path in zip(images, nodes, map(os.path.abspath, paths), strict=True):
        writable = not daemon.graph.find(node).read_only
        options = BlockExportOptionsVhostUserBlk(
            id=node, node_name=node, writable=writable, addr=SocketAddressUnix(path=path), num_queues=QUEUES
        )
        await export(daemon, image, options)
        offers.append(GuestDisk(image, daemon.graph.find(node).length, writable, path))
    return offers
