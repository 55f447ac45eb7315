"""Meta contexts with bitmaps of any shape: what is said of them, in which pieces, and how much of it at once."""

from __future__ import annotations

import asyncio
from itertools import groupby

import pytest
from serving import eventually

from blkferry.errors import Error
from blkferry.exports.nbd.contexts import Contexts
from blkferry.exports.nbd.limits import MAX_STATUS_EXTENTS
from blkferry.graph.bitmaps import DirtyBitmap
from blkferry.testing.daemon import DaemonThread
from blkferry.testing.nbd import Client
from blkferry.wire.nbd import client as wire
from blkferry.wire.nbd.constants import Cmd, CmdFlag, Errno, Mode, Opt
from blkferry.wire.nbd.transmission import StatusFilter

GRANULE = 65536
COUNT = 1 << 16  # granules of the disk
SIZE = COUNT * GRANULE
B = "qemu:dirty-bitmap:"


def bitmap(name: str, dirty) -> DirtyBitmap:
    """A bitmap in which the granules `dirty` are."""
    made = DirtyBitmap(name, SIZE, 16, enabled=False)
    for granule in dirty:
        made.mark(granule * GRANULE, (granule + 1) * GRANULE)
    return made


def add_disk(daemon, *bitmaps: DirtyBitmap, **options) -> None:
    daemon.execute("blockdev-add", driver="null-co", node_name="disk", size=SIZE)
    daemon.daemon.graph.find("disk").dirty_bitmaps.update({each.name: each for each in bitmaps})
    daemon.export("disk", bitmaps=[each.name for each in bitmaps], **options)


@pytest.fixture
def daemon():
    with DaemonThread() as started:
        yield started


def everything(client, number: int) -> list[tuple[int, int]]:
    """What a context says of the whole disk, however many requests it takes, with equal neighbours put together."""
    found, at = [], 0
    while at < SIZE:
        extents = client.block_status(at, min(SIZE - at, 0xFFFF_FFFF))[number]
        assert len(extents) <= MAX_STATUS_EXTENTS
        found += extents
        at += sum(length for length, _ in extents)
    assert at == SIZE
    return [(sum(length for length, _ in each), value) for value, each in groupby(found, key=lambda extent: extent[1])]


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
def test_a_fragmented_bitmap_comes_in_bounded_pieces(daemon, mode):
    add_disk(daemon, bitmap("odd", range(1, COUNT, 2)))
    with daemon.client(mode=mode, contexts=[B + "odd"]) as client:
        first = client.block_status(0, 0xFFFF_0000)[2]
        assert first == tuple((GRANULE, each & 1) for each in range(MAX_STATUS_EXTENTS))
        assert everything(client, 2) == [(GRANULE, each & 1) for each in range(COUNT)]


def test_many_bitmaps_share_the_room_of_a_reply(daemon):
    names = [f"b{each}" for each in range(300)]
    add_disk(daemon, *(bitmap(name, range(each, COUNT, 2 + each)) for each, name in enumerate(names)))
    with daemon.client(contexts=[B + name for name in names]) as client:
        assert client.contexts == {B + name: 2 + each for each, name in enumerate(names)}
        answer = client.block_status(0, SIZE)
        assert list(answer) == list(range(2, 302))
        assert sum(map(len, answer.values())) <= MAX_STATUS_EXTENTS
        assert answer[2 + 7][:3] == ((7 * GRANULE, 0), (GRANULE, 1), (8 * GRANULE, 0))


def test_one_extent_if_that_is_wanted(daemon):
    add_disk(daemon, bitmap("b", [0, 1, 5]), bitmap("c", []))
    with daemon.client(contexts=[B + "b", B + "c"]) as client:
        assert client.block_status(100, SIZE - 100, CmdFlag.REQ_ONE) == {
            2: ((2 * GRANULE - 100, 1),),
            3: ((SIZE - 100, 0),),
        }


def test_a_payload_chooses_contexts(daemon):
    add_disk(daemon, bitmap("b", [0]), bitmap("c", [1]), allocation_depth=True)
    with daemon.client(contexts=["base:allocation", "qemu:allocation-depth", B + "b", B + "c"]) as client:

        def filtered(*ids):
            payload = StatusFilter(2 * GRANULE, ids).build()
            return client.call(Cmd.BLOCK_STATUS, 0, len(payload), CmdFlag.PAYLOAD_LEN, payload)

        assert filtered(3).status == {3: ((GRANULE, 0), (GRANULE, 1))}
        assert list(filtered(3, 2, 0).status.items()) == [
            (0, ((2 * GRANULE, 3),)),
            (2, ((GRANULE, 1), (GRANULE, 0))),
            (3, ((GRANULE, 0), (GRANULE, 1))),
        ]
        for wrong in ((4,), (2, 2), ()):
            assert filtered(*wrong).error == Errno.EINVAL
        assert filtered(1).status == {1: ((2 * GRANULE, 1),)}


def test_contexts_of_another_export_of_the_same_node(daemon):
    add_disk(daemon, bitmap("b", [0]))
    daemon.export("disk", "deep", "deep", allocation_depth=True)
    with daemon.client("deep", contexts=["qemu:allocation-depth", B + "b", "base:allocation"]) as client:
        assert client.contexts == {"base:allocation": 0, "qemu:allocation-depth": 1}
    with daemon.client(contexts=[]) as client:
        assert client.call(Cmd.BLOCK_STATUS, 0, 512).error == Errno.EINVAL
    with Client.open(daemon.socket) as client:
        client.greet()
        replies = client.option(Opt.LIST_META_CONTEXT, wire.build_queries(""))
        assert [wire.parse_meta_context(each.payload) for each in replies[:-1]] == [
            (0, "base:allocation"),
            (0, B + "b"),
        ]


def test_a_bitmap_is_in_use_until_its_export_has_gone(daemon):
    add_disk(daemon, bitmap("b", [0]))
    with pytest.raises(Error, match="Bitmap 'b' is currently in use by another operation and cannot be used"):
        daemon.export("disk", "f", "f", bitmaps=["b"])
    with pytest.raises(Error, match="Bitmap 'b' is currently in use"):
        daemon.export("disk", "f", "f", bitmaps=[{"node": "disk", "name": "b"}])
    with daemon.client():
        daemon.execute("block-export-del", id="e", mode="hard")
    eventually(lambda: "e" not in daemon.daemon.exports.ids)
    for _ in range(2):
        daemon.export("disk", "f", "f", bitmaps=["b"])
        daemon.execute("block-export-del", id="f")


def test_a_node_stays_while_one_of_its_bitmaps_is_exported(daemon):
    add_disk(daemon)
    daemon.execute("blockdev-add", driver="null-co", node_name="other", size=SIZE)
    daemon.daemon.graph.find("other").dirty_bitmaps["b"] = bitmap("b", [])
    daemon.export("disk", "f", "f", bitmaps=[{"node": "other", "name": "b"}])
    with pytest.raises(Error, match="Node other is in use") as caught:
        daemon.execute("blockdev-del", node_name="other")
    assert caught.value.hint == "It is used by export 'f' (bitmap 'b')."
    daemon.execute("block-export-del", id="f")
    daemon.execute("blockdev-del", node_name="other")


def test_the_same_bitmap_twice_is_refused_and_leaves_it_free(daemon):
    add_disk(daemon)
    daemon.daemon.graph.find("disk").dirty_bitmaps["b"] = bitmap("b", [])
    with pytest.raises(Error, match="Bitmap 'b' is currently in use"):
        daemon.export("disk", "f", "f", bitmaps=["b", "b"])
    daemon.export("disk", "f", "f", bitmaps=["b"])


async def test_a_long_answer_lets_others_of_its_loop_in_between():
    contexts = Contexts(None, [bitmap("odd", range(1, COUNT, 2))], allocation_depth=False)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    extents = await contexts.extents(2, 0, SIZE, MAX_STATUS_EXTENTS)
    task.cancel()
    assert len(extents) == MAX_STATUS_EXTENTS
    assert turns >= 3
