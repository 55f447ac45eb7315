"""What is said of images that are made, opened and looked at, against facts about QEMU 10.0's schema."""

import pytest

from blkferry.daemon.branches import load_branches
from blkferry.drivers.file_create import BlockdevCreateOptionsFile
from blkferry.drivers.qcow2.options import BlockdevCreateOptionsQcow2, BlockdevOptionsQcow2, Qcow2OverlapCheckFlags
from blkferry.errors import Error
from blkferry.schema.block import BlockdevOptions
from blkferry.schema.create import BlockdevCreateOptions
from blkferry.schema.crypto import QCryptoBlockCreateOptionsLuks
from blkferry.schema.image import (
    ImageInfo,
    ImageInfoSpecificFile,
    ImageInfoSpecificQCow2,
    Qcow2BitmapInfo,
    Qcow2CompressionType,
)
from blkferry.schema.model import branch_members, members
from blkferry.schema.qapi import EXTENSION, Null, variants
from blkferry.schema.visit import dump, visit

MEMBERS = {
    BlockdevOptionsQcow2: (
        "file backing? lazy-refcounts? pass-discard-request? pass-discard-snapshot? pass-discard-other? "
        "discard-no-unref? overlap-check? cache-size? l2-cache-size? l2-cache-entry-size? refcount-cache-size? "
        "cache-clean-interval? encrypt? data-file? snapshot?"
    ),
    BlockdevCreateOptionsQcow2: (
        "file data-file? data-file-raw? extended-l2? size version? backing-file? backing-fmt? encrypt? cluster-size? "
        "preallocation? lazy-refcounts? refcount-bits? compression-type?"
    ),
    BlockdevCreateOptionsFile: "filename size preallocation? nocow?",
    QCryptoBlockCreateOptionsLuks: (
        "key-secret? cipher-alg? cipher-mode? ivgen-alg? ivgen-hash-alg? hash-alg? iter-time?"
    ),
    ImageInfoSpecificQCow2: (
        "compat data-file? data-file-raw? extended-l2? lazy-refcounts? corrupt? refcount-bits encrypt? bitmaps? "
        "compression-type"
    ),
}
PLAIN = {
    Qcow2OverlapCheckFlags: (
        "template? main-header? active-l1? active-l2? refcount-table? refcount-block? snapshot-table? inactive-l1? "
        "inactive-l2? bitmap-directory?"
    ),
    ImageInfo: (
        "filename format dirty-flag? actual-size? virtual-size cluster-size? encrypted? compressed? backing-filename? "
        "full-backing-filename? backing-filename-format? snapshots? format-specific? backing-image?"
    ),
    Qcow2BitmapInfo: "name granularity flags",
}


def names(found):
    return {member.name + ("?" if member.optional else "") for member in found}


@pytest.mark.parametrize("cls", MEMBERS)
def test_branches_have_the_members_that_qemu_has(cls):
    assert names(branch_members(cls)) == set(MEMBERS[cls].split())


@pytest.mark.parametrize("cls", PLAIN)
def test_structs_have_the_members_that_qemu_has(cls):
    assert names(members(cls)) == set(PLAIN[cls].split())


def test_only_the_snapshot_of_a_qcow2_node_is_ours():
    ours = [member.name for member in branch_members(BlockdevOptionsQcow2) if EXTENSION in member.doc.features]
    assert ours == ["snapshot"]


def test_no_backing_file_is_not_the_same_as_saying_nothing():
    load_branches()
    options = {"driver": "qcow2", "node-name": "q", "file": "f"}
    assert visit(BlockdevOptionsQcow2, options).backing is None
    without = visit(BlockdevOptionsQcow2, {**options, "backing": None})
    assert without.backing is Null.NULL
    assert dump(without) == {**options, "backing": None}
    assert visit(BlockdevOptionsQcow2, {**options, "backing": "b"}).backing == "b"
    inline = visit(BlockdevOptionsQcow2, {**options, "backing": {"driver": "memory", "size": 512}})
    assert isinstance(inline.backing, BlockdevOptions)


def test_overlap_checks_are_a_name_or_flags():
    options = {"driver": "qcow2", "file": "f"}
    assert visit(BlockdevOptionsQcow2, {**options, "overlap-check": "all"}).overlap_check == "all"
    flags = visit(BlockdevOptionsQcow2, {**options, "overlap-check": {"template": "none", "main-header": True}})
    assert flags.overlap_check.main_header is True
    with pytest.raises(Error, match="Parameter 'overlap-check' does not accept value 'some'"):
        visit(BlockdevOptionsQcow2, {**options, "overlap-check": "some"})


def test_what_only_a_format_has_stands_in_data():
    specific = ImageInfoSpecificQCow2(
        compat="1.1", lazy_refcounts=False, refcount_bits=16, compression_type=Qcow2CompressionType.ZLIB
    )
    info = ImageInfo(filename="a", format="qcow2", virtual_size=512, format_specific=specific)
    data = {"compat": "1.1", "lazy-refcounts": False, "refcount-bits": 16, "compression-type": "zlib"}
    assert dump(info)["format-specific"] == {"type": "qcow2", "data": data}
    assert visit(ImageInfo, dump(info)) == info
    empty = ImageInfo(filename="a", format="file", virtual_size=512, format_specific=ImageInfoSpecificFile())
    assert dump(empty)["format-specific"] == {"type": "file", "data": {}}


def test_every_driver_may_be_asked_to_make_an_image():
    load_branches()
    assert set(variants(BlockdevCreateOptions).all()) >= set(variants(BlockdevOptions).all()) - {"qcow2"}
    assert visit(BlockdevCreateOptions, {"driver": "raw"}).driver == "raw"
    with pytest.raises(Error, match="Parameter 'driver' does not accept value 'nope'"):
        visit(BlockdevCreateOptions, {"driver": "nope"})
