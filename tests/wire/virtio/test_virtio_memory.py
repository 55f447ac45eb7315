import pytest

from blkferry.wire.virtio.memory import NO_HOME, GuestMemory, MemoryFault, Region


def region(start, length, fill=0):
    return Region(start, length, memoryview(bytearray([fill]) * length))


def test_ranges_are_found_in_their_regions():
    memory = GuestMemory([region(0x2000, 0x1000, 2), region(0x1000, 0x1000, 1), region(0x8000, 0x1000, 8)])
    assert b"".join(memory.pieces(0x1FFE, 4)) == b"\1\1\2\2"
    assert bytes(memory.piece(0x8FFF, 1)) == b"\x08"
    for address, length in [(0xFFF, 1), (0x2FFF, 2), (0x9000, 1), (0x1000, 1 << 32), ((1 << 64) - 1, 1), (0, 1)]:
        with pytest.raises(MemoryFault):
            memory.pieces(address, length)
    with pytest.raises(MemoryFault, match="not in one region"):
        memory.piece(0x1FFE, 4)


def test_regions_may_not_overlap():
    memory = GuestMemory([region(0x1000, 0x1000)])
    for start in (0x800, 0x1000, 0x1FFF):
        with pytest.raises(MemoryFault, match="overlap"):
            memory.add(region(start, 0x1000))
    memory.add(region(0x2000, 0x1000))
    memory.remove(0x1FFF, 0x2000)
    assert [each.guest_start for each in memory.regions] == [0x2000]


@pytest.mark.parametrize(("start", "length", "have"), [(0, 0, 1), (0, 2, 1), (-1, 1, 1), ((1 << 64) - 1, 2, 2)])
def test_regions_that_cannot_be(start, length, have):
    with pytest.raises(MemoryFault, match="cannot be"):
        Region(start, length, memoryview(bytearray(have)))


def test_what_is_missing_is_asked_for_once():
    asked = []

    def miss(address):
        asked.append(address)
        return region(0x1000, 0x1000, 7) if 0x1000 <= address < 0x2000 else None

    memory = GuestMemory(miss=miss)
    assert bytes(memory.piece(0x1800, 1)) == b"\7"
    assert memory.locate(0x1900)[:2] == (0x1000, 0x2000)
    assert asked == [0x1800]
    with pytest.raises(MemoryFault):
        memory.pieces(0x1FFF, 2)
    memory.remove(0, 1 << 64)
    memory.piece(0x1000, 1)
    assert asked == [0x1800, 0x2000, 0x1000]


def test_a_region_that_was_asked_for_takes_the_place_of_what_it_overlaps():
    memory = GuestMemory([region(0x1000, 0x1000)], miss=lambda _: region(0x1000, 0x4000, 9))
    assert bytes(memory.piece(0x3000, 1)) == b"\x09"
    assert len(memory.regions) == 1


def test_read_only_memory_is_not_written():
    memory = GuestMemory([Region(0x1000, 16, memoryview(bytes(16)))])
    assert len(memory.pieces(0x1000, 16)) == 1
    with pytest.raises(MemoryFault, match="read-only"):
        memory.pieces(0x1000, 16, write=True)
    assert memory.locate(0x1000) is NO_HOME
