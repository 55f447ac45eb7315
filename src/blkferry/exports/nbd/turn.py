"""The hot loop: every whole request of one recv, executed in order, answered with one send (rules R2 and R3).

This is the only module written for speed alone. It handles the two commonest requests, reads that cannot sleep and
buffered writes without flags, in straight lines, and hands everything else to `requests.dispatch`. Headers are compared
eight bytes at a time: magic, flags and type of a request, and of a reply, are one number each.

Where the export is not one piece (`places`), each request begins with finding its piece; a write that has none in which
it may overwrite is put by its driver at once, if that can be done. Both may void what the turn knew: pieces are found
anew for every request, and replies that are still to be sent from a mapped file leave before such a write.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from blkferry.exports.limits import PUT_COST, TURN_BYTES
from blkferry.exports.nbd import later, requests
from blkferry.exports.nbd.limits import (
    MAX_MAPPED,
    MAX_PLAIN_READ,
    SENDFILE_FROM,
    ZEROES,
)
from blkferry.exports.places import DRIVEN, NOWHERE
from blkferry.graph import access
from blkferry.plane.services import MAX_SLOTS, SCRATCH_OUT
from blkferry.plane.window import REGION_BITS
from blkferry.wire.nbd import codec
from blkferry.wire.nbd import transmission as wire
from blkferry.wire.nbd.constants import MAX_REQUEST, Mode

if TYPE_CHECKING:
    from blkferry.exports.nbd.client import NbdClient
    from blkferry.exports.places import Lane, Piece, Places
    from blkferry.plane.storage import Storage


def serve(client: NbdClient, data: memoryview, end: int) -> int:
    """Execute every whole request in data[:end], and leave the rest in the client's stash.

    Returns the number of requests if all were small reads, or one write, and went straight; else 0.
    """
    services = client.services
    out, view = services.scratch_out, services.scratch_view
    slots: dict[int, tuple[memoryview]] = {}
    slot_length = 0
    places, root, replies = client.places, client.root, client.replies
    read_end = write_end = map_end = hot_end = delta = inline_flags = hot = bits = mark_bits = 0
    fd = -1
    window = pieces = put = marking = marked = None
    begins_writes = False
    current: Lane | Places | None = places  # neither a lane nor none
    started = places.turn = time.monotonic()
    whole = places.look()
    if whole is not None:
        lane, delta, _, read_end, write_end = whole
        assert lane is not None
        storage, fd, inline_flags, marks, mapped, map_end, hot, window = lane.ready(started)
        replies.storages[:] = [(0, storage)]
        hot_end = min(map_end - delta, read_end)
        pace = storage.pace
        if storage.direct or root.writethrough or (started < pace.careful_until and not pace.begin(started)):
            write_end = 0
    else:
        replies.storages.clear()
        if client.outbox.lends:
            client.outbox.settle()
        pieces, bits, size, node = places.granules, places.bits, places.size, root.node
        pace = places.own_pace
        if places.may_write and not root.writethrough and (started >= pace.careful_until or pace.begin(started)):
            put = access.write_now
        begins_writes = places.opaque and not client.read_only
    marking = places.marking
    if marking is not None:
        marked, mark_bits = marking.marked, marking.bits
    mode = client.mode
    simple, structured = mode is Mode.SIMPLE, mode is Mode.STRUCTURED
    read_head, read_df_head, write_head, unpack, header, data_prefix, pack_data, data_header = codec.FAST[mode]
    preadv, pwritev = os.preadv, os.pwritev
    straight = True
    written = carried = 0
    add_piece, add_spot, spots = replies.pieces.append, replies.spots.append, replies.spots
    piece: Piece | None = NOWHERE
    pos = filled = begun = 0
    budget = TURN_BYTES
    while end - pos >= header:
        head, cookie, offset, length = unpack(data, pos)
        is_read = head == read_head or head == read_df_head  # noqa: PLR1714 - a set costs twice as much
        if pieces is not None:
            piece = pieces.get(offset >> bits)
            if piece is None:
                if put is not None and head == write_head and length >= SENDFILE_FROM:
                    piece = NOWHERE  # its driver finds the place as fast, and most such writes allocate
                else:
                    piece = places.fill(offset)
                    bits = places.bits
            lane, delta, piece_end, read_end, write_end = piece
            if lane is not current:
                if lane is not None:
                    current = lane
                    storage, fd, inline_flags, marks, mapped, map_end, hot, window = lane.ready(started)
                    replies.storages.append((len(spots), storage))
                elif is_read and 0 < length < SENDFILE_FROM and offset + length <= piece_end:
                    reply = requests.zeroes(mode, codec.request(head, cookie, offset, length))
                    if filled + len(reply) > SCRATCH_OUT:
                        budget -= replies.send(begun, filled)
                        filled = begun = 0
                        if budget <= 0 or client.outbox.blocked:
                            break
                    begun, filled = replies.append(begun, filled, reply)
                    pos += header
                    continue
            if is_read:
                if length >= SENDFILE_FROM and read_end:
                    read_end = places.reach(piece, offset + length)
                    bits = places.bits
                hot_end = read_end if read_end + delta <= map_end else 0
            elif put is None:
                write_end = 0
        if is_read and offset + length <= read_end and 0 < length < SENDFILE_FROM:
            start = filled + data_header
            place = offset + delta
            if start + length > SCRATCH_OUT or len(spots) == MAX_MAPPED:
                budget -= replies.send(begun, filled)
                filled = begun = 0
                if budget <= 0 or client.outbox.blocked:
                    break
                start = data_header
            if offset + length <= hot_end:
                region = place >> REGION_BITS
                last = place + length
                if marks[region] == hot and (last - 1) >> REGION_BITS == region:
                    if simple:
                        pack_data(out, filled, data_prefix, cookie)
                    elif structured:
                        pack_data(out, filled, data_prefix, cookie, length + 8, offset)
                    else:
                        pack_data(out, filled, data_prefix, cookie, offset, length + 8, offset)
                    add_piece(view[begun:start])
                    add_piece(mapped[place:last])
                    add_spot(place)
                    begun = filled = start
                    pos += header
                    continue
                assert window is not None
                window.touch(region, services.cache)
            if length != slot_length:
                slots, slot_length = services.read_slots(length), length
            slot = slots.get(start)
            if slot is None:
                slot = (view[start : start + length],)
                if len(slots) < MAX_SLOTS:  # clients of odd lengths could have us keep one for every byte
                    slots[start] = slot
            try:
                count = preadv(fd, slot, place, inline_flags)
            except BlockingIOError:
                count = -1
            except OSError as error:
                pos += header
                reply = requests.failed(client, codec.request(head, cookie, offset, length), error)
                begun, filled = replies.append(begun, filled, reply)
                continue
            if count == length:
                pos += header
                if simple:
                    pack_data(out, filled, data_prefix, cookie)
                elif not out[start] and head == read_head and out.startswith(ZEROES[:length], start):
                    request = codec.request(head, cookie, offset, length)
                    begun, filled = replies.append(
                        begun, filled, wire.hole_chunk(mode, request, offset, length, done=True)
                    )
                    continue
                elif structured:
                    pack_data(out, filled, data_prefix, cookie, length + 8, offset)
                else:
                    pack_data(out, filled, data_prefix, cookie, offset, length + 8, offset)
                filled = start + length
                continue
        elif head == write_head and offset + length <= write_end and 0 < length <= end - pos - header:
            if marking is not None:
                stretch = offset >> mark_bits
                if marked is None or offset + length > stretch + 1 << mark_bits:
                    marking.mark(offset, length)
                else:
                    marked[stretch >> 3] |= 1 << (stretch & 7)
            pos += header
            storage.dirty += 1  # at once: a flush may follow in this very turn
            try:
                count = pwritev(fd, (data[pos : pos + length],), offset + delta)
                while count < length:
                    count += pwritev(fd, (data[pos + count : pos + length],), offset + delta + count)
            except OSError as error:
                reply = requests.failed(client, codec.request(head, cookie, offset, length), error)
            else:
                reply = codec.write_reply(mode, cookie, offset)
            pos += length
            written += length
            begun, filled = replies.append(begun, filled, reply)
            continue
        elif put is not None and head == write_head and offset + length <= size and 0 < length <= end - pos - header:
            if spots:  # what has not been sent must not become something else before it is
                budget -= replies.send(begun, filled)
                filled = begun = 0
            done = True
            try:
                done = put(node, offset, data[pos + header : pos + header + length])
            except OSError as error:
                reply = requests.failed(client, codec.request(head, cookie, offset, length), error)
            else:
                reply = codec.write_reply(mode, cookie, offset)
            bits = places.bits
            if done:
                pos += header + length
                written += length
                begun, filled = replies.append(begun, filled, reply)
                budget -= PUT_COST
                if budget <= 0:
                    break
                continue
        elif is_read and offset + length <= hot_end and length <= MAX_REQUEST and filled + data_header <= SCRATCH_OUT:
            place = offset + delta
            first, last = place >> REGION_BITS, (place + length - 1) >> REGION_BITS
            if length and marks[first] == hot == marks[last] and last - first <= 1:
                if simple:
                    pack_data(out, filled, data_prefix, cookie)
                elif structured:
                    pack_data(out, filled, data_prefix, cookie, length + 8, offset)
                else:
                    pack_data(out, filled, data_prefix, cookie, offset, length + 8, offset)
                replies.send(begun, filled + data_header, more=True)
                client.outbox.send_file(storage, place, length, lent=places.lent)
                pos += header
                filled = begun = 0
                straight = False
                budget -= length
                if budget <= 0 or client.outbox.blocked:
                    break
                continue
        elif (
            is_read
            and piece is DRIVEN
            and 0 < length <= MAX_PLAIN_READ
            and offset + length <= size
            and not client.must_wait()
            and later.read_plain(client, head, cookie, offset, length)
        ):
            pos += header
            straight = False
            budget -= length
            if budget <= 0:
                break
            continue
        elif (
            begins_writes
            and head == write_head
            and 0 < length <= end - pos - header
            and offset + length <= size
            and not client.must_wait()
            and later.write_plain(client, head, cookie, offset, data[pos + header : pos + header + length])
        ):
            pos += header + length
            carried += length
            straight = False
            budget -= length
            if budget <= 0:
                break
            continue
        # Everything that is not the common case leaves the straight line here.
        budget -= replies.send(begun, filled, more=length >= SENDFILE_FROM)
        filled = begun = 0
        straight = False
        if client.must_wait() or budget <= 0:
            break
        request = codec.request(head, cookie, offset, length)
        if not codec.is_request(mode, head):
            client.lost_step(head, request)
            return 0
        budget -= length
        after = requests.dispatch(client, data, pos + header, end, request)
        carried += after - pos - header
        pos = after
        bits = places.bits
        if client.closed or client.ending:
            client.requests += (pos - written - carried) // header
            return 0
        if client.payload is not None:
            break
    replies.send(begun, filled)
    requests_served = (pos - written - carried) // header
    if written:
        pace.end(started, requests_served)
    client.requests += requests_served
    client.turn_over(data[pos:end], more=end - pos >= header)
    return requests_served if straight and (not written or requests_served == 1) else 0


class Replies:
    """The replies of a turn, in order: scratch memory, in turns with pieces of mapped files. Empty between turns.

    `spots` says where in its file each of the latter lies, `storages` from which of them on it is which file.
    """

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self.pieces: list[memoryview] = []
        self.spots: list[int] = []
        self.storages: list[tuple[int, Storage]] = []

    def send(self, begun: int, filled: int, *, more: bool = False) -> int:
        """Send everything; what is in scratch memory from `begun` to `filled` comes last. Returns how many bytes."""
        client = self._client
        view = client.services.scratch_view
        if not self.spots:
            if filled:
                client.outbox.send(view[:filled], more=more)
            return filled
        if filled > begun:
            self.pieces.append(view[begun:filled])
        total = filled + sum(map(len, self.pieces[1::2]))
        client.outbox.send_mapped(self.pieces, self.spots, self.storages, total, lent=client.places.lent)
        self.pieces.clear()
        self.spots.clear()
        self.storages[:] = [(0, self.storages[-1][1])]
        return total

    def append(self, begun: int, filled: int, reply: bytes) -> tuple[int, int]:
        """Add a finished reply to the scratch memory, sending what is there if it is full."""
        if filled + len(reply) > SCRATCH_OUT:
            self.send(begun, filled)
            begun = filled = 0
        end = filled + len(reply)
        self._client.services.scratch_view[filled:end] = reply
        return begun, end
