"""The hot loop: all chains that are available, executed in order, shown to the driver together (rules R2 and R3).

This is the only module here that is written for speed alone. It has two loops. `_straight` is for split rings whose
memory is not being logged. It knows the commonest requests by their shape: a header, one buffer, a status byte, each in
a descriptor of its own, in the ring or in an indirect table. Reads of what is in the page cache and overwriting writes
are executed on the spot, payload between file and driver moved by one call or copied from a mapping of the file. What
is not like that, in any way, is taken apart and executed by `requests`. `_any` does that with everything.

The driver's memory may change under our eyes. Every word is loaded once and checked before it is used.
"""

from __future__ import annotations

import os
import time
from struct import Struct
from typing import TYPE_CHECKING, Final

from blkferry.exports.places import NOWHERE
from blkferry.exports.virtio_blk import requests
from blkferry.exports.virtio_blk.limits import (
    BATCH,
    FILL_BELOW,
    MAX_COPY,
    MAX_INLINE,
    ZEROES,
)
from blkferry.exports.virtio_blk.request import Malformed, Request
from blkferry.exports.virtio_blk.transfer import Transfer
from blkferry.plane.window import REGION_BITS
from blkferry.wire.virtio.chain import INDIRECT, NEXT, WRITE, Chain
from blkferry.wire.virtio.split import DESCRIPTOR, USED_ELEM, SplitRing
from blkferry.wire.virtio_blk import HEADER, Type

if TYPE_CHECKING:
    from blkferry.exports.places import Lane, Places
    from blkferry.exports.virtio_blk.queue import Queue
    from blkferry.plane.storage import Storage

_TABLE: Final = Struct("<QQQIHHQIH2x")
"""Three descriptors side by side, of which the first, but for its address, is one number, and the last has no next."""

_HEADER_SHAPE: Final = HEADER.size | NEXT << 32 | 1 << 48
"""That number: a header's length, its flags, and that the second descriptor is the next one."""

_HEADER: Final = Struct("<I4xQ")
"""Type and sector (section 5.2.6)."""

_IN, _OUT = int(Type.IN), int(Type.OUT)
_IN_FLAGS, _OUT_FLAGS = NEXT | WRITE, NEXT


def serve(queue: Queue) -> int:
    """Execute what is available, `BATCH` at most; returns how many. Raises RingError."""
    ring, places = queue.ring, queue.device.places
    started = places.turn = time.monotonic()
    pace = places.pace
    inline_writes = not queue.device.root.writethrough and (started >= pace.careful_until or pace.begin(started))
    if isinstance(ring, SplitRing) and queue.memory.log is None:
        count = _straight(queue, ring, inline_writes=inline_writes)
    else:
        count = _any(queue, inline_writes=inline_writes)
    if inline_writes:
        pace.end(started, count)
    return count


def _any(queue: Queue, *, inline_writes: bool) -> int:
    """Rings of any kind, requests of any shape."""
    ring, inflight = queue.ring, queue.inflight
    count = 0
    while count < BATCH:
        chain = ring.take()
        if chain is None:
            break
        count += 1
        if inflight is not None:
            inflight.begin((chain.head,), (chain,))
        execute(queue, chain, inline_writes=inline_writes)
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


def _straight(queue: Queue, ring: SplitRing, *, inline_writes: bool) -> int:
    heads = ring.take_heads(BATCH)
    if not heads:
        return 0
    device, memory, inflight = queue.device, queue.memory, queue.inflight
    if inflight is not None:
        inflight.begin(heads)
    places = device.places
    data_end = later_end = read_end = write_end = hot_end = map_end = delta = inline_flags = hot = bits = mark_bits = 0
    fd = -1
    marks, mapped, window, pieces, marking, marked = bytearray(), ZEROES, None, None, None, None
    storage: Storage
    current: Lane | Places | None = places  # neither a lane nor none
    now = places.turn
    whole = places.whole
    if whole is not None:
        lane, delta, data_end, read_end, write_end = whole
        assert lane is not None
        later_end = write_end
        storage, fd, inline_flags, marks, _, map_end, hot, window = lane.ready(now)
        if window is not None:
            mapped = window.copies
            map_end = min(map_end, len(mapped))
            hot_end = map_end - delta if map_end else 0
        if storage.direct or not inline_writes:
            write_end = 0
    else:
        pieces, bits = places.granules, places.bits
    marking = places.marking
    if marking is not None:
        marked, mark_bits = marking.marked, marking.bits
    table, size, indirect = ring.descriptors, ring.size, ring.indirect
    unaligned = device.block_size - 1
    used_ring, used, mask = ring.device, ring.next_used, ring.size - 1
    bytes_read = bytes_written = 0
    unpack, unpack_table, unpack_header, pack_used = (
        DESCRIPTOR.unpack_from,
        _TABLE.unpack_from,
        _HEADER.unpack_from,
        USED_ELEM.pack_into,
    )
    preadv, pwritev, put = os.preadv, os.pwritev, queue.put_heads
    home = data_home = memory.home
    base, limit, view, _ = home
    data_base, data_limit, data_view, _ = data_home
    for head in heads:
        straight = False
        if head < size:
            at, length, flags, after = unpack(table, head << 4)
            if not base <= at < limit:
                home = base, limit, view, _ = memory.locate(at)
            if flags == INDIRECT and length == 48 and indirect and base <= at <= limit - 48:
                at, shape, data, count, data_flags, after, status, one, last = unpack_table(view, at - base)
                straight = shape == _HEADER_SHAPE and after == 2
                if not base <= at < limit:
                    home = base, limit, view, _ = memory.locate(at)
            elif flags == NEXT and after < size and length == 16:
                data, count, data_flags, after = unpack(table, after << 4)
                if after < size:
                    status, one, last, _ = unpack(table, after << 4)
                    straight = True
            if straight:
                if not data_base <= data < data_limit:
                    data_home = data_base, data_limit, data_view, _ = memory.locate(data)
                straight = (
                    one == 1
                    and last == WRITE
                    and base <= at <= limit - 16
                    and base <= status < limit
                    and data_base <= data
                    and data + count <= data_limit
                )
        if straight:
            kind, sector = unpack_header(view, at - base)
            offset = sector << 9
            stop = offset + count
            if pieces is not None:
                piece = pieces.get(offset >> bits)
                if piece is None:
                    if kind == _IN or (kind == _OUT and count < FILL_BELOW):
                        piece = places.fill(offset)
                        bits = places.bits
                    else:  # its driver finds the place as fast, and most such writes allocate
                        piece = NOWHERE
                lane, delta, piece_end, read_end, write_end = piece
                data_end = piece_end if lane is not None else 0
                later_end = write_end
                if lane is not current and lane is not None:
                    current = lane
                    storage, fd, inline_flags, marks, _, map_end, hot, window = lane.ready(now)
                    mapped = window.copies if window is not None else ZEROES
                    map_end = min(map_end, len(mapped)) if window is not None else 0
                if kind == _IN and stop > read_end and read_end:
                    read_end = places.reach(piece, stop)
                    bits = places.bits
                hot_end = map_end - delta if map_end else 0
                if not inline_writes or (lane is not None and lane.storage.direct):
                    write_end = 0
            if (
                kind == _IN
                and data_flags == _IN_FLAGS
                and 0 < count <= MAX_INLINE
                and not (count & 511 or offset & unaligned)
            ):
                start = data - data_base
                if stop <= read_end:
                    place = offset + delta
                    end = place + count
                    done = False
                    if stop <= hot_end and count <= MAX_COPY:
                        region = place >> REGION_BITS
                        if marks[region] == hot and (end - 1) >> REGION_BITS == region:
                            data_view[start : start + count] = mapped[place:end]
                            assert window is not None
                            done = not window.lost
                            if not done:
                                hot_end = map_end = 0
                        elif window is not None:
                            window.touch(region, queue.services.cache)
                    if not done:
                        try:
                            done = preadv(fd, (data_view[start : start + count],), place, inline_flags) == count
                        except OSError:
                            pass  # it is asked for again, in a way that finds out why
                    if done:
                        view[status - base] = 0
                        pack_used(used_ring, 4 + ((used & mask) << 3), head, count + 1)
                        bytes_read += count
                        used = used + 1 & 0xFFFF
                        if inflight is not None:
                            put.append(head)
                        continue
                if stop <= data_end:
                    transfer = Transfer(queue, ring, head, home, status, data, count, is_read=True)
                    if transfer.read(storage, offset + delta, data_home):
                        continue
                elif pieces is not None and lane is None and stop <= piece_end and count <= len(ZEROES):
                    data_view[start : start + count] = ZEROES[:count]
                    view[status - base] = 0
                    pack_used(used_ring, 4 + ((used & mask) << 3), head, count + 1)
                    bytes_read += count
                    used = used + 1 & 0xFFFF
                    if inflight is not None:
                        put.append(head)
                    continue
            elif (
                kind == _OUT
                and data_flags == _OUT_FLAGS
                and stop <= later_end
                and 0 < count <= MAX_INLINE
                and not (count & 511 or offset & unaligned)
                and not memory.lost  # the sector may be zeroes that took its place
            ):
                if marking is not None:
                    stretch = offset >> mark_bits
                    if marked is None or stop > stretch + 1 << mark_bits:
                        marking.mark(offset, count)
                    else:
                        marked[stretch >> 3] |= 1 << (stretch & 7)
                if write_end:
                    start = data - data_base
                    storage.dirty += 1  # at once: a flush may follow in this very turn
                    try:
                        done = pwritev(fd, (data_view[start : start + count],), offset + delta) == count
                    except OSError:
                        done = False  # as above: writing the same again is no harm
                    if done:
                        view[status - base] = 0
                        pack_used(used_ring, 4 + ((used & mask) << 3), head, 1)
                        bytes_written += count
                        used = used + 1 & 0xFFFF
                        if inflight is not None:
                            put.append(head)
                        continue
                else:
                    transfer = Transfer(queue, ring, head, home, status, data, count, is_read=False)
                    if transfer.write(storage, offset + delta, data_home):
                        continue
        # Everything that is not the common case leaves the straight line here.
        ring.next_used = used
        execute(queue, ring.chain(head), inline_writes=inline_writes)
        used = ring.next_used
        bits = places.bits
        if whole is not None and places.whole is not whole:
            data_end = read_end = later_end = 0  # what the node said of its place is void; the next turn asks again
    ring.next_used = used
    queue.bytes_read += bytes_read
    queue.bytes_written += bytes_written
    memory.home = home
    return len(heads)
