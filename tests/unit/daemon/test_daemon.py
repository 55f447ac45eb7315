"""The daemon as Python programs hold it."""

import asyncio
import time

from blkferry import Daemon
from blkferry.schema.sockets import SocketAddressUnix
from blkferry.testing.nbd import Client


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
