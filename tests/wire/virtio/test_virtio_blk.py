from blkferry.wire.virtio_blk import CONFIG_SIZE, CONFIG_WRITEBACK, Config

QEMU = bytes.fromhex(
    "0000080000000000000000007e00000000000000001000000000010001000000000003000080000001000000080000000080000001"
).ljust(96, b"\0")
"""Of qemu-storage-daemon 10.0: 256 MiB, writable=on, num-queues=3, logical-block-size=4096."""


def config(**changed):
    fields = {
        "capacity": (256 << 20) // 512,
        "seg_max": 126,
        "blk_size": 4096,
        "writeback": False,
        "num_queues": 3,
        "max_discard_sectors": 32768,
        "max_discard_seg": 1,
        "discard_sector_alignment": 8,
        "max_write_zeroes_sectors": 32768,
        "max_write_zeroes_seg": 1,
        "write_zeroes_may_unmap": False,
    }
    return Config(**fields | changed).build()


def test_the_configuration_space_is_qemus():
    assert CONFIG_SIZE == Config.SIZE == 96
    assert config() == QEMU


def test_it_tells_the_truth_about_the_cache():
    assert [at for at in range(96) if config(writeback=True)[at] != QEMU[at]] == [CONFIG_WRITEBACK]


def test_fields_are_where_the_specification_has_them():
    for field, offset, width in [
        ("capacity", 0, 8),
        ("size_max", 8, 4),
        ("seg_max", 12, 4),
        ("blk_size", 20, 4),
        ("physical_block_exp", 24, 1),
        ("alignment_offset", 25, 1),
        ("min_io_size", 26, 2),
        ("opt_io_size", 28, 4),
        ("num_queues", 34, 2),
        ("max_discard_sectors", 36, 4),
        ("max_discard_seg", 40, 4),
        ("discard_sector_alignment", 44, 4),
        ("max_write_zeroes_sectors", 48, 4),
        ("max_write_zeroes_seg", 52, 4),
        ("write_zeroes_may_unmap", 56, 1),
        ("max_secure_erase_sectors", 60, 4),
        ("max_secure_erase_seg", 64, 4),
        ("secure_erase_sector_alignment", 68, 4),
    ]:
        value = (1 << 8 * width) - 2 if width > 1 else 0xFE
        built = config(**{field: value})
        assert int.from_bytes(built[offset : offset + width], "little") == value, field
