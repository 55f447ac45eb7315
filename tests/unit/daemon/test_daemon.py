"""The daemon as Python programs hold it."""

import asyncio
import os
import time

import pytest

from blkferry import Daemon
from blkferry.errors import Error
from blkferry.schema.sockets import SocketAddressUnix
from blkferry.testing.nbd import Client
from blkferry.testing.vhost_user import FrontEnd
from blkferry.wire.virtio_blk import Type


async def test_clients_that_are_held_find_what_was_made_meanwhile(sockets):
    async with Daemon() as daemon:
        daemon.hold_clients()
        path = str(sockets / "nbd")
        await daemon.start_nbd_server(SocketAddressUnix(path=path))
        client = asyncio.create_task(asyncio.to_thread(Client.connect, path, "late"))
        await asyncio.sleep(0.05)
        assert not client.done()
        disk = await daemon.open("memory:1M", writable=True)
        await daemon.export(disk, name="late")
        daemon.admit_clients()
        connected = await client
        assert connected.size == disk.size
        await asyncio.to_thread(connected.close)


async def test_a_disk_for_a_guest(sockets):
    async with Daemon() as daemon:
        disk = await daemon.open("memory:1M", writable=True)
        offer = await daemon.export_to_guest(disk, sockets / "disk", queues=2)
        hidden = await daemon.export_to_guest(disk)
        assert offer.path == str(sockets / "disk")
        assert await disk.read(0, 1) == b"\0"

        def guest(path):
            with FrontEnd(path) as front:
                return front.run().run(Type.OUT, 0, b"x" * 512)

        for path in (offer.path, hidden.path):
            assert await asyncio.to_thread(guest, path) == (0, b"")
        assert await disk.read(0, 1) == b"x"
        await offer.remove(force=True)
        assert not (sockets / "disk").exists()
    assert not os.path.exists(hidden.path)


async def test_a_disk_is_the_same_through_every_way_in(sockets):
    async with Daemon() as daemon:
        await daemon.start_nbd_server(SocketAddressUnix(path=str(sockets / "nbd")))
        disk = await daemon.open("memory:1M", writable=True)
        offer = await daemon.export(disk, name="x")
        assert offer.uri == f"nbd+unix:///x?socket={sockets}/nbd"
        client = await asyncio.to_thread(Client.connect, str(sockets / "nbd"), "x")
        await disk.write(1000, b"from here")
        assert await asyncio.to_thread(client.read, 1000, 9) == b"from here"
        await asyncio.to_thread(client.write, 5000, b"from there")
        assert await disk.read(5000, 10) == b"from there"
        await asyncio.to_thread(client.close)
        before = time.monotonic()
        await offer.remove(force=True)
        assert time.monotonic() - before < 5
        assert await daemon.execute("query-block-exports") == []


async def test_exports_tell_of_bitmaps_and_layers_and_choose_their_server(sockets):
    bitmap, depth = "qemu:dirty-bitmap:since", "qemu:allocation-depth"
    async with Daemon() as daemon:
        await daemon.start_nbd_server(SocketAddressUnix(path=str(sockets / "backup")), name="backup")
        disk = await daemon.open("memory:1M", writable=True)
        await daemon.execute("block-dirty-bitmap-add", {"node": disk.name, "name": "since"})
        await disk.write(0, b"new")
        offer = await daemon.export(disk, name="x", bitmaps=["since"], allocation_depth=True, server="backup")
        assert offer.uris == [f"nbd+unix:///x?socket={sockets}/backup"]
        assert daemon.nbd_server is None
        client = await asyncio.to_thread(Client.connect, str(sockets / "backup"), "x", contexts=[bitmap, depth])
        status = await asyncio.to_thread(client.block_status, 0, 1 << 20)
        assert status[client.contexts[bitmap]] == ((65536, 1), ((1 << 20) - 65536, 0))
        assert status[client.contexts[depth]] == ((1 << 20, 1),)
        await asyncio.to_thread(client.close)
        with pytest.raises(Error, match="Bitmap 'none' is not found"):
            await daemon.export(disk, bitmaps=["none"], server="backup")
