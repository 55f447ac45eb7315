"""The hot loop: all chains that are available, executed in order, shown to the driver together (rules R2 and R3)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from blkferry.exports.virtio_blk import requests
from blkferry.exports.virtio_blk.limits import STALL_PENALTY, STALL_SECONDS, TURN_REQUESTS, WRITE_SECONDS
from blkferry.exports.virtio_blk.request import Malformed, Request

if TYPE_CHECKING:
    from blkferry.exports.virtio_blk.queue import Queue
    from blkferry.wire.virtio.chain import Chain


def serve(queue: Queue) -> int:
    """Execute what is available, `TURN_REQUESTS` at most; returns how many. Raises RingError."""
    ring, inflight = queue.ring, queue.inflight
    places = queue.device.places
    started = places.turn = time.monotonic()
    whole = places.look()
    throttled = places if whole is None or whole[0] is None else whole[0].storage
    inline_writes = not queue.device.root.writethrough and started >= throttled.inline_writes_from
    count = 0
    while count < TURN_REQUESTS:
        chain = ring.take()
        if chain is None:
            break
        count += 1
        if inflight is not None:
            inflight.begin((chain.head,), (chain,))
        execute(queue, chain, inline_writes=inline_writes)
    stalled = time.monotonic() - started
    if stalled > STALL_SECONDS + count * WRITE_SECONDS:
        throttled.inline_writes_from = started + stalled + STALL_PENALTY * stalled
    return count


def execute(queue: Queue, chain: Chain, *, inline_writes: bool) -> None:
    """Execute one chain, whatever it is."""
    try:
        request = Request(chain)
    except Malformed as mistake:
        queue.device.complain(str(mistake))
        queue.give_up(chain)
        return
    requests.dispatch(queue, request, inline_writes=inline_writes)
