"""Both kinds of ring against their drivers: chains come out as they were put in, whatever wraps, and go back once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkferry.testing.virtio import DriverMemory, ring_driver
from blkferry.wire.virtio.chain import DescFlag, RingError
from blkferry.wire.virtio.features import Feature
from blkferry.wire.virtio.memory import GuestMemory, Region
from blkferry.wire.virtio.packed import PackedState
from blkferry.wire.virtio.split import SplitRing, SplitState

NEXT, WRITE, INDIRECT = int(DescFlag.NEXT), int(DescFlag.WRITE), int(DescFlag.INDIRECT)
SPLIT = int(Feature.VERSION_1 | Feature.INDIRECT_DESC)
EVENTS = SPLIT | int(Feature.EVENT_IDX)
PACKED = SPLIT | int(Feature.RING_PACKED)
ALL = [SPLIT, EVENTS, PACKED, PACKED | int(Feature.EVENT_IDX)]
IDS = ["split", "split-events", "packed", "packed-events"]


class Pair:
    """A ring and its driver over the same memory."""

    def __init__(self, features, size=8, **options):
        self.memory = DriverMemory(1 << 20)
        self.driver = ring_driver(self.memory, size, features)
        self.logged = []
        self.guest = GuestMemory([self.memory.region()], **options)
        self.ring = self.driver.ring(self.guest)

    def buffers(self, *lengths):
        """Negative lengths are for the device to write."""
        return [(self.memory.allocate(abs(length)), abs(length), length < 0) for length in lengths]

    def send(self, *lengths, indirect=False):
        buffers = self.buffers(*lengths)
        table = self.memory.allocate(16 * len(buffers)) if indirect else None
        head = self.driver.add(buffers, table=table)
        self.driver.publish()
        return head


@pytest.fixture(params=ALL, ids=IDS)
def pair(request):
    made = Pair(request.param)
    yield made
    made.memory.close()


chains = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()).filter(lambda shape: shape[0] + shape[1]),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    features=st.sampled_from(ALL),
    size_bits=st.integers(2, 4),
    rounds=st.lists(st.tuples(chains, st.randoms()), max_size=25),
)
def test_histories_agree_with_a_model(features, size_bits, rounds):
    """Chains added, taken, given back in any order, and collected: content, lengths and order are the model's."""
    pair = Pair(features, 1 << size_bits)
    memory, driver, ring = pair.memory, pair.driver, pair.ring
    floor = memory.allocate(0)
    try:
        sent, taken, expected = [], [], []
        for shapes, random in rounds:
            for reads, writes, indirect in shapes:
                room = driver.room if features & Feature.RING_PACKED else len(driver.free)
                if room < (1 if indirect else reads + writes):
                    continue
                lengths = [random.randrange(1, 40) for _ in range(reads)] + [
                    -random.randrange(1, 40) for _ in range(writes)
                ]
                buffers = pair.buffers(*lengths)
                for address, length, write in buffers:
                    memory.write(address, random.randbytes(length) if not write else bytes(length))
                table = memory.allocate(16 * len(buffers)) if indirect else None
                sent.append((driver.add(buffers, table=table), buffers))
            driver.publish()
            while ring.available():
                chain = ring.take()
                head, buffers = sent.pop(0)
                assert chain.head == head
                readable = b"".join(memory.read(a, n) for a, n, write in buffers if not write)
                assert b"".join(chain.readable) == readable
                assert chain.spans == [(a, n) for a, n, write in buffers if write]
                assert [len(piece) for piece in chain.writable] == [n for _, n, write in buffers if write]
                taken.append((chain, buffers))
            random.shuffle(taken)
            for chain, buffers in taken[: random.randrange(len(taken) + 1)]:
                taken.remove((chain, buffers))
                for piece in chain.writable:
                    piece[:] = random.randbytes(len(piece))
                written = sum(map(len, chain.writable))
                ring.put(chain, written)
                expected.append((chain.head, written))
            assert driver.take() is None or not (features & Feature.RING_PACKED), "seen before it was published"
            ring.publish()
            while (used := driver.take()) is not None:
                assert used == expected.pop(0)
            assert not expected
            if not taken and not sent:
                memory.free_all(floor)
                ring = driver.ring(pair.guest, ring.state)  # somebody else goes on
        assert ring.take() is None
    finally:
        memory.close()


def test_what_is_put_is_unseen_until_it_is_published(pair):
    for _ in range(3):
        pair.send(16, -1)
    for chain in [pair.ring.take() for _ in range(3)]:
        pair.ring.put(chain, 1)
    assert pair.driver.take() is None
    pair.ring.publish()
    assert [pair.driver.take() is not None for _ in range(4)] == [True] * 3 + [False]


def test_the_driver_is_notified_when_it_asks_and_only_then(pair):
    pair.driver.disarm()
    if not pair.driver.event_idx:
        pair.send(16, -1)
        pair.ring.put(pair.ring.take(), 1)
        assert not pair.ring.publish()
        pair.driver.take()
    assert not pair.driver.arm()
    heads = [pair.send(16, -1) for _ in range(2)]
    pair.ring.put(pair.ring.take(), 1)
    assert pair.ring.publish()
    pair.ring.put(pair.ring.take(), 1)
    if pair.driver.event_idx:
        assert not pair.ring.publish(), "it asked for one"
    else:
        assert pair.ring.publish()
    assert [pair.driver.take()[0] for _ in heads] == heads
    assert not pair.ring.publish(), "nothing is new"


def test_the_device_is_kicked_when_it_asks_and_only_then(pair):
    assert not pair.ring.arm()
    pair.driver.add(pair.buffers(16, -1))
    assert pair.driver.publish()
    assert pair.ring.arm(), "it came before the wish"
    pair.ring.take()
    pair.ring.disarm()
    pair.driver.add(pair.buffers(16, -1))
    if not pair.driver.event_idx:
        assert not pair.driver.publish()
    pair.ring.take()


def test_a_legacy_driver_hears_that_nothing_is_left_to_do():
    pair = Pair(SPLIT | int(Feature.NOTIFY_ON_EMPTY))
    pair.driver.disarm()
    for _ in range(2):
        pair.send(16, -1)
    pair.ring.put(pair.ring.take(), 1)
    assert not pair.ring.publish(idle=True)
    pair.ring.put(pair.ring.take(), 1)
    assert pair.ring.publish(idle=True)
    pair.memory.close()


def test_all_that_is_written_is_logged(pair):
    logged = set()
    pair.guest.log = lambda address, length: logged.update(range(address, address + length))
    before = bytes(pair.memory.view)
    pair.send(16, -100, -1)
    chain = pair.ring.take()
    seen = bytes(pair.memory.view)
    for piece in chain.writable:
        piece[:] = b"\x55" * len(piece)
    pair.ring.put(chain, 101)
    pair.ring.publish()
    pair.ring.arm()
    changed = {
        pair.memory.start + at
        for at, (old, new) in enumerate(zip(seen, bytes(pair.memory.view), strict=True))
        if old != new
    }
    assert before != seen
    assert changed <= logged


def test_a_chain_that_was_taken_can_be_built_again(pair):
    pair.send(16, -100, -1)
    chain = pair.ring.take()
    again = pair.ring.again(chain.head, chain.descriptors)
    assert (again.head, again.spans, again.slots) == (chain.head, chain.spans, chain.slots)
    assert again.readable == chain.readable


# Mischief --------------------------------------------------------------------------------------------------------


def split_table(pair, *descriptors):
    for index, descriptor in enumerate(descriptors):
        pair.driver.put_descriptor(pair.driver.descriptors, index, *descriptor)
    pair.driver.make_available(0)
    pair.driver.publish()


def packed_slots(pair, *descriptors):
    for address, length, flags in descriptors:
        pair.driver.put_slot(address, length, 0, flags)
    pair.driver.publish()


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("loop", lambda m: [(m, 16, NEXT, 0)]),
        ("loop", lambda m: [(m, 16, NEXT, 1), (m, 16, NEXT, 0)]),
        ("descriptor 8 of a table of 8", lambda m: [(m, 16, NEXT, 8)]),
        ("no memory at 0x0", lambda m: [(0, 16, 0, 0)]),
        ("no memory", lambda m: [(m, 0xFFFFFFFF, WRITE, 0)]),
        ("no memory", lambda m: [((1 << 64) - 1, 16, WRITE, 0)]),
        ("of no length", lambda m: [(m, 0, 0, 0)]),
        ("to read after one to write", lambda m: [(m, 16, WRITE | NEXT, 1), (m, 16, 0, 0)]),
        ("table of 17 bytes", lambda m: [(m, 17, INDIRECT, 0)]),
        ("table of 0 bytes", lambda m: [(m, 0, INDIRECT, 0)]),
        ("with a next one", lambda m: [(m, 16, INDIRECT | NEXT, 0)]),
        ("no memory", lambda m: [(0, 16, INDIRECT, 0)]),
    ],
)
def test_a_split_ring_refuses(text, make):
    pair = Pair(SPLIT)
    split_table(pair, *make(pair.memory.allocate(64)))
    with pytest.raises(RingError, match=text):
        pair.ring.take()
    pair.memory.close()


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("an indirect descriptor", lambda m: (m, 16, INDIRECT, 0)),
        ("descriptor 4 of a table of 4", lambda m: (m, 16, NEXT, 4)),
        ("loop", lambda m: (m, 16, NEXT, 0)),
        ("no memory", lambda m: (1, 16, 0, 0)),
    ],
)
def test_a_split_ring_refuses_in_an_indirect_table(text, entry):
    pair = Pair(SPLIT)
    table = pair.memory.allocate(64)
    pair.driver.put_descriptor(pair.memory.at(table, 64), 0, *entry(pair.memory.allocate(16)))
    split_table(pair, (table, 64, INDIRECT, 0))
    with pytest.raises(RingError, match=text):
        pair.ring.take()
    pair.memory.close()


def test_indirect_descriptors_must_have_been_negotiated(pair):
    plain = Pair(pair.driver.features & ~int(Feature.INDIRECT_DESC))
    plain.send(16, -1, indirect=True)
    with pytest.raises(RingError, match="not negotiated"):
        plain.ring.take()
    plain.memory.close()


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("longer than the ring", lambda m: [(m, 16, NEXT)] * 8),
        ("no memory", lambda m: [(1, 16, 0)]),
        ("of no length", lambda m: [(m, 0, 0)]),
        ("to read after one to write", lambda m: [(m, 16, WRITE | NEXT), (m, 16, 0)]),
        ("in a chain", lambda m: [(m, 16, NEXT), (m, 16, INDIRECT)]),
        ("table of 24 bytes", lambda m: [(m, 24, INDIRECT)]),
    ],
)
def test_a_packed_ring_refuses(text, make):
    pair = Pair(PACKED)
    packed_slots(pair, *make(pair.memory.allocate(64)))
    with pytest.raises(RingError, match=text):
        pair.ring.take()
    pair.memory.close()


def test_a_packed_ring_refuses_ids_that_it_has_not():
    pair = Pair(PACKED)
    pair.driver.put_slot(pair.memory.allocate(16), 16, 8, 0)
    pair.driver.publish()
    with pytest.raises(RingError, match="buffer id 8"):
        pair.ring.take()
    pair.memory.close()


@pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps_is_refused(index):
    pair = Pair(SPLIT)
    pair.driver.avail[1] = index
    with pytest.raises(RingError, match="in flight"):
        pair.ring.take()
    pair.memory.close()


def test_more_in_flight_than_the_ring_has_is_refused():
    """A driver that goes on with heads that were not given back could have us hold any number of requests."""
    pair = Pair(SPLIT)
    head = pair.send(16, -1)
    pair.ring.take()
    for _ in range(7):
        pair.driver.make_available(head)
        pair.driver.publish()
        pair.ring.take()
    pair.driver.make_available(head)
    pair.driver.publish()
    with pytest.raises(RingError, match="in flight"):
        pair.ring.take()
    pair.memory.close()


@pytest.mark.parametrize("size", [0, 3, 65536, -8])
def test_sizes_of_split_rings(size):
    empty = memoryview(bytearray(1 << 20))
    with pytest.raises(RingError, match="no size of a ring"):
        SplitRing(size, empty, empty, empty, GuestMemory(), features=SPLIT)


def test_areas_must_be_there_and_aligned():
    area = memoryview(bytearray(1024))
    with pytest.raises(RingError, match="descriptor table is 100 bytes, not 128"):
        SplitRing(8, area[:100], area, area, GuestMemory(), features=SPLIT)
    with pytest.raises(RingError, match="device area is not aligned to 4 bytes"):
        SplitRing(8, area, area, area[2:], GuestMemory(), features=SPLIT)
    with pytest.raises(RingError, match="read-only"):
        SplitRing(8, area, area, area.toreadonly(), GuestMemory(), features=SPLIT)


def test_rings_go_on_where_they_are_told():
    pair = Pair(SPLIT)
    pair.driver.used[1] = 7
    assert pair.driver.ring(pair.guest).state == SplitState(7, 7)
    assert pair.driver.ring(pair.guest, SplitState(9)).state == SplitState(9, 7)
    packed = Pair(PACKED)
    state = PackedState(3, 0, 2, 0)
    assert packed.driver.ring(packed.guest, state).state == state
    with pytest.raises(RingError, match="behind the end"):
        packed.driver.ring(packed.guest, PackedState(8, 1, 0, 1))


def test_buffers_may_cross_regions_that_lie_side_by_side():
    memory = DriverMemory(8192)
    start = memory.start
    halves = [Region(start, 4096, memory.view[:4096]), Region(start + 4096, 4096, memory.view[4096:])]
    guest = GuestMemory(halves)
    driver = ring_driver(memory, 8, SPLIT)
    ring = driver.ring(guest)
    driver.add([(start + 4000, 200, False), (start + 4090, 8, True)])
    driver.publish()
    chain = ring.take()
    assert [len(piece) for piece in chain.readable] == [96, 104]
    assert [len(piece) for piece in chain.writable] == [6, 2]
    memory.close()
