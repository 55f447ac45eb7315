"""The hot loop: one request after the other, read from the device, executed, and answered (rules R2 and R3).

This is the only module of FUSE written for speed alone. It handles reads that cannot sleep and buffered writes in
straight lines and hands everything else to `transfers` and `operations`. A read of what is known to be in the page
cache is answered from a mapping of the image: one call moves the bytes from there into the reader's memory.

What is known of places is looked up anew after everything that left the straight line, and for each request where the
file is not one piece. Every request is answered before the next is received, so nothing else can get in between.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from blkferry.exports.fuse import operations, transfers
from blkferry.exports.fuse.limits import TURN_REQUESTS
from blkferry.exports.limits import PUT_COST, TURN_BYTES
from blkferry.graph import access
from blkferry.plane.pace import STALL_SECONDS
from blkferry.plane.services import MAX_SLOTS, SCRATCH_OUT
from blkferry.plane.window import REGION_BITS
from blkferry.wire.fuse.constants import ROOT_ID, Opcode
from blkferry.wire.fuse.replies import OUT_HEADER, WRITE_REPLY
from blkferry.wire.fuse.requests import HEAD, READ_SIZE

if TYPE_CHECKING:
    from blkferry.exports.fuse.session import Session
    from blkferry.exports.places import Lane, Places

_READ, _WRITE = int(Opcode.READ), int(Opcode.WRITE)
_OUT, _WRITTEN = OUT_HEADER.size, WRITE_REPLY.size


def serve(session: Session) -> None:
    """Serve what the kernel asks, until there is nothing more to serve at once or others have to be."""
    services, device, places, root, inode = (
        session.services,
        session.fd,
        session.places,
        session.root,
        session.inode,
    )
    readv, write, writev, preadv, pwritev = os.readv, os.write, os.writev, os.preadv, os.pwritev
    unpack, pack_answer, pack_written = HEAD.unpack_from, OUT_HEADER.pack_into, WRITE_REPLY.pack_into
    answer, write_answer = session.answer, session.write_answer
    monotonic, time_ns = time.monotonic, time.time_ns
    scratch = services.scratch_view
    budget, left = TURN_BYTES, TURN_REQUESTS
    read_end = write_end = hot_end = delta = map_end = inline_flags = hot = size = bits = mark_bits = slot_size = 0
    fd = -1
    pieces = put = marked = marking = window = None
    slot: tuple[memoryview] = (scratch,)
    current: Lane | Places | None = places
    pace = places.own_pace
    vector, room, data = session.vector, session.room, session.data
    stale = True
    while left and budget > 0:
        try:
            received = readv(device, vector)
        except BlockingIOError:
            received = session.poll() if left < TURN_REQUESTS else 0
            if not received:
                break
        except OSError as error:
            if session.receive_failed(error):
                continue
            break
        left -= 1
        if stale:
            stale = False
            now = places.turn = monotonic()
            size = places.size
            pieces = put = marked = marking = None
            whole = places.look()
            if whole is not None:
                lane, delta, _, read_end, write_end = whole
                assert lane is not None
                storage, fd, inline_flags, marks, mapped, map_end, hot, window = lane.ready(now)
                pace = storage.pace
                hot_end = min(map_end - delta, read_end)
                if storage.direct or root.writethrough or (now < pace.careful_until and not pace.begin(now)):
                    write_end = 0
            else:
                pieces, bits, current, pace = places.granules, places.bits, places, places.own_pace
                if places.may_write and not root.writethrough and (now >= pace.careful_until or pace.begin(now)):
                    put = access.write_now
            marking = places.marking
            if marking is not None:
                marked, mark_bits = marking.marked, marking.bits
        length, opcode, unique, nodeid, _, offset, count = unpack(room)
        end = offset + count
        if opcode == _READ and received == READ_SIZE and length == READ_SIZE and nodeid == ROOT_ID and end <= size:
            if pieces is not None:
                piece = pieces.get(offset >> bits)
                if piece is None:
                    piece = places.fill(offset)
                    bits = places.bits
                lane, delta, read_end = piece[0], piece[1], piece[3]
                if lane is not None:
                    if lane is not current:
                        current = lane
                        storage, fd, inline_flags, marks, mapped, map_end, hot, window = lane.ready(places.turn)
                    if read_end and end > read_end:
                        read_end = places.reach(piece, end)
                        bits = places.bits
                hot_end = read_end if read_end + delta <= map_end else 0
            place = offset + delta
            if end <= hot_end and count:
                first, last = place >> REGION_BITS, (place + count - 1) >> REGION_BITS
                if marks[first] == hot and (first == last or (marks[last] == hot and last == first + 1)):
                    pack_answer(answer, 0, _OUT + count, 0, unique)
                    try:
                        writev(device, (answer, mapped[place : place + count]))
                    except OSError as error:
                        session.reply_failed(error)
                    session.sent += count
                    budget -= count
                    continue
                assert window is not None
                window.touch(first, services.cache)
                if first != last:
                    window.touch(last, services.cache)
            if end <= read_end and 0 < count <= SCRATCH_OUT:
                if count != slot_size:
                    slots, slot_size = services.read_slots(count), count
                    slot = slots.get(0) or (scratch[:count],)
                    if len(slots) < MAX_SLOTS:
                        slots[0] = slot
                try:
                    done = preadv(fd, slot, place, inline_flags)
                except BlockingIOError:
                    done = -1
                except OSError as error:
                    session.fail(unique, error, "reading")
                    continue
                if done == count:
                    pack_answer(answer, 0, _OUT + count, 0, unique)
                    try:
                        writev(device, (answer, slot[0]))
                    except OSError as error:
                        session.reply_failed(error)
                    session.sent += count
                    budget -= count
                    continue
            transfers.read(session, unique, offset, count)
        elif opcode == _WRITE and received == READ_SIZE + count and length == received and nodeid == ROOT_ID:
            if pieces is not None:
                piece = pieces.get(offset >> bits)
                if piece is None:
                    piece = places.fill(offset)
                    bits = places.bits
                lane, delta, write_end = piece[0], piece[1], piece[4] if put is not None else 0
                if lane is not None and lane is not current:
                    current = lane
                    storage, fd, inline_flags, marks, mapped, map_end, hot, window = lane.ready(places.turn)
            began = monotonic()
            if end <= write_end and count:
                if marking is not None:
                    stretch = offset >> mark_bits
                    if marked is None or end > stretch + 1 << mark_bits:
                        marking.mark(offset, count)
                    else:
                        marked[stretch >> 3] |= 1 << (stretch & 7)
                storage.dirty += 1  # before it is answered: a flush may follow in this very turn
                place, view = offset + delta, data[:count]
                try:
                    done = pwritev(fd, (view,), place)
                    while done < count:
                        done += pwritev(fd, (view[done:],), place + done)
                except OSError as error:
                    session.fail(unique, error, "writing")
                else:
                    inode.modified = time_ns()
                    pack_written(write_answer, 0, _WRITTEN, 0, unique, count)
                    try:
                        write(device, write_answer)
                    except OSError as error:
                        session.reply_failed(error)
                    session.received += count
            elif put is not None and end <= size and count:
                done_now = True
                try:
                    done_now = put(root.node, offset, data[:count])
                except OSError as error:
                    session.fail(unique, error, "writing")
                else:
                    if done_now:
                        inode.modified = time_ns()
                        pack_written(write_answer, 0, _WRITTEN, 0, unique, count)
                        session.reply(write_answer)
                        session.received += count
                bits = places.bits
                budget -= PUT_COST
                if not done_now:
                    transfers.write(session, unique, offset, count, tried=True)
                    stale = True
            else:
                transfers.write(session, unique, offset, count)
                began = monotonic()
                stale = True
            budget -= count
            if monotonic() - began > STALL_SECONDS:
                pace.end(began, 0)
                stale = True
            if not stale:
                continue
        else:
            operations.execute(session, room[:received])
        stale = True
        if session.closed or session.must_wait():
            break
        vector, room, data = session.vector, session.room, session.data
    session.requests += TURN_REQUESTS - left
